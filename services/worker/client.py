"""The worker's data-plane channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import grpc.aio


class _NewestChannel:
    """As much of a channel as a download uses, found anew for each of its calls."""

    def __init__(self, find: Callable[[], grpc.aio.Channel]) -> None:
        self._find = find

    def unary_stream(self, *method: Any, **options: Any) -> Callable[..., Any]:
        return lambda *call: self._find().unary_stream(*method, **options)(*call)


def newest_channel(find: Callable[[], grpc.aio.Channel]) -> grpc.aio.Channel:
    """A channel for one download, whose peer may move meanwhile: each attempt goes to where it is by then."""
    return cast("grpc.aio.Channel", _NewestChannel(find))
