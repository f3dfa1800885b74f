"""The API token of a local network: made once, kept where only its owner can read it."""

from __future__ import annotations

from cortex.local.files import write_text
from cortex.local.layout import Layout
from cortex_common.errors import UnauthenticatedError
from cortex_common.security.tokens import Scope, TokenStore

NAME = "local-operator"


def ensure_token(layout: Layout) -> str:
    """The token in the token file if the gateway would accept it, else a new one with every scope."""
    store = TokenStore(layout.tokens_file)
    try:
        token = layout.token_file.read_text(encoding="ascii").strip()
        store.verify(token)
    except (FileNotFoundError, UnicodeDecodeError, UnauthenticatedError):
        token = store.create(NAME, tuple(Scope))
        write_text(layout.token_file, token + "\n", mode=0o600)
    return token
