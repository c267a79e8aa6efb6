"""Composition: a site that joins after the run. In: what the server would send it, a few images. Out: its model.

A newcomer's personal tensors are at their declared start. `personal` is the strategy's own half of a round, in which
what was received stays as it came (its penalties and pulls included), or its last local phase where it has one. `head`
and `all` train the model that a newcomer would use, on the task's loss alone. Only the images given are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor

from consilium import instances
from consilium.config_unseen import UnseenConfig
from consilium.data import Examples
from consilium.errors import ConfigError
from consilium.experiment import Experiment
from consilium.local.train import Trainer
from consilium.protocols import Fitted, Learned, Objective, Personal, Selector, Tag
from consilium.tensors import Tensors, equal

Way = Literal["finish", "own round", "own model", "head", "all"]
SAID: dict[str, str] = {
    "finish": "the strategy's last local phase, from the model that was received",
    "own round": "the strategy's own local half of a round; what was received stays as it came",
    "own model": "the strategy's own local half of a round, which leaves the site a whole model of its own",
    "head": "the head of the model that was received, on the task's loss",
    "all": "all that the strategy trains, from the model that was received, on the task's loss",
}


@dataclass(frozen=True)
class Beside(Trainer):
    """A trainer in which some tensors stay still, whatever a strategy trains; every fit has the configured steps."""

    still: frozenset[str] = frozenset()

    def fit(
        self,
        variables: Tensors,
        *,
        objective: Objective | None = None,
        only: Selector | None = None,
        fixed: Tensors | None = None,
        epochs: float | None = None,  # noqa: ARG002
        learning_rate: float | None = None,
        after_step: Callable[[Tensors], Tensors] | None = None,
        purpose: str = "train",
    ) -> Fitted:
        """As `Trainer.fit`, but for the still names and the number of steps."""
        moving = {name: value for name, value in variables.items() if name not in self.still}
        held = {name: value for name, value in variables.items() if name in self.still}
        fitted = super().fit(
            moving,
            objective=objective,
            only=only,
            fixed={**(fixed or {}), **held},
            learning_rate=learning_rate,
            after_step=after_step,
            purpose=purpose,
        )
        return replace(fitted, variables={**variables, **fitted.variables})


@dataclass(frozen=True)
class Newcomer:
    """A site that took no part. `received`: all that it was sent; `secret` seeds its personal tensors."""

    experiment: Experiment
    site: str
    received: Tensors
    secret: int

    @cached_property
    def personal(self) -> Personal:
        """The declared start of what stays at a site."""
        initial, specs = self.experiment.initial(self.secret), self.experiment.model.specs
        return self.experiment.strategy.init_site(initial, specs, self.site)

    @cached_property
    def start(self) -> Tensors:
        """The model it would use as it is; empty where what it was sent, with its own start, makes no whole model."""
        model = self.experiment.strategy.deploy(self.received, self.personal)["personal"]
        return model if model.keys() >= self.experiment.model.specs.keys() else {}

    @cached_property
    def untrained(self) -> list[str]:
        """Tensors of the head that no training has seen: there is nothing to measure before the first images."""
        declares, rounds = self.experiment.strategy.declares, range(1, self.experiment.config.train.rounds + 1)
        heads = {name: spec.tag for name, spec in self.experiment.model.specs.items() if spec.tag.role == "head"}

        def learnt(tag: Tag) -> bool:
            return any(declares.trains(tag, number) for number in rounds)

        return sorted(name for name, tag in heads.items() if name not in self.received or not learnt(tag))

    def way(self, wanted: Literal["personal", "head", "all"] | None, images: Examples) -> Way:
        """How it trains; tried with one of `images`. ConfigError where the strategy has nothing of what is wanted."""
        if wanted == "head" and not any(spec.tag.role == "head" for spec in self.experiment.model.specs.values()):
            raise ConfigError("the head is not trained", where="unseen.trains", allowed="personal, all")
        if wanted in ("head", "all"):
            return wanted
        if self.experiment.strategy.declares.finish_epochs > 0:
            return "finish"
        once = self.experiment.strategy.declares.once  # what sites have before they send is not what they have then
        still, free = (set[str]() if once else self._moved(images, way) for way in ("own round", "own model"))
        if free - still or (free and not self.received):  # a model of the site's own goes by the names that it received
            return "own model"
        if still:
            return "own round"
        if wanted == "personal":
            remedy = "use trains = 'head' or 'all', or leave it out"
            what = "the strategy keeps nothing personal that a newcomer could train"
            raise ConfigError(what, where="unseen.trains", allowed="head, all", received=wanted, remedy=remedy)
        return "all"

    def adapted(self, images: Examples, way: str, options: UnseenConfig) -> Tensors:
        """The model after `options.steps` steps on these images."""
        if way in ("own round", "own model"):
            learned = self._learned(images, way, options)
            own = learned.update if way == "own model" else {}  # which no mean of sites takes the place of
            return self.experiment.strategy.deploy({**self.received, **own}, learned.personal)["personal"]
        trainer = self._trainer(images, options, frozenset(), in_round=False)
        fitted = trainer.fit(instances.plain(self.start), only=self._chosen(way, trainer))
        return {**self.start, **fitted.variables}

    def _moved(self, images: Examples, way: str) -> set[str]:
        """Which tensors of the model one step changes, while the server sends the same."""
        personal = self._learned(images, way, UnseenConfig(steps=1)).personal
        return set(trained(self.start, self.experiment.strategy.deploy(self.received, personal)["personal"]))

    def _learned(self, images: Examples, way: str, options: UnseenConfig) -> Learned:
        still = frozenset(self.received) & self.experiment.model.specs.keys() if way == "own round" else frozenset()
        trainer = self._trainer(images, options, still, in_round=True)
        return self.experiment.strategy.learn(self.received, self.personal, trainer)

    def _chosen(self, way: str, trainer: Trainer) -> Selector:
        declares, rounds = self.experiment.strategy.declares, range(1, self.experiment.config.train.rounds + 1)

        def chosen(tag: Tag) -> bool:
            last = declares.finish_epochs > 0 and declares.finishes(tag)
            wanted = {
                "head": tag.role == "head",
                "finish": last,
                "all": last or any(declares.trains(tag, number) for number in rounds),
            }
            return wanted[way] and trainer.active(tag)

        return chosen

    def _trainer(self, images: Examples, options: UnseenConfig, still: frozenset[str], in_round: bool) -> Beside:
        """The rates, batches and images of the run; a schedule of its own, as that of the rounds ends near zero."""
        setting, rounds = self.experiment.setting, self.experiment.config.train.rounds
        schedule = setting.config.schedule.model_copy(update={"restart": True})
        changes = {"schedule": schedule, "moments": "reset", "local_epochs": None, "local_steps": options.steps}
        alone = replace(setting, config=setting.config.model_copy(update=changes))
        if not in_round:
            alone = replace(alone, trains=lambda tag, round: True)  # noqa: ARG005
        counts = class_counts(images, len(self.experiment.task.classes))
        return Beside(alone, images, rounds, self.site, counts, {}, setting.prefixes(), still=still)


def class_counts(images: Examples, num_classes: int) -> list[int]:
    """Images of each class."""
    return [int(count) for count in np.bincount(images.labels, minlength=num_classes)]


def trained(start: Tensors, model: Tensors) -> Sequence[str]:
    """Names of the tensors that differ."""
    return sorted(name for name, value in model.items() if not _same(value, start.get(name)))


def _same(value: Tensor, other: Tensor | None) -> bool:
    return other is not None and equal({"": value}, {"": other})
