"""Client of NVFlare: every task is one round."""

from __future__ import annotations

import nvflare.client as flare
import torch
from peer_task import Task, Trainer, changed


def main() -> None:
    """Answer rounds until there are no more."""
    task = Task.load()
    flare.init()
    seat = int(flare.get_site_name().rpartition("-")[2]) - 1
    trainer = Trainer(task, seat) if task.data else None
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        names = list(received.params)
        arrays = [torch.as_tensor(value).numpy() for value in received.params.values()]
        arrays = trainer.round(arrays, 1000 * received.current_round + seat) if trainer else changed(arrays, seat)
        steps = trainer.epoch_steps() if trainer else 1
        flare.send(
            flare.FLModel(
                params={name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)},
                meta={"NUM_STEPS_CURRENT_ROUND": steps},
            )
        )


if __name__ == "__main__":
    main()
