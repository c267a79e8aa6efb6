"""Stage 10, report. In: a run folder. Out: a `Run`: result, events, predictions and split, checked on the way in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from consilium.errors import StateError

if TYPE_CHECKING:
    import pandas as pd


class Plain(BaseModel):
    """A table of a file; keys that the page does not know are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Value(Plain):
    """A number with its 95 % interval; None where undefined. A mean says of how many sites, a worst of which."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    sites: int | None = None
    site: str | None = None


class Entry(Plain):
    """One metric of one model on one split."""

    pooled: Value
    mean: Value
    worst: Value
    per_site: dict[str, Value]


MetricTree = Mapping[str, Entry]


class SplitSize(Plain):
    """Size of one split at one site."""

    n: int = 0
    groups: int | None = None
    classes: dict[str, int] = {}


class SiteSize(Plain):
    """A site's three splits."""

    train: SplitSize = SplitSize()
    val: SplitSize = SplitSize()
    test: SplitSize = SplitSize()


class Direction(Plain):
    """Payload bytes one way."""

    total: int = 0
    per_site: dict[str, int] = {}


class Traffic(Plain):
    """Bytes that crossed the wire; `control` counts the envelopes apart."""

    up: Direction = Direction()
    down: Direction = Direction()
    control: dict[str, int] = {}


class WireTensor(Plain):
    """One named tensor, as declared."""

    name: str
    role: str = ""
    shape: list[int | None] = []
    dtype: str = ""
    bytes: int | None = None


class WireNumber(Plain):
    """A number that leaves a site beside the tensors."""

    name: str
    sent: str = ""
    what: str = ""


class Wire(Plain):
    """Everything that travels, each way."""

    up: list[WireTensor] = []
    down: list[WireTensor] = []


class Metrics(Plain):
    """{model: {metric: entry}} per split."""

    val: dict[str, dict[str, Entry]] = {}
    test: dict[str, dict[str, Entry]] = {}


class Reference(Plain):
    """Training without a federation, for comparison."""

    metrics: Metrics = Metrics()
    image_passes: dict[str, Any] = {}
    seconds: float | None = None


class HeldOut(Plain):
    """Sites that took no part, measured with the global model; or why they could not be."""

    metrics: dict[str, dict[str, Entry]] | None = None
    reason: str = ""


class Harmed(Plain):
    """Sites that did worse than alone; see `metrics.sites_harmed`."""

    metric: str = "balanced_accuracy"
    count: int | None = 0  # None: no site has an interval
    sites: list[str] = []
    undetermined: list[str] = []
    negative: list[str] = []
    difference: dict[str, Value] = {}


class BackboneFacts(Plain):
    """Which frozen weights."""

    name: str = "unknown"
    digest: str = ""
    licence: str = "unknown"
    preprocessing: dict[str, Any] = {}


class Stage(Plain):
    """One stage of a run; rounds are its own."""

    name: str
    rounds: int
    served_round: int | None = None
    parameters: dict[str, int] = {}
    bytes: Traffic = Traffic()
    image_passes: dict[str, Any] = {}
    seconds: float | None = None
    metrics: Metrics = Metrics()


class Visit(Plain):
    """A message that a hospital answered, as its journal has it."""

    time: str = ""
    kind: str = ""
    round: int = 0
    came_in: int = 0
    left: int = 0
    tensors: int = 0
    numbers: int = 0
    blanked: list[str] = []
    refused: str = ""


class JournalFacts(Plain):
    """What a hospital's journal says of one run."""

    lines: int = 0
    hash: str = ""
    visits: list[Visit] = []


Kind = Literal["simulation", "deployment", "site"]
PARTS: Mapping[Kind, tuple[str, ...]] = {
    "simulation": ("mean", "worst", "pooled"),
    "deployment": ("mean", "worst"),  # no image's answer leaves a hospital, so nothing can be pooled
    "site": (),
}


class Result(Plain):
    """result.json; what a run may lack has a default. `kind`: all sites on one machine, across hospitals, or one
    hospital's own."""

    schema_version: Literal[1]
    kind: Kind = "simulation"
    run: str = ""
    name: str
    classes: list[str]
    sites: dict[str, SiteSize]
    metrics: Metrics
    consilium_version: str = ""
    versions: dict[str, Any] = {}
    hardware: dict[str, Any] = {}
    seed: int | None = None
    config_hash: str = ""
    data_digest: str = ""
    agreement_hash: str = ""
    split_hash: str = ""
    backbone: BackboneFacts = BackboneFacts()
    parameters: dict[str, int] = {}
    bytes: Traffic = Traffic()
    wire: Wire = Wire()
    kept_at_site: list[WireTensor] = []
    numbers: list[WireNumber] = []
    seconds: float | None = None
    image_passes: dict[str, Any] = {}
    peak_memory_bytes: int | None = None
    rounds: int = 0
    served_round: int | None = None
    warnings: list[str] = []
    references: dict[str, Reference] = {}
    sites_harmed: Harmed | None = None
    majority: dict[str, dict[str, Entry]] = {}
    held_out: HeldOut | None = None
    stages: list[Stage] = []
    journal: JournalFacts | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """How values of sites are summed up."""
        return PARTS[self.kind]


class _Named(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    name: str


class Settings(BaseModel):
    """What the page reads of the resolved configuration; the rest is printed as it is."""

    model_config = ConfigDict(frozen=True, extra="allow")

    tuner: list[_Named] = []
    strategy: _Named | None = None
    evaluation: dict[str, Any] = {}
    stages: list[Settings] = []


class Stored(Plain):
    """config.json."""

    config: Settings = Settings()
    command: str = "consilium run, with the configuration below as a TOML file"


class SiteEvent(Plain):
    """What a site did in a round."""

    status: str
    late_from: int | None = None  # the round before, which it answered late; its reply counted in this one
    message: str = ""
    seconds: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    val: dict[str, dict[str, float | None]] = {}
    learned: dict[str, float | None] = {}  # numbers of the strategy's own


class Event(Plain):
    """One closed round."""

    round: int
    seconds: float | None = None
    bytes: dict[str, dict[str, int]] = {}
    sites: dict[str, SiteEvent] = Field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A finished run. `predictions` and `split` are None where the folder has none."""

    folder: Path
    result: Result
    stored: Stored
    events: Sequence[Event]
    predictions: pd.DataFrame | None
    split: pd.DataFrame | None


Model = TypeVar("Model", bound=BaseModel)


def load_run(folder: Path) -> Run:
    """Read a run folder; StateError that names the file for what is missing, unreadable or of another schema."""
    path = folder / "result.json"
    if not path.is_file():
        remedy = "give the folder of a finished run; an interrupted one goes on with --resume"
        raise StateError("this is no finished run: there is no result.json", where=str(folder), remedy=remedy)
    result = _result(path)
    config = folder / "config.json"
    return Run(
        folder,
        result,
        parse(Stored, config, text_of(config)) if config.is_file() else Stored(),
        _all_events(folder, result.stages),
        _table(folder / "predictions.parquet", ["split", "model", "site", "id", "group", "label"], result.classes),
        _table(folder / "split.parquet", ["site", "group", "split"], []),
    )


def _result(path: Path) -> Result:
    """result.json; of a run across hospitals with what its summary says."""
    text = text_of(path)
    table = _object(path, text)
    if table.get("kind") != "deployment":
        return parse(Result, path, text)
    from consilium.report.sent import Sent  # which builds on this module

    told, summary = parse(Sent, path, text).told(), path.with_name("summary.json")
    known = _object(summary, text_of(summary)) if summary.is_file() else {}
    return parse(Result, path, json.dumps({**known, **table, **told}))


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StateError("a file of the run folder cannot be read", where=str(path), received=str(error)) from error


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise StateError("a file of the run folder is not valid JSON", where=str(path), received=str(error)) from error
    if not isinstance(value, dict):
        raise StateError("a file of the run folder holds no object", where=str(path), received=type(value).__name__)
    return value


def parse(model: type[Model], path: Path, text: str) -> Model:
    try:
        return model.model_validate(_object(path, text))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        what = f"a file of the run folder does not fit the schema: {key}"
        raise StateError(what, where=str(path), allowed=first["msg"], received=repr(first["input"])[:80]) from error


def _all_events(folder: Path, stages: Sequence[Stage]) -> list[Event]:
    """Of all stages; rounds go on from one to the next."""
    found: list[Event] = []
    for at, stage in enumerate(stages[:-1], start=1):
        before = sum(each.rounds for each in stages[: at - 1])
        own = _events(folder / "stages" / f"{at}-{stage.name}" / "events.jsonl")
        found += [event.model_copy(update={"round": event.round + before}) for event in own]
    before = sum(each.rounds for each in stages[:-1])
    last = _events(folder / "events.jsonl")
    return [*found, *(event.model_copy(update={"round": event.round + before}) for event in last)]


def _events(path: Path) -> list[Event]:
    if not path.is_file():
        return []
    return [parse(Event, path, line) for line in text_of(path).splitlines() if line.strip()]


def _table(path: Path, columns: Sequence[str], classes: Sequence[str]) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    import pandas as pd

    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise StateError("a table of the run folder cannot be read", where=str(path), received=str(error)) from error
    missing = [name for name in [*columns, *(f"p.{label}" for label in classes)] if name not in table.columns]
    if missing:
        raise StateError("a table of the run folder lacks columns", where=str(path), received=missing)
    return table
