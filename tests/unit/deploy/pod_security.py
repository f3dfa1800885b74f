"""The restricted Pod Security Standard, as Kubernetes 1.37 documents it, for pods of Linux.

Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Tree = Mapping[str, Any]

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
SELINUX_TYPES = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
}
PROFILES = ("RuntimeDefault", "Localhost")
APPARMOR = "container.apparmor.security.beta.kubernetes.io/"


def violations(template: Tree) -> list[str]:
    """What of a pod template the standard does not allow, as `container: field`; empty when it is restricted."""
    spec = template["spec"]
    found = [f"pod: {field}" for field in _of_the_pod(spec)]
    annotations = template.get("metadata", {}).get("annotations", {})
    found += [
        f"pod: {name}"
        for name, value in annotations.items()
        if name.startswith(APPARMOR) and value != "runtime/default" and not value.startswith("localhost/")
    ]
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in spec.get(kind, []):
            found += [f"{container['name']}: {field}" for field in _of_a_container(container, spec)]
    return found


def _of_the_pod(spec: Tree) -> Iterator[str]:
    yield from (field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field))
    for volume in spec.get("volumes", []):
        yield from (f"volumes.{kind}" for kind in set(volume) - {"name"} - VOLUMES)
    security = spec.get("securityContext", {})
    yield from _of_any_context(security)
    yield from (f"sysctls.{each['name']}" for each in security.get("sysctls", []) if each["name"] not in SYSCTLS)


def _of_a_container(container: Tree, spec: Tree) -> Iterator[str]:
    own, of_pod = container.get("securityContext", {}), spec.get("securityContext", {})
    yield from _of_any_context(own)
    if own.get("privileged"):
        yield "privileged"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if {**of_pod, **own}.get("runAsNonRoot") is not True:
        yield "runAsNonRoot"
    if {**of_pod, **own}.get("seccompProfile", {}).get("type") not in PROFILES:
        yield "seccompProfile"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield "capabilities.drop"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities.add"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "hostPort"
    yield from _hosts_called(container)


def _of_any_context(security: Tree) -> Iterator[str]:
    if security.get("runAsUser") == 0:
        yield "runAsUser"
    if security.get("windowsOptions", {}).get("hostProcess"):
        yield "windowsOptions.hostProcess"
    if security.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in PROFILES:
        yield "appArmorProfile"
    if security.get("seccompProfile", {}).get("type", "RuntimeDefault") not in PROFILES:
        yield "seccompProfile"
    options = security.get("seLinuxOptions", {})
    if options.get("type") not in SELINUX_TYPES or options.get("user") or options.get("role"):
        yield "seLinuxOptions"


def _hosts_called(container: Tree) -> Iterator[str]:
    """A probe or a hook calls the pod itself, never another host."""
    lifecycle = container.get("lifecycle", {})
    probes = {name: container.get(name, {}) for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    for name, action in {**probes, **{hook: lifecycle.get(hook, {}) for hook in ("postStart", "preStop")}}.items():
        if any(action.get(way, {}).get("host") for way in ("httpGet", "tcpSocket")):
            yield f"{name}.host"
