"""The server: Flower's own FedAvg, and a file that says when each round ended and what was trained."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict

from bench_app.model import build, read_job

app = ServerApp()


def _sums(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
    """Steps and images of all clients added up, their losses averaged by images."""
    rows = [next(iter(reply.metric_records.values())) for reply in replies]
    images = sum(float(row[weighted_by]) for row in rows)
    loss = sum(float(row["loss"]) * float(row[weighted_by]) for row in rows) / images
    sums = {key: int(sum(int(row[key]) for row in rows)) for key in ("num-steps", "num-images")}
    return MetricRecord({"loss": loss, **sums})


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds, from an adapter drawn here."""
    job, ends = read_job(str(context.run_config["job"])), []
    started = time.time()
    initial = ArrayRecord(get_peft_model_state_dict(build(job)))

    def note(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:  # noqa: ARG001
        ends.append(time.time())
        return None

    strategy = FedAvg(min_available_nodes=len(job["sites"]), train_metrics_aggr_fn=_sums)
    rounds = int(context.run_config["rounds"])
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds, evaluate_fn=note)
    tensors = {name: list(array.shape) for name, array in result.arrays.items()}
    trained = {str(number): dict(row) for number, row in result.train_metrics_clientapp.items()}
    validated = {str(number): dict(row) for number, row in result.evaluate_metrics_clientapp.items()}
    outcome = {"started": started, "ends": ends, "tensors": tensors, "train": trained, "validation": validated}
    Path(str(context.run_config["out"])).write_text(json.dumps(outcome))
