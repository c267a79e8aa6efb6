"""Composition: the verb `consilium unseen`. In: the folder of a finished run that held a site out. Out: unseen.json.

The run itself is not touched. What was measured before, with other options, is replaced, and said in the new file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from consilium import checkpoint, results, run, run_folder, surroundings
from consilium.config import Config, from_dict
from consilium.config_unseen import UnseenConfig
from consilium.errors import ConfigError, StateError
from consilium.exchange import Display
from consilium.experiment import assemble
from consilium.progress import one_at_a_time
from consilium.registry import options_error
from consilium.unseen.measure import RESULT, measure, previous


def unseen(folder: Path, changes: Mapping[str, Any] | None = None, display: Display | None = None) -> Path:
    """Measure the held-out sites of a finished run and write its report anew; the path of unseen.json.

    `changes`: keys of [unseen] that differ from the run's own. StateError for a folder that holds no finished run or
    whose data have changed, ConfigError for a run that held no site out or keys that cannot be used.
    """
    folder, show = folder.resolve(), one_at_a_time(display)
    stored = _stored(folder)
    config = _config(stored, changes or {}, folder)
    with run_folder.claimed(folder, resume=True):
        before, wanted = previous(folder / RESULT), config.unseen.model_dump(mode="json") if config.unseen else None
        if before and (before["options"], before["code"]) == (wanted, surroundings.code_digest()):
            return folder / RESULT
        prepared = run.prepare(config, show)
        here = {"data_digest": prepared.data_digest, "split_hash": prepared.split_hash}
        if different := [key for key, value in here.items() if stored[key] != value]:
            remedy = "restore the images and the table of the run, or run it again"
            raise StateError("the data are not those of the run", where=str(folder), received=different, remedy=remedy)
        measure(folder, assemble(config, prepared.classes), prepared, show)
        results.report(folder)
    return folder / RESULT


def _stored(folder: Path) -> dict[str, Any]:
    if not (folder / run_folder.CONFIG).is_file():
        remedy = "give the folder that `consilium run` wrote"
        raise StateError("this is no run folder", where=str(folder), remedy=remedy)
    if not (folder / "result.json").is_file():
        raise StateError("this run is not finished", where=str(folder), remedy="finish it first, with --resume")
    found: dict[str, Any] = checkpoint.read_json(folder / run_folder.CONFIG)
    return found


def _config(stored: Mapping[str, Any], changes: Mapping[str, Any], folder: Path) -> Config:
    config = from_dict(stored["config"])
    if not config.sites.held_out:
        remedy = "run it again with sites.held_out"
        raise ConfigError("this run held no site out", where=str(folder), remedy=remedy)
    if len(config.stages) > 1:
        raise ConfigError("[unseen] is of runs without several stages", where=str(folder))
    own = {} if config.unseen is None else config.unseen.model_dump()
    try:
        options = UnseenConfig.model_validate({**own, **changes})
    except ValidationError as error:
        raise options_error("unseen", error, UnseenConfig) from error
    return config.model_copy(update={"unseen": options})


def curves(path: Path, metric: str = "balanced_accuracy") -> list[dict[str, Any]]:
    """Test numbers of unseen.json, one row per site and k: federation, alone, gain, each with its interval."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    names = {"zero-shot": "federation", "k-shot": "federation", "local k-shot": "alone"}
    names["k-shot - local k-shot"] = "gain over alone"
    for row in checkpoint.read_json(path)["rows"]:
        if (row["split"], row["metric"]) == ("test", metric) and row["model"] in names:
            line = found.setdefault((row["site"], row["shots"]), {"site": row["site"], "k": row["shots"]})
            line[names[row["model"]]] = {key: row[key] for key in ("value", "low", "high")}
    return [found[key] for key in sorted(found)]
