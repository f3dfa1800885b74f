"""An OpenID Connect issuer on loopback: discovery, keys and signed tokens, made by another library."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from joserfc import jwt
from joserfc.jwk import ECKey, Key, KeySet, OKPKey, RSAKey

AUDIENCE = "cortex"
ALGORITHMS = ("ES256", "EdDSA", "RS256")


def new_key(algorithm: str, key_id: str) -> Key:
    """A key to sign with."""
    parameters = {"kid": key_id, "use": "sig", "alg": algorithm}
    if algorithm == "ES256":
        return ECKey.generate_key("P-256", parameters)
    if algorithm == "EdDSA":
        return OKPKey.generate_key("Ed25519", parameters)
    return RSAKey.generate_key(2048, parameters)


@dataclass
class Issuer:
    """The running issuer."""

    url: str = ""
    keys: dict[str, Key] = field(default_factory=lambda: {name: new_key(name, f"{name}-1") for name in ALGORITHMS})
    called: list[str] = field(default_factory=list)
    is_away: bool = False
    name_in_document: str | None = None
    padding: str = ""

    def answer(self, path: str) -> dict[str, Any]:
        """What it serves."""
        self.called.append(path)
        if path == "/jwks":
            public = KeySet(list(self.keys.values())).as_dict(private=False)
            return public | {"padding": self.padding}
        return {"issuer": self.name_in_document or self.url, "jwks_uri": f"{self.url}/jwks"}

    def claims(self, **changes: Any) -> dict[str, Any]:
        """What a good token says; a value of None leaves the claim out."""
        now = int(time.time())
        good = {"iss": self.url, "aud": AUDIENCE, "sub": "u-1", "iat": now, "exp": now + 600, "scope": "cortex:read"}
        return {name: value for name, value in (good | changes).items() if value is not None}

    def token(
        self, algorithm: str = "ES256", key: Key | None = None, head: dict[str, Any] | None = None, **claims: Any
    ):
        """A signed token."""
        key = key or self.keys[algorithm]
        header = {"alg": algorithm, "kid": key.kid, "typ": "JWT"} | (head or {})
        header = {name: value for name, value in header.items() if value is not None}
        return jwt.encode(header, self.claims(**claims), key, algorithms=[algorithm, "HS256"])


@contextmanager
def issuer() -> Iterator[Issuer]:
    """One that answers until the end of the block."""
    made = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(made.answer(self.path)).encode()
            self.send_response(503 if made.is_away else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
