"""Writes the task as a job of NVFlare's PyTorch recipe into the directory given."""

from __future__ import annotations

import sys
from pathlib import Path

from nvflare.app_opt.pt.recipes import FedAvgRecipe
from nvflare_watch import Watch
from peer_task import Task


def main(directory: str) -> None:
    """Export it."""
    task, here = Task.load(), Path(__file__).resolve().parent
    arguments = {"shapes": [list(shape) for shape in task.shapes], "is_zero": not task.data}
    recipe = FedAvgRecipe(
        name="bench",
        model={"class_path": "peer_model.Perceptron", "args": arguments},
        min_clients=task.workers,
        num_rounds=task.rounds,
        train_script=str(here / "nvflare_client.py"),
    )
    recipe._job.to_server(Watch(), id="watch")
    recipe.export(directory)


if __name__ == "__main__":
    main(sys.argv[1])
