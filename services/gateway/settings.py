"""Settings of the gateway."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from cortex_common.security.tokens import Scope
from cortex_common.settings import ServiceSettings
from services.gateway.patience import Patience


def _checked_url(url: str) -> str:
    """HTTPS, or plain HTTP on this machine."""
    parts = urlsplit(url)
    is_local = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
    if not parts.hostname or (parts.scheme != "https" and not is_local):
        raise ValueError(f"{url[:200]!r} given; allowed: https://…, or http:// on this machine")
    return url


class OidcSettings(BaseModel):
    """Whose JSON Web Tokens count beside Cortex's own tokens, and what their claims mean here.

    Attributes:
        issuer: URL, exactly as it stands in the claim `iss`; its keys are found from there (OpenID Connect Discovery).
        audience: Must be in the claim `aud`.
        algorithms: By which tokens may be signed.
        name_claim: Whose it is, for logs and ownership; made up from `sub` where it is not fit for that.
        org_claim: Names the organisation; without it everybody is of the default one.
        orgs: Organisation by word of `org_claim`; the words themselves if empty.
        scope_claim: Words that `scopes` maps to scopes: a list, or one text with spaces.
        max_life_s: A token may be good for no longer.
        leeway_s: How far clocks may differ.
        ca: PEM file of the authority of the issuer's own HTTPS certificate; the system's, if unset.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: Annotated[str, AfterValidator(_checked_url)]
    audience: str = Field(min_length=1)
    algorithms: tuple[Literal["ES256", "EdDSA", "RS256"], ...] = Field(default=("ES256", "EdDSA"), min_length=1)
    name_claim: str = "sub"
    org_claim: str | None = None
    orgs: dict[str, str] = {}
    scope_claim: str = "scope"
    scopes: dict[str, tuple[Scope, ...]] = {"cortex:read": (Scope.READ,), "cortex:submit": (Scope.READ, Scope.SUBMIT)}
    max_life_s: float = Field(default=3600.0, gt=0)
    leeway_s: float = Field(default=30.0, ge=0, le=300)
    ca: Path | None = None

    @staticmethod
    def checked_url(url: str) -> str:
        """The URL, if it may be asked.

        Raises:
            ValueError: it may not.
        """
        return _checked_url(url)


def _is_loopback(host: str) -> bool:
    """Whether what listens there is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class GatewaySettings(ServiceSettings):
    """Where the gateway listens (`host`, `port`: HTTP) and whom it calls.

    Attributes:
        coordinator: host:port of the coordinator.
        discovery: host:port of discovery.
        tokens: The token file; `<state_dir>/tokens.json` if unset.
        http_certificate: PEM file; HTTPS if set together with `http_key`, plain HTTP if neither is.
        allow_plain_http: Plain HTTP and WebSocket beyond loopback too; who is on the way reads the tokens.
        max_event_streams: Event streams open at a time.
        max_connections: Connections open at a time; beyond them requests are answered 503.
        head_s, body_s, write_s: How long a request's headers, its body, and a peer that takes nothing are waited for.
        requests_per_s, requests_burst: How often each principal may ask, on average and at once.
        bad_tokens_per_s, bad_tokens_burst: How often an address may come with a token that is not good.
        oidc: Accept tokens of an OpenID Connect issuer too.
        watch_patience_s: An event stream outlives a coordinator that is away for less.
        websocket_port: Where nodes connect (WebSocket, with the same certificate as HTTP); 0 takes a free one.
        max_node_connections: Of all nodes together; each has one or two, a third while it sends and fetches at once.
        max_joining: Connections there that have not joined yet; beyond them the address with most loses its oldest.
        node_join_s: Time for a node to answer a CHALLENGE.
        node_patience_s: A node that takes longer for a message, either way, or to answer a ping is cut off.
    """

    port: int = Field(default=8080, ge=0, le=65535)
    coordinator: str = Field(pattern=r".+:\d+$")
    discovery: str = Field(pattern=r".+:\d+$")
    tokens: Path | None = None
    http_certificate: Path | None = None
    http_key: Path | None = None
    allow_plain_http: bool = False
    max_connections: int = Field(default=1000, gt=0)
    head_s: float = Field(default=10.0, gt=0)
    body_s: float = Field(default=30.0, gt=0)
    write_s: float = Field(default=30.0, gt=0)
    requests_per_s: float = Field(default=50.0, gt=0)
    requests_burst: float = Field(default=100.0, ge=1)
    bad_tokens_per_s: float = Field(default=1.0, gt=0)
    bad_tokens_burst: float = Field(default=20.0, ge=1)
    oidc: OidcSettings | None = None
    max_body_bytes: int = Field(default=1 << 20, gt=0)
    max_event_streams: int = Field(default=100, gt=0, le=120)
    watch_patience_s: float = Field(default=60.0, ge=0.0)
    websocket_port: int = Field(default=8765, ge=0, le=65535)
    max_node_connections: int = Field(default=1000, ge=1)
    max_joining: int = Field(default=200, ge=1)
    node_join_s: float = Field(default=10.0, gt=0)
    node_patience_s: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.http_certificate is None) != (self.http_key is None):
            raise ValueError("http_certificate and http_key: allowed are both (HTTPS) or neither (HTTP)")
        return self

    @model_validator(mode="after")
    def _plain_only_where_nobody_listens(self) -> Self:
        if self.http_certificate is None and not self.allow_plain_http and not _is_loopback(self.host):
            raise ValueError(
                f"host: {self.host!r} is not loopback, and without http_certificate and http_key everybody on the way"
                " could read API and node tokens; set both, or allow_plain_http where the way is secret"
            )
        return self

    @property
    def token_file(self) -> Path:
        """Where the tokens are."""
        return self.tokens or self.state_dir / "tokens.json"

    @property
    def patience(self) -> Patience:
        """How long slow peers are borne."""
        return Patience(self.head_s, self.body_s, self.write_s)

    @property
    def scheme(self) -> str:
        """How clients begin the URL: http or https."""
        return "https" if self.http_certificate else "http"
