"""Heads of the log of API tokens, which others write: recorded in the gateway's own audit log, whose heads it signs."""

from __future__ import annotations

import asyncio

from cortex_common.clock import Clock
from cortex_common.errors import CorruptError
from cortex_common.logging import get_logger
from cortex_common.rpc.auditing import Auditor
from cortex_common.security.audit import Head
from cortex_common.security.audit_proof import SEEN_HEAD, about_head
from cortex_common.security.signed_heads import SIGN_EVERY_S
from cortex_common.security.tokens import TokenStore

log = get_logger(__name__)


async def record_heads(tokens: TokenStore, auditor: Auditor, clock: Clock) -> None:
    """Record where the log of API tokens ends whenever that has changed, for ever."""
    seen, told = Head(), ""
    while True:
        try:
            head, reason = await asyncio.to_thread(tokens.audit_head), ""
        except (OSError, CorruptError) as error:
            head, reason = seen, str(error)
        if reason and reason != told:
            log.warning("token_log_unreadable", reason=reason)
        told = reason
        if head != seen:
            auditor.did(SEEN_HEAD, about_head(head), "the log of API tokens ends here")
            seen = head
        await clock.sleep(SIGN_EVERY_S)
