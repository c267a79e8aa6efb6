"""Stage 10, report. In: a `Run` with stages. Out: where each begins, and the table that tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from consilium.report.load import Run
from consilium.report.tables import Cell, Table, interval
from consilium.report.text import UNDEFINED, bytes_text, count, strategy_text, tuner_text

Marks = Sequence[tuple[int, str]]  # the round after which a stage begins, and its name


def marks(run: Run) -> Marks:
    """Where stages begin on an axis of rounds; none where there is one."""
    stages = run.result.stages
    ends = [0, *accumulate(stage.rounds for stage in stages)]
    return [(end, stage.name) for end, stage in zip(ends, stages, strict=False)] if len(stages) > 1 else []


def table(run: Run) -> Table:
    """What each stage trained, what that took, and what it came to on the validation images."""
    head = ["stage", "rounds", "trained", "exchanged", "left as it was", "left the sites", "came in", "image passes",
            "balanced accuracy, validation"]  # fmt: skip
    rows = []
    for (begin, _), stage, settings in zip(_all(run), run.result.stages, run.stored.config.stages, strict=True):
        entry = (stage.metrics.val.get("personal") or {}).get("balanced_accuracy")
        sizes = [Cell(count(stage.parameters.get(key))) for key in ("trainable", "exchanged", "frozen")]
        rows.append([
            Cell(stage.name, f"{tuner_text(settings)}, {strategy_text(settings)}"),
            Cell(f"{begin + 1} to {begin + stage.rounds}"),
            *sizes,
            Cell(bytes_text(stage.bytes.up.total)),
            Cell(bytes_text(stage.bytes.down.total)),
            Cell(count(stage.image_passes.get("total"))),
            interval(entry.mean if entry else None),
        ])  # fmt: skip
    both = run.result.bytes
    sums = [bytes_text(both.up.total), bytes_text(both.down.total), count(run.result.image_passes.get("total"))]
    blank = [Cell(UNDEFINED)] * 3
    rows.append([Cell("all stages"), Cell(count(run.result.rounds)), *blank, *map(Cell, sums), Cell(UNDEFINED)])
    note = (
        "A stage begins with what the one before ended with; what it does not train keeps its bits, which was checked "
        "at every site. Numbers of scalars; bytes and image passes of all sites. The last column is the mean over "
        "sites of the model that each used when the stage ended; the test images were read once, after the last stage."
    )
    return Table("What each stage did", head, rows, 1, note=note)


def _all(run: Run) -> Marks:
    ends = [0, *accumulate(stage.rounds for stage in run.result.stages)]
    return [(end, stage.name) for end, stage in zip(ends, run.result.stages, strict=False)]
