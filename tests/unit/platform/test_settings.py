"""Settings from file and environment, and the one error about all their mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel, Field

from cortex_common.errors import InvalidArgumentError, NotFoundError, PreconditionError
from cortex_common.identity import Role, TlsFiles
from cortex_common.settings import ServiceSettings, load_settings


class Lease(BaseModel):
    seconds: float = 10.0
    misses: int = Field(default=2, ge=1)


class ExampleSettings(ServiceSettings):
    lease: Lease = Lease()
    regions: tuple[str, ...] = ()


GOOD = "{name: c1, ca: /c/ca.pem, certificate: /c/tls.crt, key: /c/tls.key, state_dir: /s, port: 50051}"


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_file_fills_the_settings(config: Callable[[str], Path]) -> None:
    settings = load_settings(ExampleSettings, config(GOOD), "example", {})
    assert (settings.name, settings.port, settings.network, settings.lease.seconds) == ("c1", 50051, "cortex", 10.0)
    assert settings.tls == TlsFiles(Path("/c/ca.pem"), Path("/c/tls.crt"), Path("/c/tls.key"))


def test_the_environment_wins(config: Callable[[str], Path]) -> None:
    path = config(GOOD.replace("}", ", lease: {seconds: 5, misses: 4}}"))
    environment = {"CORTEX_PORT": "1", "CORTEX_LEASE__SECONDS": "7", "CORTEX_REGIONS": '["eu","us"]', "HOME": "/"}
    settings = load_settings(ExampleSettings, path, "example", environment)
    assert (settings.port, settings.lease.seconds, settings.lease.misses) == (1, 7.0, 4)
    assert settings.regions == ("eu", "us")


def test_the_environment_alone_is_enough() -> None:
    environment = {f"CORTEX_{key}": value for key, value in
                   {"NAME": "c1", "CA": "a", "CERTIFICATE": "b", "KEY": "c", "STATE_DIR": "d"}.items()}  # fmt: skip
    assert load_settings(ExampleSettings, None, "example", environment).key == Path("c")


def test_settings_made_in_a_program_do_not_look_at_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_PORT", "7")
    paths = {key: Path(key) for key in ("ca", "certificate", "key", "state_dir")}
    assert ExampleSettings(name="c1", **paths).port == 0


def test_all_mistakes_are_told_at_once(config: Callable[[str], Path]) -> None:
    path = config("{name: c1, ca: a, certificate: b, state_dir: s, prot: 5, lease: {misses: 0}}")
    environment = {
        "CORTEX_PORT": "high",
        "CORTEX_HOTS": "x",
        "CORTEX_DIR": "fine",
        "CORTEX_API_SERVICE_HOST": "10.0.0.1",
    }
    with pytest.raises(InvalidArgumentError) as caught:
        load_settings(ExampleSettings, path, "example", environment)
    said = {violation.path: violation.message for violation in caught.value.violations}
    assert set(said) == {"key", "prot", "lease.misses", "port", "CORTEX_HOTS", "CORTEX_API_SERVICE_HOST"}
    assert "unknown key; did you mean 'port'?" in said["prot"]
    assert "CORTEX_KEY" in said["key"]
    assert "'high'" in said["port"]
    assert "CORTEX_PORT" in said["port"]
    assert "greater than or equal to 1" in said["lease.misses"]
    assert "did you mean CORTEX_HOST or CORTEX_PORT?" in said["CORTEX_HOTS"]
    assert "enableServiceLinks" in said["CORTEX_API_SERVICE_HOST"]
    assert str(caught.value).startswith(f"example settings ({path}): 6 mistakes")


@pytest.mark.parametrize(
    ("text", "said"), [("- a\n- b", "holds a list"), ("a: [", "is not YAML"), ("regions: 5", "regions")]
)
def test_a_file_of_the_wrong_kind_is_refused(config: Callable[[str], Path], text: str, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        load_settings(ExampleSettings, config(text), "example", {})


def test_a_list_that_is_no_json_is_refused(config: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidArgumentError, match="CORTEX_REGIONS: is not JSON"):
        load_settings(ExampleSettings, config(GOOD), "example", {"CORTEX_REGIONS": "eu,us"})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nothing\.yaml"):
        load_settings(ExampleSettings, tmp_path / "nothing.yaml", "example", {})


def test_the_certificate_must_be_the_settings_own(tls_of: Callable[[Role, str], TlsFiles]) -> None:
    tls = tls_of(Role.WORKER, "w1")
    made = {"ca": tls.ca, "certificate": tls.certificate, "key": tls.key, "state_dir": Path("s")}
    assert ExampleSettings(name="w1", **made).identity(Role.WORKER).uri == "spiffe://cortex/worker/w1"
    with pytest.raises(PreconditionError, match=r"is for spiffe://cortex/worker/w1, the settings are for .*/w2"):
        ExampleSettings(name="w2", **made).identity(Role.WORKER)


def test_the_advertised_address_takes_the_real_port() -> None:
    paths = {key: Path(key) for key in ("ca", "certificate", "key", "state_dir")}
    assert ExampleSettings(name="a", **paths).advertised(7) == "127.0.0.1:7"
    assert ExampleSettings(name="a", advertise="node.example", **paths).advertised(7) == "node.example:7"
    assert ExampleSettings(name="a", advertise="node.example:80", **paths).advertised(7) == "node.example:80"
    assert ExampleSettings(name="a", host="::1", **paths).advertised(7) == "[::1]:7"
