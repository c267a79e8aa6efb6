"""Composition: the pieces of one run. In: a configuration. Out: backbone, model, task, strategy, handshake.

Refuses, before anything is trained, pairings of tuner, head and strategy that do not fit.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, cast

import numpy as np
import timm
import torch

from consilium import beginning, ranks, registry, stages
from consilium.backbones import compiled, recompute, timm_backbone
from consilium.config import BackboneConfig, Config, agreement_hash
from consilium.engines import pools
from consilium.errors import ConfigError
from consilium.filters.codec import Codec
from consilium.local.prefix import Kept
from consilium.local.train import Setting
from consilium.messages import Handshake, open_message, rows
from consilium.protocols import Backbone, Model, Selector, ServerState, Slot, Specs, Strategy, Tag, Task, Tuner
from consilium.sealing import key_id, read_key
from consilium.sites.store import default_folder
from consilium.strategies.partial import is_top
from consilium.tensors import Tensors, detach
from consilium.tuners import base, compose


@dataclass(frozen=True)
class Experiment:
    """One federated run, at either end of the wire."""

    config: Config
    backbone: Backbone
    model: Model
    task: Task
    strategy: Strategy
    handshake: Handshake
    setting: Setting
    never_stacked: str = ""  # why sites cannot train as one batch, if so
    begins: stages.Left | None = None  # what the stage before left, if there was one
    hung: tuple[stages.Hung, ...] = ()  # adapters in the backbone, of this stage and those before

    def initial(self, seed: int) -> Tensors:
        """Start values for the strategy: all variables and, where it changes the base, the frozen weights."""
        names = self.setting.frozen.keys() - self.frozen.keys() if self.strategy.declares.changes_base else ()
        frozen = {name: self.backbone.module.get_parameter(name) for name in sorted(names)}
        return {**detach(frozen), **self.model.initial(seed)}

    @cached_property
    def frozen(self) -> Specs:
        """What the stages before left and this one does not train."""
        left = self.begins.specs if self.begins is not None else {}
        return {name: spec for name, spec in left.items() if name not in self.model.specs}

    @cached_property
    def still(self) -> Tensors:
        """A frozen head as it was drawn."""
        head = cast(compose.TunedModel, self.model).head_start
        return detach({name: value for name, value in head.items() if name not in self.model.specs})

    @cached_property
    def common(self) -> Tensors:
        """What every site has before anything is sent: shared tensors that start alike whatever the seed."""
        first, other, specs = self.model.initial(0), self.model.initial(1), self.at(None)
        left = self.begins.specs if self.begins is not None else {}
        names = [name for name, spec in self.down(1).items() if spec == specs.get(name) and name not in left]
        return {name: first[name] for name in names if torch.equal(first[name], other[name])}

    def common_at(self, site: str) -> Tensors:
        """The same at the site's own rank."""
        return ranks.cut(self.common, self.at(site))

    def like(self, site: str) -> str | None:
        """None for a site at which all is as it is in the model; the site itself where its adapters are smaller."""
        return site if any(site in part.ranks for part in self.strategy.declares.parts) else None

    def at(self, site: str | None) -> Specs:
        """The model's variables as a site has them, see `ranks.py`; None: at the tuner's rank."""
        declares, specs = self.strategy.declares, self.model.specs
        own = specs if site is None else ranks.at(specs, declares.parts, site)
        return ranks.shrinking(own) if declares.prunes else own

    def send(self, server: ServerState, site: str) -> Tensors:
        """All that a site should know now, at its own rank."""
        return ranks.sent(self.strategy, server, self.model.specs, site)

    @cached_property
    def state_key(self) -> bytes | None:
        """What encrypts the files that sites keep, if anything; ConfigError where it is missing or open to others."""
        return read_key(self.config.engine.state_key_file, self.config.engine.state_key_variable)

    @property
    def state_key_id(self) -> str | None:
        """Which key that is, for comparing and for messages."""
        return key_id(self.state_key) if self.state_key else None

    @cached_property
    def codec(self) -> Codec:
        """How parameters travel; what comes back in another basis keeps nothing of what was lost before."""
        wire = self.config.wire
        return Codec(None if wire.codec == "float32" else wire.codec, wire.error_feedback, self.setting.anew)

    def active(self, round: int, site: str) -> Selector:
        """What is trained in this round at this site: the tuners' choice, and of it what the strategy leaves."""
        chosen, trains = self.model.active(round, site, self.config.draws), self.strategy.declares.trains
        return lambda tag: chosen(tag) and trains(tag, round)

    def sent(self, round: int, site: str) -> Specs:
        """What this site will send in this round: of all that may travel, what it trains."""
        active, known = self.active(round, site), self.model.specs
        return {name: spec for name, spec in self.up(round, site).items() if name not in known or active(spec.tag)}

    def up(self, round: int, site: str | None = None) -> Specs:
        """What may leave a site in this round; ConfigError where the strategy would send what is personal."""
        if self.strategy.declares.once and round < self.config.train.rounds:
            return {}
        found = _impersonal(self.strategy.up(self.at(site), round), self.model.specs, self.strategy)
        return {name: spec for name, spec in found.items() if name not in self.model.never_trained}

    def down(self, round: int, site: str | None = None) -> Specs:
        """What may reach a site in this round; ConfigError where the strategy would send what is personal."""
        return _impersonal(self.strategy.down(self.at(site), round), self.model.specs, self.strategy)

    def wire(self, direction: Literal["up", "down"], round: int, site: str | None = None) -> Specs:
        """The same as it may stand in a message, coded or not."""
        return self.codec.wire(self.up(round, site) if direction == "up" else self.down(round, site))

    def contents(self, direction: Literal["up", "down"], message: bytes) -> list[dict[str, Any]]:
        """What a recorded message holds, a row per tensor: name, shape, dtype, bytes. WireError where it is not whole
        or belongs to another experiment."""
        opened = open_message(message)
        return rows(opened, self.wire(direction, int(opened.fields["round"]), opened.fields["site"]))


def assemble(config: Config, classes: Sequence[str]) -> Experiment:
    """Build every piece of a run, of one with stages the last, for these classes; ConfigError where two pieces do not
    fit together, or a stage cannot follow the one before."""
    left = None
    if len(config.stages) > 1:
        before = assemble(config.at(len(config.stages) - 2), classes)
        left = stages.left_by(before)
        left = stages.merged(left, before) if config.stages[-1].merge else left
    tuners = [registry.build("tuners", table.name, table.options()) for table in config.tuner]
    strategy = registry.build("strategies", config.strategy.name, config.strategy.options())
    return join(config, classes, tuners, strategy, left)


def join(
    config: Config,
    classes: Sequence[str],
    tuners: Sequence[Tuner],
    strategy: Strategy,
    left: stages.Left | None = None,
) -> Experiment:
    """The same with tuners and a strategy in hand, whatever the configuration names, and what a stage begins with."""
    pools.check(config)
    device = pick_device(config.engine.device, config.train.precision)
    task: Task = registry.build("tasks", config.task.name, config.task.options()).with_classes(classes)
    backbone = own_copy(load_backbone(config.backbone, device))
    if config.engine.compile:
        compiled.by_block(backbone.module, device)
    if config.engine.gradient_checkpointing:
        recompute.by_block(backbone.module)
    declares = stages.declared(config, strategy)
    own, earlier, hung = stages.placed(config, tuners, declares, left or stages.Left())
    model = compose.attach(backbone, own, config.head, task.num_outputs, declares, config.draws, earlier)
    if config.start is not None:
        model = replace(model, begin=beginning.values(config.start, model.specs, backbone.digest, classes))
    strategy = stages.continued(strategy, declares, model.specs, left)
    _check_blocks(strategy, backbone, model.specs, where=f"strategy.{config.strategy.name}")
    _check_pairing(config, model.specs, strategy)
    _check_selection(config, task, strategy)
    _check_counts(config, task, model.specs, strategy)
    handshake = Handshake(agreement_hash(config, backbone.digest, classes, backbone.preprocessing), backbone.digest)
    trains, frozen = strategy.declares.trains, _frozen(backbone, model.specs, left or stages.Left())
    factors = {n for n, s in model.specs.items() if s.factor and s.tag.part not in strategy.declares.personal_parts}
    anew = factors if strategy.declares.restarts_factors else set[str]()
    kept = _kept(config, backbone, device)
    setting = Setting(
        model, task, config.train, backbone.preprocessing, config.draws, device, frozen, trains, anew, kept
    )
    alone = _never_stacked(config, device, tuners, strategy)
    there = stages.hanging(model, hung, own)
    made = Experiment(config, backbone, model, task, strategy, handshake, setting, alone, left, there)
    stages.check(made)
    return made


def _never_stacked(config: Config, device: str, tuners: Sequence[Tuner], strategy: Strategy) -> str:
    if config.engine.compile and not device.startswith("cuda"):
        return "on a processor, compiled blocks act on one site at a time (engine.compile)"
    alone = [type(tuner).__name__ for tuner in tuners if not getattr(tuner, "stackable", False)]
    if alone:
        return f"{', '.join(alone)}, with these options, cannot act on several sites in one batch"
    if any(part.ranks for part in strategy.declares.parts) or strategy.declares.prunes:
        return "sites have ranks of their own"
    if len(config.stages) > 1:
        return "what stages before left is different at every site"
    return "the strategy changes frozen weights, which stacked sites share" if strategy.declares.changes_base else ""


def _kept(config: Config, backbone: Backbone, device: str) -> Kept | None:
    """Where prefixes of images are kept, and all that their bits depend on beside images and depth."""
    if not config.engine.prefix_cache:
        return None
    folder = (config.engine.cache or default_folder()) / "prefixes"
    machine = (
        torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    )
    versions = [torch.__version__, timm.__version__, machine, config.engine.threads, config.engine.compile]
    return Kept(folder, json.dumps([backbone.digest, asdict(backbone.preprocessing), versions], sort_keys=True))


def _frozen(backbone: Backbone, specs: Specs, left: stages.Left) -> dict[str, Tag]:
    """Tags of what nobody trains: the rest of the backbone, what products of factors are added to, and what the stages
    before left."""
    slot: Slot = "base"
    own = {name: base.tag(backbone, name, "base") for name in base.parameters(backbone.module) if name not in specs}
    below = {name: spec.tag for spec in specs.values() if spec.factor is not None for name in spec.factor.base}
    still = {name: spec.tag for name, spec in left.specs.items() if name not in specs}
    tags = {**{name: replace(tag, role="offset", part="base") for name, tag in below.items()}, **own, **still}
    return {name: replace(tag, slot=slot) for name, tag in tags.items()}


@lru_cache(maxsize=2)
def _load_backbone(options: str, device: str) -> Backbone:
    found = timm_backbone.load(BackboneConfig.model_validate_json(options))
    found.module.to(device)
    return found


def load_backbone(config: BackboneConfig, device: str = "cpu") -> Backbone:
    """The frozen backbone, read once per process and device; treat it as read-only."""
    return _load_backbone(config.model_dump_json(), device)


def own_copy(backbone: Backbone) -> Backbone:
    """Another module tree over the same frozen weights, so that adapters of one run do not show in another."""
    shared = {id(tensor): tensor for tensor in [*backbone.module.parameters(), *backbone.module.buffers()]}
    return replace(backbone, module=copy.deepcopy(backbone.module, memo=dict(shared)))


def pick_device(wanted: str, precision: str) -> str:
    """ "auto" is the GPU where there is one; ConfigError for a device that is absent or cannot do the precision."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted) is None:
        allowed = "auto, cpu, cuda, cuda:0, ..."
        raise ConfigError("no device of this name", where="engine.device", allowed=allowed, received=wanted)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = found if wanted == "auto" else wanted
    if device.startswith("cuda") and found == "cpu":
        raise ConfigError("no GPU was found", where="engine.device", allowed="auto, cpu", received=wanted)
    if ":" in device and int(device.partition(":")[2]) >= torch.cuda.device_count():
        allowed = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        raise ConfigError("there is no GPU of this number", where="engine.device", allowed=allowed, received=wanted)
    if precision == "float16" and not device.startswith("cuda"):
        allowed = "float32 or bfloat16 on a CPU"
        raise ConfigError("float16 needs a GPU", where="train.precision", allowed=allowed, received=precision)
    return device


def _check_pairing(config: Config, specs: Specs, strategy: Strategy) -> None:
    roles = {spec.tag.role for spec in specs.values()}
    missing = strategy.declares.required_roles - roles
    where = f"strategy.{config.strategy.name}"
    if missing:
        remedy = "choose a tuner (or head.share) that trains tensors of this role, or another strategy"
        raise ConfigError(
            "the strategy needs a role that nothing has",
            where=where,
            allowed=sorted(roles),
            received=f"missing: {sorted(missing)}",
            remedy=remedy,
        )
    for number in range(config.train.rounds + 1):
        for way in (strategy.up, strategy.down):
            _impersonal(way(specs, number), specs, strategy)
    if config.head.share == "shared" and not any(spec.tag.role == "head" for spec in strategy.up(specs, 0).values()):
        remedy = "leave head.share out, or choose a strategy that shares the head"
        raise ConfigError("head.share = 'shared' contradicts the strategy", where=where, remedy=remedy)
    _check_optimizer(config, strategy)
    unknown = set(config.train.learning_rates) - roles
    if unknown:
        raise ConfigError(
            "learning rates for roles that nothing has",
            where="train.learning_rates",
            allowed=sorted(roles),
            received=sorted(unknown),
        )


def _check_optimizer(config: Config, strategy: Strategy) -> None:
    plain = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0, "clip_norm": 0}
    other = {key: getattr(config.train, key) for key, value in plain.items() if getattr(config.train, key) != value}
    if strategy.declares.plain_sgd and other:
        allowed, received = (", ".join(f"{key} = {value}" for key, value in each.items()) for each in (plain, other))
        raise ConfigError("this strategy needs plain SGD", where="train", allowed=allowed, received=received)


def _check_counts(config: Config, task: Task, specs: Specs, strategy: Strategy) -> None:
    leaves = any(strategy.up(specs, number) for number in range(config.train.rounds + 1))
    if task.class_counts == "federation" and not leaves:
        remedy = "use class_counts = 'site', or a strategy that shares something"
        raise ConfigError("class counts would leave sites that share nothing", where="task.class_counts", remedy=remedy)


def _check_blocks(strategy: Strategy, backbone: Backbone, specs: Specs, where: str) -> None:
    last = strategy.declares.last_block
    if last is not None and last >= backbone.num_blocks:
        allowed = f"0 to {backbone.num_blocks - 1} ({backbone.name})"
        raise ConfigError("the backbone has no such block", where=where, allowed=allowed, received=last)
    tags = [spec.tag for spec in specs.values() if spec.tag.role != "head"]
    if last and not any(is_top(tag, last) for tag in tags):
        there = sorted({tag.block for tag in tags if tag.block is not None})
        allowed = f"up to {there[-1]}, the last block in which something is trained" if there else "no block at all"
        what = "nothing that is trained lies from this block on, so the key has no effect"
        raise ConfigError(what, where=where, allowed=allowed, received=last)


def _check_selection(config: Config, task: Task, strategy: Strategy) -> None:
    if config.evaluation.serve == "best" and strategy.declares.once:
        remedy = "use serve = 'last'"
        raise ConfigError("nothing to choose from: the sites send once", where="evaluation.serve", remedy=remedy)
    known = task.validation(np.full((1, len(task.classes)), 1 / len(task.classes)), np.zeros(1, dtype=np.int64))
    choice = strategy.declares.choice
    if choice is not None and choice.select not in known:
        allowed, where = ", ".join(sorted(known)), f"strategy.{config.strategy.name}.select"
        raise ConfigError("no such validation metric", where=where, allowed=allowed, received=choice.select)
    if config.evaluation.serve == "best" and config.evaluation.select not in known:
        allowed, received = ", ".join(sorted(known)), config.evaluation.select
        raise ConfigError("no such validation metric", where="evaluation.select", allowed=allowed, received=received)


def _impersonal(declared: Specs, specs: Specs, strategy: Strategy) -> Specs:
    """The tensors a strategy declares for the wire; what is personal never travels, whatever it declares."""
    kept = strategy.declares.personal_parts
    leaking = [name for name, spec in declared.items() if {spec.tag.part, specs.get(name, spec).tag.part} & kept]
    if leaking:
        where, received = type(strategy).__name__, ", ".join(sorted(leaking)[:4])
        raise ConfigError("the strategy would send personal tensors", where=where, received=received)
    return declared
