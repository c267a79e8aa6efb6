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

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from consilium import config_file, paths, registry
from consilium.config_engine import EngineConfig
from consilium.config_unseen import UnseenConfig
from consilium.data import Preprocessing
from consilium.errors import ConfigError
from consilium.registry import Options, options_error

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


def changed(model: BaseModel) -> set[str]:
    """Keys whose value is not the default; unlike pydantic's set fields it survives writing out and reading again."""
    return {name for name, field in type(model).model_fields.items() if getattr(model, name) != field.default}


class Partition(Options):
    """How a set becomes a federation; a group is never divided."""

    kind: Literal["natural", "iid", "dirichlet", "quantity"] = "natural"
    num_sites: int | None = Field(default=None, ge=1)
    alpha: float | None = Field(default=None, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _complete(self) -> Partition:
        needed = {
            "natural": set(),
            "iid": {"num_sites"},
            "dirichlet": {"num_sites", "alpha"},
            "quantity": {"num_sites"},
        }
        optional = {"quantity": {"alpha"}}.get(self.kind, set())
        given = {key for key in ("num_sites", "alpha") if getattr(self, key) is not None}
        if not needed[self.kind] <= given or not given <= needed[self.kind] | optional:
            raise ValueError(
                f"partition kind {self.kind!r} takes {sorted(needed[self.kind] | optional) or 'no numbers'}"
            )
        if self.kind == "natural" and "seed" in changed(self):
            raise ValueError("partition kind 'natural' draws nothing, so a seed has no effect")
        return self


class Split(Options):
    """Shares of train, val and test by group; or a column of the table; or a file written by `consilium data split`."""

    train: float = Field(default=0.7, ge=0, le=1)  # share of the groups of a site
    val: float = Field(default=0.1, ge=0, le=1)
    test: float = Field(default=0.2, ge=0, le=1)
    seed: int = 0  # of the draw
    column: str | None = None  # of the table, that says train, val or test
    file: Path | None = None  # written by `consilium data split`

    @model_validator(mode="after")
    def _whole(self) -> Split:
        if abs(self.train + self.val + self.test - 1) > 1e-9:
            raise ValueError("train + val + test must be 1")
        if self.column and self.file:
            raise ValueError("a split comes from a column or from a file, not both")
        if (self.column or self.file) and changed(self) & {"train", "val", "test", "seed"}:
            raise ValueError("shares and seed have no effect beside a given column or file")
        return self


class _Member(BaseModel):
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

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.local_epochs is not None and self.local_steps is not None:
            raise ValueError("give local_epochs or local_steps, not both")
        if self.optimizer != "sgd" and "momentum" in changed(self):
            raise ValueError("momentum has an effect with optimizer = 'sgd' only")
        if self.learning_rate is not None and "learning_rate_factor" in changed(self):
            raise ValueError("learning_rate_factor is of the tuners' presets, which learning_rate replaces")
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


class EvaluationConfig(Options):
    """What is measured and compared."""

    references: tuple[Literal["local", "pooled"], ...] = ()
    serve: Literal["last", "best"] = "last"
    select: str = "balanced_accuracy"  # validation metric for serve = "best"
    bootstrap: int = Field(default=1000, ge=0)
    every: int = Field(default=1, ge=1)  # rounds between validations

    @model_validator(mode="after")
    def _selects(self) -> EvaluationConfig:
        if self.serve != "best" and "select" in changed(self):
            raise ValueError("select has an effect with serve = 'best' only")
        return self


def _one_or_many(value: object) -> object:
    """A table, a name, or several of either: `tuner = ["lora", "prompts"]`."""
    many = value if isinstance(value, (list, tuple)) else [value]
    return [{"name": each} if isinstance(each, str) else each for each in many]


class Config(BaseModel):
    """A run as a value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "quick-start"  # names the run folder too
    seed: int = Field(default=0, ge=0)
    sites: SitesConfig = SitesConfig()
    task: TaskConfig = TaskConfig()
    backbone: BackboneConfig = BackboneConfig()
    tuner: Annotated[tuple[TunerConfig, ...], BeforeValidator(_one_or_many), Field(min_length=1)] = (TunerConfig(),)
    head: HeadConfig = HeadConfig()
    strategy: StrategyConfig = StrategyConfig()
    train: TrainConfig = TrainConfig()
    wire: WireConfig = WireConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    unseen: UnseenConfig | None = None  # a table, be it empty: measure sites.held_out with a few images of their own
    engine: EngineConfig = EngineConfig()

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
        rounds, every = self.train.rounds, self.evaluation.every
        if self.evaluation.serve == "best" and every > rounds:  # only the last round would be validated
            raise ValueError(f"serve = 'best' has nothing to choose from with every = {every} of {rounds} rounds")
        return self

    @model_validator(mode="after")
    def _somebody_is_unseen(self) -> Config:
        if self.unseen is not None and not self.sites.held_out:
            raise ValueError("[unseen] has an effect with sites.held_out only")
        return self

    def members(self) -> list[tuple[registry.Kind, str, _Member]]:
        """(kind, name, table) of every registered member this run uses."""
        tuners: list[tuple[registry.Kind, str, _Member]] = [("tuners", t.name, t) for t in self.tuner]
        return [
            ("sources", self.sites.source, self.sites),
            ("tasks", self.task.name, self.task),
            *tuners,
            ("strategies", self.strategy.name, self.strategy),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of every key, defaults filled in for the members too."""
        plain: dict[str, Any] = self.model_dump(mode="json")
        targets = [plain["sites"], plain["task"], *plain["tuner"], plain["strategy"]]
        for (kind, name, table), target in zip(self.members(), targets, strict=True):
            options = registry.parse_options(registry.get(kind, name), table.options())
            target.update(options.model_dump(mode="json"))
        return plain


AGREED = (
    "seed",
    "task",
    "tuner",
    "head",
    "strategy",
    "train",
    "wire",
)  # what all sites must share, beside the backbone's digest
NO_EFFECT = ("workers", "pool", "cache", "gradient_checkpointing", "state_key_file", "state_key_variable")  # of engine


def agreement_hash(config: Config, backbone_digest: str, classes: Sequence[str], preprocessing: Preprocessing) -> str:
    """Hash of what all sites must share; checked on the wire."""
    plain = config.to_dict()
    agreed = {key: plain[key] for key in AGREED}
    return _hash({**agreed, "backbone": backbone_digest, "classes": list(classes), "image": asdict(preprocessing)})


def config_hash(config: Config, backbone_digest: str, preprocessing: Preprocessing) -> str:
    """Hash of the whole configuration, without the engine keys that cannot change a result (workers, cache)."""
    plain = config.to_dict()
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
    return options_error("configuration", error, _model_at(first["loc"]))


def _model_at(location: Sequence[int | str]) -> type[BaseModel]:
    model: type[BaseModel] = Config
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        kind = field.annotation if field is not None else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            break
        model = kind
    return model
