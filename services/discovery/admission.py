"""NodeAdmission: node tokens, and the passes with which gateways speak for the nodes that have one."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import OrderedDict

from cortex_common.clock import Clock
from cortex_common.errors import InvalidArgumentError, UnavailableError
from cortex_common.identity import Identity, Role, TlsFiles
from cortex_common.ids import NodeName
from cortex_common.logging import get_logger
from cortex_common.security.node_tokens import NodeToken, check_proof
from cortex_common.security.passes import NodePass, serial_of, sign_pass
from services.discovery import identities, metrics
from services.discovery.identities import Issued, NodeKey
from services.discovery.identity_service import IdentityAuthority

log = get_logger(__name__)

CHALLENGE_S = 30.0
_CHALLENGE_BYTES = 32
_MAX_CHALLENGES = 10_000
_KEY = re.compile(r"[0-9a-f]{64}")


class NodeAdmission:
    """Makes node tokens, and gives a pass for each fresh proof of one.

    Args:
        network: Whose.
        authority: Keeps what is known of identities.
        tls: Discovery's own certificate, which passes are signed with.
        life_s: Of a pass.
        clock: What time it is.
    """

    def __init__(self, network: str, authority: IdentityAuthority, tls: TlsFiles, life_s: float, clock: Clock) -> None:
        self._network = network
        self._authority = authority
        self._tls = tls
        self._life_s = life_s
        self._clock = clock
        self._challenges: OrderedDict[bytes, tuple[Identity, float]] = OrderedDict()

    async def create_token(self, name: str, region: str, life_s: float) -> tuple[NodeToken, float]:
        """A new node token and the wall time at which it expires.

        Raises:
            InvalidArgumentError, AlreadyExistsError: see `with_node_key`.
        """
        identity = Identity(self._network, Role.WORKER, NodeName(name))
        token, now_s = NodeToken.fresh(), self._clock.wall_s()
        key = NodeKey(token.token_id, token.public_key, identity, region, now_s + life_s)
        made = Issued(serial_of(token.token_id), now_s, key.expires_s)
        await self._authority.change(lambda state: (identities.with_node_key(state, key, made), None))
        log.info("node_token_made", identity=identity.uri, region=region, token_id=token.token_id)
        return token, key.expires_s

    def challenge(self, gateway: Identity) -> bytes:
        """What a node is to sign for this gateway, within half a minute, or before 10,000 others have been made.

        Whoever opens connections to a gateway has them made: the oldest make room, so that nodes, which answer at once,
        are not kept out.
        """
        now_s = self._clock.monotonic_s()
        while self._challenges and (
            len(self._challenges) >= _MAX_CHALLENGES or next(iter(self._challenges.values()))[1] <= now_s
        ):
            self._challenges.popitem(last=False)
        made = secrets.token_bytes(_CHALLENGE_BYTES)
        self._challenges[made] = (gateway, now_s + CHALLENGE_S)
        return made

    async def admit(
        self, gateway: Identity, node: str, region: str, token_id: str, sealing_key: str, challenge: bytes, proof: str
    ) -> tuple[bytes, float]:
        """A pass with which a gateway may speak for a node, and its life in seconds. A challenge does for one answer.

        Raises:
            UnauthenticatedError: token or proof are not good.
            UnavailableError: the challenge is not open: too late, or discovery was started again meanwhile.
            ForbiddenError: the token is for another node.
            InvalidArgumentError: the sealing key is none.
        """
        if not _KEY.fullmatch(sealing_key):
            raise InvalidArgumentError("sealing_key: allowed are the 32 bytes of an X25519 public key, in hexadecimal")
        asked = self._challenges.pop(challenge, None)
        if asked is None or asked[0] != gateway or asked[1] <= self._clock.monotonic_s():
            raise UnavailableError("the challenge is not open (any more): ask for another")
        now_s = self._clock.wall_s()
        key = identities.proven(self._authority.state, token_id, node, region, now_s)
        check_proof(key.public_key, proof, self._network, node, sealing_key, challenge.hex())
        life_s = min(self._life_s, key.expires_s - now_s)
        given = NodePass(key.identity, region, gateway, sealing_key, token_id, now_s, now_s + life_s)
        signed = await asyncio.to_thread(sign_pass, given, self._tls)
        metrics.PASSES.inc()
        return signed, life_s
