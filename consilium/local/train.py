"""Stage 4, local training: the only training loop. In: variables, a site's training split. Out: trained variables.

What is minimised is a function, so no strategy has a loop, a device or an optimiser. Every draw (order, augmentation,
dropout) comes from (run seed, round, site, purpose). Optimiser moments start at zero in every round unless kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from consilium import seeds
from consilium.config import TrainConfig
from consilium.data import Batch, Examples, IntArray, Preprocessing
from consilium.errors import TrainingError
from consilium.local.augment import PRESETS, normalise, to_float
from consilium.local.predict import Prefix, autocast, moments_of_inputs, pooled_features, read
from consilium.local.prefix import Fit, Kept, Pixels, Prefixes
from consilium.local.schedule import factor, federation_progress
from consilium.local.seats import Seat
from consilium.protocols import Fitted, Model, Objective, Selector, Specs, Tag, Task, Trains
from consilium.tensors import Tensors, detach, onto

FALLBACK_LEARNING_RATE = 1e-3  # for variables that are not the model's, such as mixing weights


@dataclass(frozen=True)
class Setting:
    """All that does not change from round to round and from site to site."""

    model: Model
    task: Task
    config: TrainConfig
    preprocessing: Preprocessing
    seed: int
    device: str = "cpu"
    frozen: Mapping[str, Tag] = field(
        default_factory=dict
    )  # weights of the backbone that are no variables of the model
    trains: Trains = lambda tag, round: True  # what the strategy leaves trained  # noqa: ARG005
    anew: Set[str] = frozenset()  # what the strategy sends back in another basis: old moments say nothing of it
    kept: Kept | None = None  # where prefixes are kept; None: everything is computed from the images
    go_on: Callable[[], None] = lambda: None  # called before every batch; raises where a run has ended meanwhile

    def prefixes(self) -> Prefixes | None:
        """A place for the prefixes of one site while it answers one request."""
        if self.kept is None:
            return None
        return Prefixes(self.model, self.preprocessing, self.device, self.kept, self.go_on)


@dataclass(frozen=True)
class Trainer:
    """`protocols.LocalTraining` for one site in one round. `moments`: the optimiser's state, in and out, by purpose."""

    setting: Setting
    examples: Examples
    round: int
    site: str
    class_counts: Sequence[int]
    moments: dict[str, Tensor] = field(default_factory=dict)
    prefixes: Prefixes | None = None
    seat: Seat | None = None  # where it waits for the sites that it is stacked with

    @property
    def specs(self) -> Specs:
        """The model's variables."""
        return self.setting.model.specs

    @property
    def num_examples(self) -> int:
        """Training images at this site."""
        return len(self.examples)

    def active(self, tag: Tag) -> bool:
        """Whether the tuners train this tensor in this round at this site, and the strategy leaves it trained."""
        chosen = self.setting.model.active(self.round, self.site, self.setting.seed)
        return chosen(tag) and self.setting.trains(tag, self.round)

    def loss(self, variables: Tensors, batch: Batch) -> Tensor:
        """The task's loss on a batch."""
        prefix, model = None if self.prefixes is None else self.prefixes.of_batch(variables, batch), self.setting.model
        found = Prefix(batch.images, 0) if prefix is None else prefix
        forward = model.forward if self.seat is None else self.seat.forward
        outputs = forward(variables, found.tokens, found.depth)
        return self.setting.task.loss(outputs.float(), batch.labels, self.class_counts)

    def watch(self, modules: Collection[str]) -> AbstractContextManager[Tensors]:
        """What enters these modules of the backbone in a `loss`, and under "" the pooled features."""
        prefixes = self.prefixes if modules else None  # pooled features come out of a cached prefix too
        watch = self.setting.model.watch(modules) if prefixes is None else prefixes.watch(modules)
        return watch if self.seat is None else self.seat.alone(watch)

    def features(self, variables: Tensors) -> tuple[Tensor, Tensor]:
        """Features [n, num_features] and labels [n] of the training split, without augmentation."""
        setting = self.setting
        kept = None
        if self.prefixes is not None:
            kept = self.prefixes.split(variables, self.examples, self.prefixes.lasting, "float32")
        model, device = setting.model, setting.device
        found = pooled_features(model, variables, self.examples, setting.preprocessing, device, kept)
        return found, torch.from_numpy(self.examples.labels)

    def second_moments(self, variables: Tensors, modules: Collection[str]) -> Tensors:
        """Mean of x x^T over the tokens that enter these modules; nothing at no images."""
        setting, device = self.setting, self.setting.device
        return moments_of_inputs(setting.model, variables, modules, self.examples, setting.preprocessing, device)

    def gradient(self, variables: Tensors) -> Tensors:
        """Mean gradient over the training split of what is active, augmented, in full precision; nothing at no images.
        TrainingError where it is not finite."""
        names, count = self._selected(variables, None), len(self.examples)
        if not names or not count:
            return {}
        live = {name: value.detach().to(self.setting.device, copy=True) for name, value in variables.items()}
        for name in names:
            live[name].requires_grad_().grad = torch.zeros_like(live[name])
        steps = plan(count, self.setting.config, 1.0, self._generator("gradient", "order"))
        batches = self._batches([rows for step in steps for rows in step], self._generator("gradient", "augment"))
        losses = []
        with seeds.ambient(self._seed("gradient", "dropout")):
            for batch in batches:
                loss = self.loss(live, batch) * (len(batch.labels) / count)
                (torch.autograd.backward if self.seat is None else self.seat.backward)(loss)
                losses.append(loss.detach())
        self._finite(float(torch.stack(losses).sum()))
        return detach({name: value for name in names if (value := live[name].grad) is not None})

    def fit(
        self,
        variables: Tensors,
        *,
        objective: Objective | None = None,
        only: Selector | None = None,
        fixed: Tensors | None = None,
        epochs: float | None = None,
        learning_rate: float | None = None,
        after_step: Callable[[Tensors], Tensors] | None = None,
        purpose: str = "train",
    ) -> Fitted:
        """Train the selected variables, of the frozen weights only what `only` selects; all others keep their bits.
        TrainingError where the loss is not finite."""
        steps = plan(len(self.examples), self.setting.config, epochs, self._generator(purpose, "order"))
        names = self._selected(variables, only)
        if not names or not steps:
            return Fitted(dict(variables), math.nan, 0, 0, {})
        rates = self._learning_rates(names) if learning_rate is None else dict.fromkeys(names, learning_rate)
        decays = self._decays(names, copies=learning_rate is None)
        with seeds.ambient(self._seed(purpose, "dropout")):
            trained = self._run({**(fixed or {}), **variables}, rates, decays, steps, objective, after_step, purpose)
        return replace(trained, variables={**variables, **trained.variables})

    def _run(
        self,
        variables: Tensors,
        rates: Mapping[str, float],
        decays: Mapping[str, float],
        steps: Sequence[list[IntArray]],
        objective: Objective | None,
        after_step: Callable[[Tensors], Tensors] | None,
        purpose: str,
    ) -> Fitted:
        """The trained variables alone, and how it went."""
        config, device, names = self.setting.config, self.setting.device, list(rates)
        live = {name: value.detach().to(device, copy=True) for name, value in variables.items()}
        for name in names:
            live[name].requires_grad_()
        optimizer = Optimizer(live, rates, decays, config, self.moments, purpose)
        passes = sum(len(rows) for step in steps for rows in step)
        if self.prefixes is not None:
            self.prefixes.fit = Fit(self.examples, live, passes / len(self.examples), config)
        augmenting, drawing = self._generator(purpose, "augment"), self._generator(purpose, "objective")
        losses = []
        for number, step in enumerate(steps):
            progress = federation_progress(config.schedule, self.round, config.rounds, number, len(steps))
            batches = self._batches(step, augmenting)
            minimised = objective or self._task_objective
            losses.append(self._gradient(live, batches, sum(map(len, step)), minimised, drawing, optimizer))
            optimizer.step(factor(config.schedule, progress))
            if after_step is not None:
                _put(after_step({name: live[name].detach() for name in names}), live)
        if self.prefixes is not None:
            self.prefixes.fit = None
        mean_loss = float(torch.stack(losses).mean())
        self._finite(mean_loss)
        optimizer.store(self.moments, self.setting.model.forgotten | self.setting.anew)
        return Fitted(
            detach({name: live[name] for name in names}),
            mean_loss,
            len(steps),
            passes,
            optimizer.step_lengths,
        )

    def _gradient(
        self,
        live: Tensors,
        batches: Iterator[Batch],
        count: int,
        objective: Objective,
        drawing: torch.Generator,
        optimizer: Optimizer,
    ) -> Tensor:
        total = torch.zeros((), device=self.setting.device)
        for batch in batches:
            with autocast(self.setting.device, self.setting.config.precision):
                loss = objective(live, batch, drawing) * (len(batch.labels) / count)
            optimizer.backward(loss, self.seat)
            total += loss.detach()
        return total

    def _batches(self, step: Sequence[IntArray], augmenting: torch.Generator) -> Iterator[Batch]:
        for rows in step:
            self.setting.go_on()
            yield make_batch(self.examples, rows, self.setting, augmenting)

    def _task_objective(self, variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        return self.loss(variables, batch)

    def _selected(self, variables: Tensors, only: Selector | None) -> list[str]:
        select, known, frozen = only or self.active, self.setting.model.specs, self.setting.frozen

        def chosen(name: str) -> bool:
            if original(name) in known:
                return select(known[original(name)].tag)
            return only is not None and only(frozen[name]) if name in frozen else True

        return [name for name in sorted(variables) if chosen(name)]

    def _learning_rates(self, names: Sequence[str]) -> dict[str, float]:
        config, presets = self.setting.config, self.setting.model.learning_rates
        known = self.setting.model.specs
        alone = all(spec.tag.role == "head" for spec in known.values())

        def rate(name: str) -> float:
            role = known[original(name)].tag.role if original(name) in known else ""
            share = config.learning_rate_factor if alone or role != "head" else 1.0
            base = config.learning_rate or presets.get(role, FALLBACK_LEARNING_RATE) * share
            return config.learning_rates.get(role, base)

        return {name: rate(name) for name in names}

    def _decays(self, names: Sequence[str], copies: bool = True) -> dict[str, float]:
        """Biases, norms, the backbone's own tokens and positions, and what is not the model's (mixing weights) are not
        pulled to zero; prompts and factors are, like weights."""
        decay = self.setting.config.weight_decay
        known = {name: spec for name, spec in self.setting.model.specs.items() if spec.tag.role != "embedding"}
        like = {name: known.get(original(name) if copies else name) for name in names}
        return {name: decay if spec is not None and len(spec.shape) > 1 else 0.0 for name, spec in like.items()}

    def _finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"the training loss at site {self.site!r} is not finite in round {self.round}",
                received=loss,
                remedy="lower train.learning_rate, set train.clip_norm, or look for broken images",
            )

    def _generator(self, purpose: str, use: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(purpose, use))

    def _seed(self, purpose: str, use: str) -> int:
        return seeds.derive(self.setting.seed, round=self.round, site=self.site, purpose=f"{purpose}/{use}")


def original(name: str) -> str:
    """The variable that `name` is a copy of: itself, or what stands behind the last slash."""
    return name.rpartition("/")[2]


@torch.no_grad()
def _put(values: Tensors, live: Tensors) -> None:
    for name, value in values.items():
        live[name].copy_(value)


def epoch_images(share: float, num: int) -> int:
    """Images in `share` passes over `num`, rounded up; 1.1 passes over 10 are 11 although 1.1 * 10 > 11 in binary."""
    return math.ceil(round(share * num, 6))


def plan(num: int, config: TrainConfig, epochs: float | None, generator: torch.Generator) -> list[list[IntArray]]:
    """Optimiser steps of a round: each a list of micro-batches of row numbers. Every epoch is a new permutation.

    An epoch ends with the smaller batch that is left, so that every image is seen once in it.
    """
    if num == 0:
        return []
    chunks: list[IntArray] = []
    wanted = config.local_steps * config.accumulate if config.local_steps is not None and epochs is None else None
    share = epochs if epochs is not None else config.local_epochs or 1.0
    passes = epoch_images(share, num) if wanted is None else math.inf
    while passes > 0 and (wanted is None or len(chunks) < wanted):
        order = torch.randperm(num, generator=generator).numpy()[: int(min(num, passes))]
        chunks += [order[at : at + config.batch_size] for at in range(0, len(order), config.batch_size)]
        passes -= len(order)
    chunks = chunks[:wanted]
    return [chunks[at : at + config.accumulate] for at in range(0, len(chunks), config.accumulate)]


def make_batch(examples: Examples, positions: IntArray, setting: Setting, augmenting: torch.Generator) -> Batch:
    """Read rows of the store; augment and normalise where the model is. What is not augmented is read when needed."""
    labels = onto(setting.device, torch.from_numpy(examples.labels[positions]))
    if setting.config.augmentation == "none":
        stored = Pixels(examples, positions, setting.preprocessing, setting.device)
        return Batch(stored, labels, torch.from_numpy(positions))
    pixels = onto(setting.device, read(examples, examples.rows[positions], setting.device))
    images = PRESETS[setting.config.augmentation](to_float(pixels), augmenting)
    return Batch(normalise(images, setting.preprocessing), labels, torch.from_numpy(positions))


def _fuses(device: torch.device) -> bool:
    """One kernel for all tensors of a step, where that is quicker than a loop over them; it rounds otherwise."""
    return device.type == "cuda"


class Optimizer:
    """torch's AdamW or SGD: one rate per tensor, clipping, loss scaling, and moments that can be kept as tensors."""

    def __init__(
        self,
        live: Mapping[str, Tensor],
        rates: Mapping[str, float],
        decays: Mapping[str, float],
        config: TrainConfig,
        moments: Mapping[str, Tensor],
        purpose: str,
    ) -> None:
        self.names, self.rates, self.config, self.purpose = list(rates), rates, config, purpose
        self.parameters = [live[name] for name in rates]
        self.fused = _fuses(self.parameters[0].device)
        self.step_lengths = dict.fromkeys(rates, 0.0)
        self.inner = self._build(rates, decays)
        self.scaler = torch.amp.GradScaler(enabled=config.precision == "float16")
        self._restore(moments)

    def _build(self, rates: Mapping[str, float], decays: Mapping[str, float]) -> torch.optim.Optimizer:
        by_rate: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            by_rate.setdefault((rates[name], decays[name]), []).append(parameter)
        groups = [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in by_rate.items()]
        if self.config.optimizer == "sgd":
            return torch.optim.SGD(groups, momentum=self.config.momentum, fused=self.fused or None)
        return torch.optim.AdamW(groups, fused=self.fused or None)

    def backward(self, loss: Tensor, seat: Seat | None = None) -> None:
        """Add the gradient of a micro-batch; a loss that needs no gradient adds nothing."""
        if loss.requires_grad:
            (torch.autograd.backward if seat is None else seat.backward)(self.scaler.scale(loss))

    def step(self, share: float) -> None:
        """Clip and move, every rate times `share` of the schedule."""
        if self.config.clip_norm:
            self.scaler.unscale_(self.inner)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        bases = [group["lr"] for group in self.inner.param_groups]
        for group, base in zip(self.inner.param_groups, bases, strict=True):
            group["lr"] = base * share
        self.scaler.step(self.inner)
        self.scaler.update()
        self.inner.zero_grad(set_to_none=True)
        for group, base in zip(self.inner.param_groups, bases, strict=True):
            group["lr"] = base
        for name in self.names:
            self.step_lengths[name] += self.rates[name] * share

    def store(self, moments: dict[str, Tensor], forgotten: Collection[str] = ()) -> None:
        """Put the optimiser's state into `moments` if the policy is to keep it, but for the `forgotten` names."""
        if self.config.moments == "reset":
            return
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key, value in self.inner.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and original(name) not in forgotten:
                    moments[f"{self.purpose}/{key}/{name}"] = value.detach().cpu().clone()

    def _restore(self, moments: Mapping[str, Tensor]) -> None:
        own = {key.removeprefix(f"{self.purpose}/"): value for key, value in moments.items()}
        for key, value in own.items():  # a purpose or a name may hold a slash, a state does not
            state, _, name = key.partition("/")
            if f"{self.purpose}/{key}" in moments and name in self.names:
                parameter = self.parameters[self.names.index(name)]
                device = parameter.device if state != "step" or self.fused else "cpu"
                self.inner.state[parameter][state] = value.to(device, copy=True)
