"""TLS 1.3 and nothing older, for everything that gRPC does in this process."""

from __future__ import annotations

import os
import sys

from cortex_common.errors import PreconditionError

# gRPC for Python cannot be told the least version of TLS. It can be told the ciphers of TLS 1.2 (those of 1.3 are
# fixed), and this one needs a key that both ends were given beforehand, which gRPC gives nobody: no handshake of 1.2
# succeeds.
_VARIABLE, _UNUSABLE = "GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-CHACHA20-POLY1305"


def require_tls13() -> None:
    """Let gRPC speak TLS 1.3 only, from its import to the end of the process.

    For processes of Cortex's own: in a person's program it would also hold for gRPC clients that are none of ours.

    Raises:
        PreconditionError: gRPC has been imported already; it reads its settings then, and never again.
    """
    if os.environ.get(_VARIABLE) == _UNUSABLE:
        return
    if "grpc" in sys.modules:
        raise PreconditionError(
            "a server of Cortex takes TLS 1.3 only, which gRPC must know before it is imported: start services with "
            "`cortex serve`, or call cortex_common.rpc.tls13.require_tls13() first"
        )
    os.environ[_VARIABLE] = _UNUSABLE
