"""One round of one client."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peer_task import Task, Trainer, changed

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this seat's examples, or change the weights a little."""
    task, seat = Task.load(), int(context.node_config["seat"])
    arrays = message.content["arrays"].to_numpy_ndarrays()
    examples = 1
    if task.data:
        trainer = Trainer(task, seat)
        arrays = trainer.round(arrays, seed=1000 * int(message.content["config"]["server-round"]) + seat)
        examples = trainer.examples
    else:
        arrays = changed(arrays, seat)
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": examples})})
    return Message(content=content, reply_to=message)
