"""Settings of a service: a YAML file, overridden by `CORTEX_<FIELD>` variables; mistakes are never passed over."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from cortex_common.errors import InvalidArgumentError, NotFoundError, PreconditionError, Violation
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.job.parse import violations_of
from cortex_common.job.quantities import Rate
from cortex_common.rpc.auditing import Auditor
from cortex_common.rpc.denial import DenyList
from cortex_common.rpc.server import MAX_MESSAGE_BYTES, RpcSettings, join_address
from cortex_common.security.certificates import certificate_of, read_file
from cortex_common.security.joining import JoinToken
from cortex_common.yaml_text import load_yaml

PREFIX = "CORTEX_"
NESTED = "__"
# Read by the command line, the SDK or the test harness; allowed beside any service's own.
KNOWN_ENVIRONMENT = frozenset(
    PREFIX + name
    for name in ("CONFIG", "DIR", "ENDPOINT", "DISCOVERY", "FAILPOINT", "CA", "CERTIFICATE", "KEY", "DATA_DIR")
)
_SERVICE_LINK = re.compile(r"CORTEX_\w+_(SERVICE_(HOST|PORT\w*)|PORT(_\w+)?)")

_Settings = TypeVar("_Settings", bound="FileSettings")


class FileSettings(BaseSettings):
    """What `load_settings` can fill: frozen, and an unknown key is a mistake."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=NESTED, extra="forbid", frozen=True, validate_default=True
    )
    OTHERS_VARIABLES: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")
    """Variables that are passed over unless they look like one of these settings. A service has its shell to itself."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments only: `load_settings` merges file and environment, so that tests are not touched by either."""
        return (init_settings,)


class TlsSettings(FileSettings):
    """Where a process finds its certificate."""

    ca: Path
    certificate: Path
    key: Path

    @property
    def tls(self) -> TlsFiles:
        """The three files."""
        return TlsFiles(self.ca, self.certificate, self.key)


class Bandwidth(BaseModel):
    """Most that bulk transfers take of a node's link, e.g. `10Mbit/s`; nothing: no limit. Control is not counted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    up: Rate = None
    down: Rate = None


class ServiceSettings(TlsSettings):
    """What every service needs to know."""

    MAX_MESSAGE_BYTES: ClassVar[int] = MAX_MESSAGE_BYTES

    network: str = "cortex"
    name: str
    region: str = "local"
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    advertise: str | None = None
    state_dir: Path
    join_token: SecretStr | None = None
    join_token_file: Path | None = None
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(default=0, ge=0, le=65535)
    log_level: str = "INFO"
    log_json: bool = True
    ready_file: Path | None = None
    parent_pid: int | None = None

    def identity(self, role: Role) -> Identity:
        """Who this service is, as its certificate must say too.

        Raises:
            PreconditionError: the certificate says otherwise.
        """
        wanted = Identity(self.network, role, NodeName(self.name))
        found = certificate_of(self.tls).identity
        if found != wanted:
            raise PreconditionError(
                f"certificate {self.certificate} is for {found.uri}, the settings are for {wanted.uri}"
            )
        return wanted

    def rpc(self, denied: DenyList, auditor: Auditor | None, *, bulk: bool = False) -> RpcSettings:
        """Settings of this service's gRPC server, which refuses who is denied and writes to the auditor's log."""
        return RpcSettings(
            self.host,
            self.port,
            self.tls,
            self.network,
            bulk=bulk,
            max_message_bytes=self.MAX_MESSAGE_BYTES,
            denied=denied,
            auditor=auditor,
        )

    @property
    def joining(self) -> JoinToken | None:
        """The token to join the network with, if this node is to enrol.

        Raises:
            NotFoundError: the file cannot be read.
            InvalidArgumentError: it is no token, or that of another node.
        """
        text = self.join_token.get_secret_value() if self.join_token else ""
        if self.join_token_file is not None:
            text = read_file(self.join_token_file, "join token").decode(errors="replace")
        token = JoinToken.decode(text) if text else None
        if token is not None and (token.identity.name, token.identity.network) != (self.name, self.network):
            raise InvalidArgumentError(
                f"the join token is for {token.identity.uri}, the settings are for {self.name!r} in {self.network!r}"
            )
        return token

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names and addresses of this node's own server, for its certificate."""
        advertised = "" if self.advertise is None else re.sub(r":\d+$", "", self.advertise)
        named = dict.fromkeys(host.strip("[]") for host in ("localhost", "127.0.0.1", "::1", self.host, advertised))
        return tuple(host for host in named if host not in ("", "0.0.0.0", "::"))  # noqa: S104 - left out, not bound  # nosec B104

    def advertised(self, port: int) -> str:
        """host:port under which other nodes reach a server that listens at `port`."""
        if self.advertise is None:
            return join_address(self.host, port)
        has_port = re.search(r":\d+$", self.advertise) is not None
        return self.advertise if has_port else join_address(self.advertise, port)

    def advertised_beside(self, port: int) -> str:
        """host:port under which other nodes reach a second server of this node."""
        host = self.advertised(port).rpartition(":")[0]
        return f"{host}:{port}"


def load_settings(
    cls: type[_Settings], config: Path | None, service: str, environment: Mapping[str, str] | None = None
) -> _Settings:
    """Read settings from a YAML file and the environment, which wins.

    Args:
        cls: The settings to fill.
        config: YAML file; None when everything is in the environment.
        service: Names the settings in errors.
        environment: Instead of the process's own.

    Raises:
        NotFoundError: the file cannot be read.
        InvalidArgumentError: every unknown key, missing key and bad value of both sources at once.
    """
    environment = os.environ if environment is None else environment
    values = _read_yaml(config) if config is not None else {}
    violations = list(_unknown_variables(cls, environment))
    try:
        given = _environment_source(cls, environment)
    except SettingsError:
        unreadable = {name: reason for name, value in environment.items() if (reason := _unreadable(cls, name, value))}
        violations += [Violation(*each) for each in unreadable.items()]
        given = _environment_source(cls, {name: environment[name] for name in environment if name not in unreadable})
    merged = _with_sections(cls, _merged(values, given))
    try:
        settings = cls(**merged)
    except ValidationError as error:
        violations += [_with_variable(each, given) for each in violations_of(error, cls)]
    else:
        if not violations:
            return settings
    source = f"{service} settings ({config})" if config else f"{service} settings"
    raise InvalidArgumentError.of(source, violations)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFoundError(f"settings file {path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"settings file {path} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InvalidArgumentError(
            f"settings file {path} holds a {type(values).__name__}; allowed are `key: value` lines"
        )
    return {str(key): value for key, value in values.items()}


def _environment_source(cls: type[FileSettings], environment: Mapping[str, str]) -> dict[str, Any]:
    """The variables as pydantic-settings reads them: nested by `__`, JSON for lists and mappings."""
    from pydantic_settings import EnvSettingsSource

    class GivenEnvironment(EnvSettingsSource):
        def _load_env_vars(self) -> Mapping[str, str | None]:
            return {name.lower(): value for name, value in environment.items() if value}

    return GivenEnvironment(cls)()


def _unreadable(cls: type[FileSettings], name: str, value: str) -> str | None:
    """What is wrong with a variable that stands for a list or a mapping."""
    if not name.upper().startswith(PREFIX):
        return None
    try:
        _environment_source(cls, {name: value})
    except SettingsError as error:
        return f'is not JSON ({error.__cause__}); allowed: a list as in [512, 256], a mapping as in {{"key": 1}}'
    return None


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _with_sections(cls: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """A section that must be there and is not, or is empty, as one without keys: each missing key is told."""
    required = {name: field.annotation for name, field in cls.model_fields.items() if field.is_required()}
    sections = {name for name, kind in required.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}
    return {**values, **{name: {} for name in sections if values.get(name) is None}}


def _unknown_variables(cls: type[FileSettings], environment: Mapping[str, str]) -> Iterator[Violation]:
    known = sorted(name.upper() for name in _variables(cls, PREFIX))
    for name in sorted(environment):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in known or upper in KNOWN_ENVIRONMENT:
            continue
        close = difflib.get_close_matches(upper, known, n=3, cutoff=0.8)
        if not close and cls.OTHERS_VARIABLES.fullmatch(upper):
            continue
        if _SERVICE_LINK.fullmatch(upper):
            hint = "set by Kubernetes: put `enableServiceLinks: false` in the pod"
        elif close:
            hint = f"did you mean {' or '.join(close)}?"
        else:
            hint = f"allowed are {', '.join(known)}"
        yield Violation(name, f"unknown environment variable; {hint}")


def _variables(cls: type[BaseModel], prefix: str) -> Iterator[str]:
    """Names of every variable that sets something in `cls`."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _variables(kind, prefix + name + NESTED)


def _with_variable(violation: Violation, given: Mapping[str, Any]) -> Violation:
    """The mistake, with the environment variable that made it, or could mend it."""
    parts = violation.path.split(".")
    variable = PREFIX + NESTED.join(parts).upper()
    if violation.message.startswith("missing"):
        return Violation(violation.path, f"is missing; set it in the file or as {variable}")
    where = f" (from {variable})" if _is_given(parts, given) else ""
    return Violation(violation.path, violation.message + where)


def _is_given(parts: Sequence[str], given: Mapping[str, Any]) -> bool:
    """Whether the environment set this."""
    found: Any = given
    for part in parts:
        if not isinstance(found, Mapping) or part not in found:
            return False
        found = found[part]
    return True
