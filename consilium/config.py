"""Stage 0, config. In: a TOML file and `--set` overrides. Out: one frozen, validated, hashed `Config`.

An unknown key is an error. Options of a source, tuner, strategy or task are validated by that member's own model, so
that a new member brings its own keys. Relative paths are relative to the configuration file.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from consilium import config_file, config_stages, paths, registry, seeds
from consilium.config_engine import EngineConfig
from consilium.config_sites import Partition, Split
from consilium.config_sites import changed as changed
from consilium.config_unseen import UnseenConfig
from consilium.data import Preprocessing
from consilium.errors import ConfigError
from consilium.registry import Options, model_at, options_error

Factor = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class _Member(registry.Table):
    """A table whose `name` picks a registered member; all further keys are that member's options."""

    model_config = ConfigDict(frozen=True, extra="allow")
    registered: ClassVar[tuple[registry.Kind, str]]  # kind, and the key that holds the member's name

    def options(self) -> dict[str, object]:
        """The member's own options, as written."""
        return dict(self.model_extra or {})


class SitesConfig(_Member):
    """Where the hospitals' images are and how they are divided."""

    registered = ("sources", "source")
    source: str = "phantom"
    partition: Partition = Partition()
    split: Split = Split()
    held_out: tuple[str, ...] = ()  # sites that take no part and are measured afterwards; see [unseen]
    only: str | None = None  # the rows of this site alone; of a table without sites, all rows: they are this site's
    tolerate_corrupt: float = Field(default=0.0, ge=0, lt=1)  # largest share of unreadable images that is dropped


class TaskConfig(_Member):
    """What is learnt."""

    registered = ("tasks", "name")
    name: str = "classification"
    classes: tuple[str, ...] | None = None


class BackboneConfig(Options):
    """Which pre-trained model; the file's own preprocessing is used unless it is overridden here."""

    name: str = "embedded"
    weights: Literal["random", "embedded"] | Path | None = None  # None: the model hub; random: seed 0, always
    image_size: int | None = Field(default=None, ge=8)
    mean: tuple[float, float, float] | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    crop_fraction: float | None = Field(default=None, gt=0, le=1)
    crop_mode: Literal["center", "squash", "border"] | None = None


class TunerConfig(_Member):
    """One tuner; several tables make a hybrid."""

    registered = ("tuners", "name")
    name: str = "lora"


class HeadConfig(Options):
    """The classifier on top."""

    kind: Literal["linear", "mlp"] = "linear"
    hidden: int = Field(default=256, ge=1)  # mlp only: width of the layer between
    share: Literal["shared", "personal", "frozen"] | None = (
        None  # None: shared, unless the strategy keeps it at the site
    )

    @model_validator(mode="after")
    def _width(self) -> HeadConfig:
        if self.kind != "mlp" and "hidden" in changed(self):
            raise ValueError("hidden has an effect with kind = 'mlp' only")
        return self


class StrategyConfig(_Member):
    """The federated algorithm."""

    registered = ("strategies", "name")
    name: str = "fedavg"


class Schedule(Options):
    """Learning-rate factor over the whole federation, not restarted every round unless `restart`."""

    name: Literal["constant", "cosine", "linear", "one_cycle"] = "cosine"
    warmup: float | None = Field(default=None, ge=0, lt=1)  # share of the steps that rise; None: 0.05, one_cycle 0.3
    restart: bool = False


class TrainConfig(Options):
    """Local training and rounds."""

    rounds: int = Field(default=10, ge=1)
    local_epochs: float | None = Field(default=None, gt=0)
    local_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=32, ge=1)
    accumulate: int = Field(default=1, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive | None = None  # None: the tuner's preset per role, for adamw; sgd needs one
    learning_rates: dict[str, Positive] = Field(default_factory=dict)  # by role
    learning_rate_factor: Positive = 1.0  # of the tuners' presets; not of a head that is trained beside a tuner
    weight_decay: float = Field(default=0.01, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # sgd only
    moments: Literal["reset", "keep"] = "reset"
    schedule: Schedule = Schedule()
    clip_norm: float = Field(default=1.0, ge=0)  # of the whole gradient; 0: no clipping
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    augmentation: Literal["none", "dermoscopy", "radiograph"] = "none"
    participation: Fraction = 1.0  # share of the sites drawn in each round
    quorum: Fraction = 1.0  # share of the drawn sites that must reply
    refuse_longer: Factor = 100.0  # times a round's median update: a longer one is refused by its site's name; 0: never

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("give local_epochs or local_steps, not both")
        if self.optimizer != "sgd" and "momentum" in changed(self):
            raise ValueError("momentum has an effect with optimizer = 'sgd' only")
        if self.learning_rate is not None and "learning_rate_factor" in changed(self):
            raise ValueError("learning_rate_factor is of the tuners' presets, which learning_rate replaces")
        if 0 < self.refuse_longer < 1:
            raise ValueError("refuse_longer is 0, or at least 1: nothing is longer than itself")
        if self.optimizer == "sgd" and self.learning_rate is None:
            raise ValueError("the tuners' own rates are for adamw: give a learning_rate with optimizer = 'sgd'")
        return self


class WireConfig(Options):
    """How trained parameters travel, in both directions."""

    codec: Literal["float32", "bfloat16", "int8"] = "float32"  # as they are; or differences in 1/2 or 1/4 of the bytes
    error_feedback: bool = Field(
        default=True, strict=True
    )  # what a codec loses is added to the next message; of bfloat16 and int8

    @model_validator(mode="after")
    def _loses(self) -> WireConfig:
        if self.codec == "float32" and "error_feedback" in changed(self):
            raise ValueError("error_feedback has an effect with codec = 'bfloat16' or 'int8' only")
        return self


class SelectionConfig(Options):
    """Which round is served."""

    serve: Literal["last", "best"] = "last"
    select: str = "balanced_accuracy"  # validation metric for serve = "best"
    every: int = Field(default=1, ge=1)  # rounds between validations

    @model_validator(mode="after")
    def _selects(self) -> SelectionConfig:
        if self.serve != "best" and "select" in changed(self):
            raise ValueError("select has an effect with serve = 'best' only")
        return self


class EvaluationConfig(SelectionConfig):
    """What is measured and compared."""

    references: tuple[Literal["local", "pooled"], ...] = ()
    bootstrap: int = Field(default=1000, ge=0)


def _one_or_many(value: object) -> object:
    """A table, a name, or several of either: `tuner = ["lora", "prompts"]`."""
    many = value if isinstance(value, (list, tuple)) else [value]
    return [{"name": each} if isinstance(each, str) else each for each in many]


Tuners = Annotated[tuple[TunerConfig, ...], BeforeValidator(_one_or_many), Field(min_length=1)]


class StageConfig(Options):
    """A stage of a run, which begins with what the one before ended with, whose other tensors stay: docs/stages.md."""

    name: str = Field(pattern=r"^\w[\w -]*$")  # names a folder too; left out: stage-1, stage-2, ...
    part: str | None = Field(default=None, pattern=r"^[a-z_]\w*$")  # the tuners add adapters of this name, beside those
    merge: bool = Field(default=False, strict=True)  # adapters of the stages before are folded into the backbone first
    tuner: Tuners = (TunerConfig(),)
    head: HeadConfig = HeadConfig()
    strategy: StrategyConfig = StrategyConfig()
    train: TrainConfig = TrainConfig()
    wire: WireConfig = WireConfig()
    evaluation: SelectionConfig = SelectionConfig()


class Config(registry.Table):
    """A run as a value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "quick-start"  # names the run folder too
    seed: int = Field(default=0, ge=0)
    start: Path | None = None  # folder of `merge` or `export --format safetensors` that shared tensors begin with
    stages: tuple[StageConfig, ...] = ()  # the last one's tables become the configuration's own: its errors come after
    sites: SitesConfig = SitesConfig()
    task: TaskConfig = TaskConfig()
    backbone: BackboneConfig = BackboneConfig()
    tuner: Tuners = (TunerConfig(),)
    head: HeadConfig = HeadConfig()
    strategy: StrategyConfig = StrategyConfig()
    train: TrainConfig = TrainConfig()
    wire: WireConfig = WireConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    unseen: UnseenConfig | None = None  # a table, be it empty: measure sites.held_out with a few images of their own
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="before")
    @classmethod
    def _whole_stages(cls, table: Any) -> Any:
        return config_stages.filled(table)

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if all(sign == "." or sign.isspace() for sign in name) or "/" in name or "\\" in name:
            raise ValueError("a name that can be a folder's: no slash, and not only dots and blanks")
        return name

    @model_validator(mode="after")
    def _members_exist(self) -> Config:
        for kind, name, table in self.members():
            registry.parse_options(registry.get(kind, name), table.options())
        return self

    @model_validator(mode="after")
    def _several_to_choose_from(self) -> Config:
        for each in self.stages or (self,):
            rounds, every = each.train.rounds, each.evaluation.every
            if each.evaluation.serve == "best" and every > rounds:  # only the last round would be validated
                raise ValueError(f"serve = 'best' has nothing to choose from with every = {every} of {rounds} rounds")
        return self

    @model_validator(mode="after")
    def _starts_once(self) -> Config:
        if self.start is not None and len(self.stages) > 1:
            raise ValueError("start and several [[stages]] do not go together: a stage starts where the last one ended")
        return self

    @model_validator(mode="after")
    def _somebody_is_unseen(self) -> Config:
        if self.unseen is not None and (not self.sites.held_out or len(self.stages) > 1):
            raise ValueError("[unseen] has an effect with sites.held_out, and without several [[stages]], only")
        return self

    @model_validator(mode="after")
    def _stages_follow(self) -> Config:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages have names of their own, not {', '.join(names)}")
        if self.stages and self.stages[0].merge:
            raise ValueError("there is nothing to merge before the first stage")
        heads = {(stage.head.kind, stage.head.hidden) for stage in self.stages}
        if len(heads) > 1:
            raise ValueError("all stages have one head: kind and hidden belong into the configuration's own [head]")
        return self

    @property
    def draws(self) -> int:
        """The seed of all that is drawn: that of the run, from the second stage on with its number."""
        at = len(self.stages)
        return self.seed if at < 2 else seeds.derive(self.seed, purpose=f"stage {at}")

    @property
    def title(self) -> str:
        """The name, and that of the stage."""
        return f"{self.name}, stage {self.stages[-1].name}" if self.stages else self.name

    def at(self, number: int) -> Config:
        """The run up to its stage of this number, from 0."""
        stage = self.stages[number]
        tables = {key: getattr(stage, key) for key in ("tuner", "head", "strategy", "train", "wire")}
        evaluation = self.evaluation.model_copy(update=stage.evaluation.model_dump())
        return self.model_copy(update={**tables, "evaluation": evaluation, "stages": self.stages[: number + 1]})

    def members(self) -> list[tuple[registry.Kind, str, _Member]]:
        """(kind, name, table) of every registered member this run uses."""
        common: list[tuple[registry.Kind, str, _Member]] = [
            ("sources", self.sites.source, self.sites),
            ("tasks", self.task.name, self.task),
        ]
        each: list[Config | StageConfig] = [self, *self.stages]
        return [*common, *(member for one in each for member in _learners(one))]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of every key, defaults filled in for the members too."""
        plain: dict[str, Any] = self.model_dump(mode="json")
        learners = (target for each in (plain, *plain["stages"]) for target in (*each["tuner"], each["strategy"]))
        targets = [plain["sites"], plain["task"], *learners]
        for (kind, name, table), target in zip(self.members(), targets, strict=True):
            options = registry.parse_options(registry.get(kind, name), table.options())
            target.update(options.model_dump(mode="json"))
        return plain


def _learners(config: Config | StageConfig) -> list[tuple[registry.Kind, str, _Member]]:
    tuners: list[tuple[registry.Kind, str, _Member]] = [("tuners", t.name, t) for t in config.tuner]
    return [*tuners, ("strategies", config.strategy.name, config.strategy)]


AGREED = (
    "seed",
    "task",
    "tuner",
    "head",
    "strategy",
    "train",
    "wire",
    "stages",
)  # what all sites must share, beside the backbone's digest
NO_EFFECT = ("workers", "pool", "cache", "gradient_checkpointing", "state_key_file", "state_key_variable")  # of engine


def agreement_hash(config: Config, backbone_digest: str, classes: Sequence[str], preprocessing: Preprocessing) -> str:
    """Hash of what all sites must share; checked on the wire."""
    plain = config.to_dict()
    agreed = {key: plain[key] for key in AGREED} | {"start": config_file.digest_of_start(config.start)}
    return _hash({**agreed, "backbone": backbone_digest, "classes": list(classes), "image": asdict(preprocessing)})


def config_hash(config: Config, backbone_digest: str, preprocessing: Preprocessing) -> str:
    """Hash of the whole configuration, without the engine keys that cannot change a result (workers, cache)."""
    plain = config.to_dict() | {"start": config_file.digest_of_start(config.start)}
    plain["engine"] = {key: value for key, value in plain["engine"].items() if key not in NO_EFFECT}
    return _hash({**plain, "backbone_digest": backbone_digest, "image": asdict(preprocessing)})


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file (None: the quick start), apply `a.b=value` overrides, make paths absolute, validate.

    Raises ConfigError with key, allowed and received for anything that is not understood.
    """
    table = config_file.read(path) if path is not None else quick_start()
    for override in overrides:
        config_file.override(table, override)
    return from_dict(table, base=path.resolve().parent if path is not None else Path.cwd())


def quick_start() -> dict[str, Any]:
    """The configuration of `consilium run` without a file."""
    text = (Path(__file__).parent / "quick_start.toml").read_text()
    return tomllib.loads(text)


def from_dict(table: Mapping[str, Any], base: Path | None = None) -> Config:
    """Validate a plain table; relative paths are relative to `base`."""
    try:
        return Config.model_validate(paths.absolute(table, Config, base or Path.cwd()))
    except ValidationError as error:
        raise _config_error(error) from error


def _config_error(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    return options_error("configuration", error, model_at(Config, first["loc"]))
