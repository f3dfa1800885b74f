"""Part of NVFlare's server that tells the end of each round."""

from __future__ import annotations

from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from peer_task import Task


class Watch(FLComponent):
    """Tells what each aggregation made, at the moment the next round starts or the job ends."""

    def __init__(self) -> None:
        super().__init__()
        self._done = 0
        self._arrays: list[Any] | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Keep a round's result; tell of it when the controller is through with it."""
        if event_type == AppEventType.AFTER_AGGREGATION:
            result = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT)
            self._arrays = list(result.params.values())
            self._done += 1
        elif event_type == AppEventType.ROUND_STARTED and self._done == 0:
            task = Task.load()
            task.say(0, task.start_arrays()[-1])
        elif event_type in (AppEventType.ROUND_STARTED, EventType.END_RUN) and self._arrays is not None:
            arrays, self._arrays = self._arrays, None
            task = Task.load()
            if task.data:
                task.say_model(self._done, arrays)
            else:
                task.say(self._done, arrays[-1])
