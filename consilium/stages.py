"""Composition: what a stage of a run leaves to the next. In: a stage that ended, the next one. Out: its start on disk.

A stage is a run that begins with what the one before ended with. `Left` says, from configurations alone, which tensors
there are, which adapters have to be hung in again, and which tensors all sites have alike; `hand_over` writes the
values into the next stage's folder: to the coordinator what it held, to each site the model that it would use.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from consilium import checkpoint, registry
from consilium.config import Config, TunerConfig
from consilium.continued import COMMON, FROZEN, Continued
from consilium.errors import ConfigError, StateError
from consilium.protocols import (
    Combination,
    Declaration,
    Part,
    Personal,
    ServerState,
    Spec,
    Specs,
    Strategy,
    Tag,
    Tuner,
)
from consilium.sealing import Seal, sealed
from consilium.tensors import Tensors, detach, digest, under
from consilium.tuners import base, compose
from consilium.tuners.placed import Placed

if TYPE_CHECKING:
    from consilium.experiment import Experiment

START, END = "start.safetensors", "end.safetensors"


@dataclass(frozen=True)
class Hung:
    """A tuner that hung adapters into the backbone, and which."""

    table: TunerConfig
    tuner: Tuner
    parts: tuple[Part, ...]
    combination: Combination


@dataclass(frozen=True)
class Left:
    """What a stage leaves: all tensors but those of the backbone that are as they were; `shared`: alike everywhere."""

    specs: Specs = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    hung: tuple[Hung, ...] = ()


# ------------------------------------------------------------------------------------------------ from configurations
def declared(config: Config, strategy: Strategy) -> Declaration:
    """What the strategy says of itself, with the stage's own name for its adapter; ConfigError where it has several."""
    declares, part = strategy.declares, config.stages[-1].part if config.stages else None
    if part is None:
        return declares
    if len(declares.parts) != 1:
        names = ", ".join(each.name for each in declares.parts)
        remedy = "leave part out, or choose a strategy with one adapter"
        what = "the strategy names its adapters itself"
        raise ConfigError(what, where=_where(config, "part"), allowed=names, received=part, remedy=remedy)
    named = replace(declares.parts[0], name=part, personal=declares.parts[0].personal or part == "personal")
    return replace(declares, parts=(named,))


def placed(
    config: Config, tuners: Sequence[Tuner], declares: Declaration, left: Left
) -> tuple[list[Tuner], list[Placed], list[Hung]]:
    """Tuners that hang in adapters of their own; those of earlier stages, beside whose adapters this stage's may hang;
    and all of them together."""
    waiting, own, there, hung = list(left.hung), list[Tuner](), list[Placed](), list[Hung]()
    for table, tuner in zip(config.tuner, tuners, strict=True):
        known = next((each for each in waiting if _goes_with(each, table, declares)), None)
        if known is None:
            own.append(tuner)
            hung.append(Hung(table, tuner, declares.parts, declares.combination))
            continue
        waiting.remove(known)
        rank = _options(table).get("rank")
        added = [replace(part, rank=part.rank or rank) for part in declares.parts if part.name not in _names(known)]
        parts = (*known.parts, *added)
        there.append(Placed(known.tuner, parts, known.combination, frozenset(part.name for part in declares.parts)))
        hung.append(replace(known, parts=parts))
    there += [Placed(each.tuner, each.parts, each.combination) for each in waiting]
    return own, there, [*hung, *waiting]


def _names(hung: Hung) -> set[str]:
    return {part.name for part in hung.parts}


def _options(table: TunerConfig) -> dict[str, Any]:
    return registry.parse_options(registry.get("tuners", table.name), table.options()).model_dump()


def _goes_with(hung: Hung, table: TunerConfig, declares: Declaration) -> bool:
    """Whether a table is of this very tuner; a new adapter may have another rank where no scale depends on it."""
    if (table.name, declares.combination) != (hung.table.name, hung.combination):
        return False
    old, new = _options(hung.table), _options(table)
    if new.get("rank") is not None and new.get("alpha") is None and not _names(hung) & {p.name for p in declares.parts}:
        old["rank"] = new["rank"]
    return old == new


def hanging(model: compose.TunedModel, hung: Sequence[Hung], own: Sequence[Tuner]) -> tuple[Hung, ...]:
    """Without those of this stage's `own` tuners that hung nothing in: what is the backbone's own needs no holder."""
    inside, pairs = base.parameters(model.backbone.module).keys(), zip(model.tuners, model.attached, strict=True)
    nothing = {id(tuner) for tuner, added in pairs if added.specs.keys() <= inside} & {id(tuner) for tuner in own}
    return tuple(each for each in hung if id(each.tuner) not in nothing)


def continued(strategy: Strategy, declares: Declaration, specs: Specs, left: Left | None) -> Strategy:
    """The strategy of this stage, around which everything else stays as it is."""
    if left is None and declares is strategy.declares:
        return strategy
    found = left or Left()
    frozen = found.specs.keys() - specs.keys()
    return Continued(strategy, declares, frozenset(frozen), frozen <= found.shared)


def check(experiment: Experiment) -> None:
    """ConfigError where this stage cannot begin with what the one before left."""
    config, left, specs = experiment.config, experiment.begins, experiment.model.specs
    if left is None:
        return
    _one_model(experiment)
    private = sorted(_travelling(experiment) & left.specs.keys() - left.shared)
    if private:
        raise ConfigError(
            "this stage would share what every site has its own of since the stages before: there is no common start",
            where=_where(config, "strategy"),
            received=private[:3],
            remedy="keep it at the sites here too (head.share = 'personal'), or share it from the first stage on",
        )
    if config.stages[-1].merge and left.specs.keys() - left.shared and _travelling(experiment):
        what = "adapters that every site has of its own make backbones of their own, on which nothing can be shared"
        received = sorted(left.specs.keys() - left.shared)[:3]
        raise ConfigError(what, where=_where(config, "merge"), received=received, remedy="leave merge out")
    changed = sorted(left.specs.keys() & base.parameters(experiment.backbone.module).keys() - specs.keys())
    if changed and experiment.strategy.declares.changes_base:
        what = "the strategy changes the backbone, which an earlier stage changed already"
        raise ConfigError(what, where=_where(config, "strategy"), received=changed[:3], remedy="use it in one stage")
    if changed and any(spec.tag.role == "magnitude" for spec in specs.values()):
        what = "magnitudes start at the norms of the first backbone, which an earlier stage changed"
        raise ConfigError(what, where=_where(config, "tuner"), received="dora", remedy="train them in the first stage")


def _where(config: Config, key: str) -> str:
    return f"stages.{len(config.stages) - 1}.{key} ({config.stages[-1].name})"


def _travelling(experiment: Experiment) -> set[str]:
    """Tensors of the model, or of the backbone, that the coordinator has after the rounds."""
    known = experiment.model.specs.keys() | experiment.setting.frozen.keys()
    rounds = range(1, experiment.config.train.rounds + 1)
    return {name for number in rounds for way in (experiment.up, experiment.down) for name in way(number)} & known


def _one_model(experiment: Experiment) -> None:
    declares, config = experiment.strategy.declares, experiment.config
    if declares.once or declares.pools_images:
        what = "the strategy is no stage among others: sites send once, at its end, or all images are in one place"
        raise ConfigError(what, where=_where(config, "strategy"), received=config.strategy.name)
    if any(part.ranks for part in declares.parts) or declares.prunes:
        what, remedy = "stages have one rank for all sites", "leave ranks of sites out"
        raise ConfigError(what, where=_where(config, "strategy"), received=config.strategy.name, remedy=remedy)


def left_by(experiment: Experiment) -> Left:
    """What the next stage begins with. ConfigError for a strategy after which none can follow."""
    _one_model(experiment)
    before, model = experiment.begins or Left(), experiment.model
    sent, module = _travelling(experiment), experiment.backbone.module
    head = {n: Spec(tuple(v.shape), Tag(n.rpartition(".")[0], "head")) for n, v in experiment.still.items()}
    own = base.parameters(module)
    changed = {n: Spec(tuple(own[n].shape), experiment.setting.frozen[n]) for n in sent - model.specs.keys()}
    specs = {**before.specs, **head, **changed, **model.specs}
    shared = (before.shared - model.specs.keys()) | sent | (head.keys() - before.specs.keys())
    return Left(specs, frozenset(shared), experiment.hung)


def merged(left: Left, experiment: Experiment) -> Left:
    """The same with all adapters folded into the backbone, which has other weights then. The experiment is used up.

    ConfigError where there is nothing to fold, or algebra forbids it.
    """
    where = f"stages.{len(experiment.config.stages)}.merge"
    inside = {name: spec for name, spec in left.specs.items() if not name.startswith("head.")}
    if not inside:
        raise ConfigError("the stages before left nothing to merge", where=where, received=True)
    nothing = {name: torch.zeros([size or 0 for size in spec.shape], dtype=spec.dtype) for name, spec in inside.items()}
    changed = folded(experiment, nothing)
    specs = {n: Spec(tuple(value.shape), base.tag(experiment.backbone, n, "base")) for n, value in changed.items()}
    rest = {name: spec for name, spec in left.specs.items() if name not in inside}
    alike = specs.keys() if inside.keys() <= left.shared else ()
    return Left({**rest, **specs}, left.shared & rest.keys() | frozenset(alike))


def folded(experiment: Experiment, variables: Tensors) -> dict[str, Tensor]:
    """The backbone's own tensors that change when `variables` are folded into them. The experiment is used up."""
    before = base.parameters(experiment.backbone.module)
    compose.merge(cast(compose.TunedModel, experiment.model), variables)
    after = base.parameters(experiment.backbone.module)
    return detach({name: value for name, value in after.items() if value is not before.get(name)})


# ------------------------------------------------------------------------------------------------ on disk
def start(folder: Path, experiment: Experiment, site: str | None = None) -> Tensors:
    """What the folder of the coordinator, or of a site, begins with; nothing in a first stage. StateError where it is
    lost."""
    if experiment.begins is None:
        return {}
    found, meta = checkpoint.load(folder / START, _seal("start", experiment, site))
    if meta["agreement"] != experiment.handshake.agreement:
        raise StateError("this start belongs to another run", where=str(folder / START), received=meta["agreement"])
    return found


def _seal(what: Literal["model", "start"], experiment: Experiment, site: str | None) -> Seal | None:
    return None if site is None else sealed(what, experiment.state_key, experiment.handshake.agreement, site)


def _served(path: Path, experiment: Experiment) -> Tensors:
    return checkpoint.load(path, _seal("model", experiment, path.parent.name))[0]


def frozen(folder: Path, experiment: Experiment) -> Personal:
    """What is frozen, as far as the coordinator has it, in the place where a site keeps it."""
    found = start(folder, experiment)
    return Personal(under(FROZEN, {name: found[name] for name in sorted(experiment.frozen.keys() & found.keys())}))


def close(folder: Path, experiment: Experiment, server: ServerState, ends: bool) -> None:
    """Make sure that what this stage does not train has the bits it had, and write what the coordinator ends with,
    unless it `ends` the run. StateError that names the site and the tensor.
    """
    for served in sorted((folder / "sites").glob("*/served.safetensors")) if experiment.begins else ():
        had, has = start(served.parent, experiment, served.parent.name), _served(served, experiment)
        changed = [n for n in sorted(experiment.frozen) if n not in has or not same_bits(had[n], has[n])]
        if changed:
            what = "a stage changed what it should have left as it was"
            raise StateError(what, where=str(served), received=changed[:3], remedy="report this as an error")
    if ends:
        return
    held = {**experiment.still, **start(folder, experiment), **server.memory, **server.shared}
    ended = {name: held[name] for name in left_by(experiment).shared}
    checkpoint.save(folder / END, detach(ended), {"agreement": experiment.handshake.agreement})


def hand_over(before: Place, after: Place, guests: Collection[str] = ()) -> None:
    """Write what a stage begins with: into its folder what the coordinator has, into each site's folder its own model;
    `guests` get what all have alike. It may be interrupted, and done again.
    """
    if (after.folder / START).is_file():
        return
    left, meta = after.experiment.begins or Left(), {"agreement": after.experiment.handshake.agreement}
    known = _end(before)
    merges = after.experiment.config.stages[-1].merge
    alike = left.specs.keys() - left.shared <= {name for name in left.specs if name.startswith("head.")}
    one = _folded(before, known) if merges and alike else {}  # the same backbone for all
    common = {name: value for name, value in {**known, **one}.items() if name in left.shared}
    for path in sorted((before.folder / "sites").glob("*/served.safetensors")):
        served = {**before.experiment.still, **known, **_served(path, before.experiment)}
        if beside := sorted(name for name in served if "/" in name):
            what = "the model that a site uses is more than tensors of the model, so no stage can follow"
            raise StateError(what, where=str(path), received=beside[:3], remedy="make this the last stage")
        held = {**served, **(_folded(before, served) if merges and not alike else one)}
        own = {name: held[name] for name in left.specs}
        other = {name: value for name, value in common.items() if not same_bits(value, own[name])}
        site, seal = path.parent.name, _seal("start", after.experiment, path.parent.name)
        checkpoint.save(after.folder / "sites" / site / START, {**own, **under(COMMON, other)}, meta, seal)
    for site in guests:
        seal = _seal("start", after.experiment, site)
        checkpoint.save(after.folder / "held_out" / "sites" / site / START, common, meta, seal)
    checkpoint.save(after.folder / START, common, meta)


@dataclass(frozen=True)
class Place:
    """A stage and its folder."""

    folder: Path
    experiment: Experiment


def _end(place: Place) -> Tensors:
    found, meta = checkpoint.load(place.folder / END)
    if meta["agreement"] != place.experiment.handshake.agreement:
        raise StateError("this stage belongs to another run", where=str(place.folder), received=meta["agreement"])
    return found


def _folded(before: Place, variables: Tensors) -> Tensors:
    """The weights of a backbone into which these are folded."""
    from consilium.experiment import assemble  # which asks this module what a stage begins with

    again = assemble(before.experiment.config, before.experiment.task.classes)
    return folded(again, {name: value for name, value in variables.items() if not name.startswith("head.")})


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the last bit, zeros of either sign and NaN included."""
    return one.dtype == other.dtype and one.shape == other.shape and digest(one) == digest(other)


# ------------------------------------------------------------------------------------------------ the stages of a run
def steps(config: Config, out: Path) -> list[tuple[Config, Path]]:
    """Configuration and folder of every stage; the last one's is the run's own, as of a run without stages."""
    count = max(len(config.stages), 1)
    if count == 1:
        return [(config, out)]
    folders = [out / "stages" / f"{at}-{stage.name}" for at, stage in enumerate(config.stages, start=1)]
    return [(config.at(number), (*folders[:-1], out)[number]) for number in range(count)]
