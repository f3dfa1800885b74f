"""Rounds of FedAvg."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peer_task import Task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds; each one's end is told."""
    task = Task.load()

    def evaluate(done: int, record: ArrayRecord) -> MetricRecord:
        if task.data:
            task.say_model(done, record.to_numpy_ndarrays())
        else:
            task.say(done, list(record.values())[-1].numpy())
        return MetricRecord({"round": done})

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=task.workers, min_available_nodes=task.workers)
    strategy.start(
        grid=grid, initial_arrays=ArrayRecord(task.start_arrays()), num_rounds=task.rounds, evaluate_fn=evaluate
    )
