"""The client: builds the model anew for every message, as Flower's own quick starts do."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from bench_app.model import build, evaluate, load_split, read_job, train_epoch

app = ClientApp()


def _received(message: Message, context: Context) -> tuple[dict, int, nn.Module]:
    job, site = read_job(str(context.run_config["job"])), int(context.node_config["partition-id"])
    model = build(job)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    return job, site, model


@app.train()
def train(message: Message, context: Context) -> Message:
    """One local epoch, and how the trained adapter does on the validation images."""
    job, site, model = _received(message, context)
    seed = 1000 * int(message.content["config"]["server-round"]) + site
    loss, steps, images = train_epoch(model, load_split(job, site, "train"), job, seed)
    val_loss, _ = evaluate(model, load_split(job, site, "val"), job)
    metrics = {"loss": loss, "num-steps": steps, "num-images": images, "val-loss": val_loss, "num-examples": images}
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)


@app.evaluate()
def validate(message: Message, context: Context) -> Message:
    """How the mean of all adapters does on the validation images."""
    job, site, model = _received(message, context)
    split = load_split(job, site, "val")
    loss, accuracy = evaluate(model, split, job)
    metrics = MetricRecord({"val-loss": loss, "accuracy": accuracy, "num-examples": len(split.rows)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
