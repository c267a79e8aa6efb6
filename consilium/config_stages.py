"""Stage 0, config. In: a plain table with `[[stages]]`. Out: the same with every stage whole, and the last one on top.

A stage takes from the configuration's own tables what it leaves out: tuner and strategy as a whole, the others key by
key. The tables of the configuration then are those of its last stage, so that whatever looks at a configuration sees
the model that is used in the end. Filling in what is filled in changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WHOLE = ("tuner", "strategy")  # a stage's own takes the place of the configuration's
BY_KEY = ("head", "train", "wire", "evaluation")
SELECTION = ("serve", "select", "every")  # of `[evaluation]`; the rest is of the run
INSTEAD = {  # a key of a stage, and the one of the configuration that it stands for
    "local_steps": "local_epochs",
    "local_epochs": "local_steps",
    "learning_rate": "learning_rate_factor",
    "learning_rate_factor": "learning_rate",
}
Plain = Mapping[str, Any]
PRESETS: Mapping[str, tuple[Plain, ...]] = {
    # Two-stage federated transfer: Zhang and Li, arXiv 2203.12803. On a backbone that was trained elsewhere, first a
    # new head alone, then what the tables say. The paper's split between the stages is not public; this one is ours.
    "two_stage": (
        {"name": "warm", "tuner": "linear", "train": {"rounds": 5, "learning_rate": 1e-2}},
        {"name": "tune"},
    ),
}


def filled(table: Any) -> Any:
    """The table with whole stages, those of a preset too; what is no table, or has none, is left to validation.

    ValueError for a key of the configuration that no stage uses.
    """
    stages = table.get("stages") if isinstance(table, dict) else None
    if isinstance(stages, str):
        if stages not in PRESETS:
            raise ValueError(f"stages is {', '.join(PRESETS)}, or tables [[stages]]; not {stages!r}")
        stages = [dict(stage) for stage in PRESETS[stages]]
    if not isinstance(stages, Sequence) or not stages or not all(isinstance(each, dict) for each in stages):
        return table
    if any(not isinstance(each.get(key, {}), Mapping) for each in (table, *stages) for key in BY_KEY):
        return table
    whole = [_whole(table, stage, number) for number, stage in enumerate(stages, start=1)]
    last = whole[-1]
    _used(table, stages, last)
    top = {key: last[key] for key in (*WHOLE, "head", "train", "wire") if key in last}
    return {**table, **top, "evaluation": {**table.get("evaluation", {}), **last["evaluation"]}, "stages": whole}


def _whole(table: Plain, stage: Plain, number: int) -> dict[str, Any]:
    whole = {key: table[key] for key in WHOLE if key in table}
    for key in BY_KEY:
        own, common = stage.get(key, {}), table.get(key, {})
        replaced = {INSTEAD[name] for name, value in own.items() if name in INSTEAD and value is not None}
        kept = {name: value for name, value in common.items() if name not in replaced - own.keys()}
        whole[key] = {**(_selection(kept) if key == "evaluation" else kept), **own}
    named = {"name": stage.get("name") or f"stage-{number}"}
    return {**whole, **{key: value for key, value in stage.items() if key not in BY_KEY}, **named}


def _selection(evaluation: Plain) -> dict[str, Any]:
    return {key: value for key, value in evaluation.items() if key in SELECTION}


def _used(table: Plain, stages: Sequence[Plain], last: Plain) -> None:
    """ValueError for what every stage says for itself; what is that of the last stage was filled in before."""
    idle = [key for key in WHOLE if all(key in stage for stage in stages) and table.get(key, last[key]) != last[key]]
    for key in BY_KEY:
        for name, value in table.get(key, {}).items():
            if all(name in stage.get(key, {}) for stage in stages) and value != last[key][name]:
                idle.append(f"{key}.{name}")
    if idle:
        raise ValueError(f"{', '.join(idle)} has no effect: every stage has its own; leave it out")
