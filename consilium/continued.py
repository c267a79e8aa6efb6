"""Common: a strategy on top of what earlier stages left. In: a strategy, names that stay as they are. Out: a strategy.

What is frozen lies at the site: no strategy sees it, none of it is trained, sent or received, and it is part of every
model that is deployed. A site's frozen tensors are those of the model that it used at the end of the stage before;
where that is another than what all sites have in common (a second model of its own), the common one is kept beside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from consilium.data import Batch
from consilium.protocols import (
    Declaration,
    Fitted,
    Learned,
    LocalTraining,
    Objective,
    Personal,
    Selector,
    ServerState,
    Specs,
    Strategy,
    Tag,
    Update,
)
from consilium.tensors import Tensors, under, within

FROZEN, COMMON = "frozen", "common"  # in front of what a site keeps of the stages before, and of the global model's


@dataclass(frozen=True)
class Continued:
    """`strategy` for what this stage trains; `frozen`: names; `everywhere`: all sites have these alike."""

    strategy: Strategy
    declares: Declaration
    frozen: frozenset[str]
    everywhere: bool

    def up(self, specs: Specs, round: int) -> Specs:
        """What the strategy sends."""
        return self.strategy.up(specs, round)

    def down(self, specs: Specs, round: int) -> Specs:
        """What the strategy receives."""
        return self.strategy.down(specs, round)

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:
        """The coordinator holds what the strategy shares."""
        return self.strategy.init_server(self._rest(initial), specs, sites)

    def send(self, server: ServerState, site: str) -> Tensors:
        """What the strategy sends to a site."""
        return self.strategy.send(server, site)

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:
        """The strategy's start, and what is frozen: `initial` holds it, and "common/x" where x is another elsewhere."""
        held = {name: initial[name] for name in self.frozen if name in initial}
        common = {name: value for name, value in within(COMMON, initial).items() if name in held}
        other = {name: value for name, value in common.items() if not torch.equal(value, held[name])}
        start = self.strategy.init_site(self._rest(initial), specs, site).tensors
        return Personal({**start, **under(FROZEN, held), **under(COMMON, other)})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """The strategy's round with everything frozen around it."""
        own, held = self._split(personal)
        learned = self.strategy.learn(received, Personal(own), Around(training, within(FROZEN, held)))
        return replace(learned, personal=Personal({**learned.personal.tensors, **held}))

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:
        """The strategy's sum."""
        return self.strategy.combine(server, updates, specs)

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """The strategy's models on what is frozen; a global one where that is the same at all sites."""
        own, held = self._split(personal)
        frozen = within(FROZEN, held)
        models = {name: {**frozen, **values} for name, values in self.strategy.deploy(received, Personal(own)).items()}
        if "global" in models and self.everywhere:
            models["global"] = {**models["global"], **within(COMMON, held)}
        return models if self.everywhere else {"personal": models["personal"]}

    def _rest(self, initial: Tensors) -> Tensors:
        return {name: value for name, value in initial.items() if name not in self.frozen}

    def _split(self, personal: Personal) -> tuple[Tensors, Tensors]:
        held = {n: v for n, v in personal.tensors.items() if n.startswith((f"{FROZEN}/", f"{COMMON}/"))}
        return {name: value for name, value in personal.tensors.items() if name not in held}, held


@dataclass(frozen=True)
class Around:
    """`LocalTraining` of a model whose other tensors are frozen."""

    inner: LocalTraining
    frozen: Tensors
    live: dict[str, Tensor] = field(default_factory=dict)  # the frozen tensors of a fit under way, where the model is

    @property
    def round(self) -> int:
        """Of this stage."""
        return self.inner.round

    @property
    def site(self) -> str:
        """Its name."""
        return self.inner.site

    @property
    def specs(self) -> Specs:
        """The variables of this stage."""
        return self.inner.specs

    @property
    def num_examples(self) -> int:
        """Training images at this site."""
        return self.inner.num_examples

    @property
    def class_counts(self) -> Sequence[int]:
        """Training images of each class."""
        return self.inner.class_counts

    def active(self, tag: Tag) -> bool:
        """Whether this stage trains it in this round."""
        return self.inner.active(tag)

    def loss(self, variables: Tensors, batch: Batch) -> Tensor:
        """Of the whole model, whatever of it an objective asks for."""
        return self.inner.loss({**self.frozen, **self.live, **variables}, batch)

    def watch(self, modules: Collection[str]) -> AbstractContextManager[Tensors]:
        """As in the whole model."""
        return self.inner.watch(modules)

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
        """The frozen tensors are fixed, beside what the strategy fixes."""

        def shown(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:
            assert objective is not None
            self.live.update({name: variables[name] for name in self.frozen})
            return objective(variables, batch, generator)

        return self.inner.fit(
            variables,
            objective=shown if objective else None,
            only=only,
            fixed={**self.frozen, **(fixed or {})},
            epochs=epochs,
            learning_rate=learning_rate,
            after_step=after_step,
            purpose=purpose,
        )

    def features(self, variables: Tensors) -> tuple[Tensor, Tensor]:
        """Of the whole model."""
        return self.inner.features({**self.frozen, **variables})

    def gradient(self, variables: Tensors) -> Tensors:
        """Of what is active; what is frozen is not."""
        return self.inner.gradient({**self.frozen, **variables})

    def second_moments(self, variables: Tensors, modules: Collection[str]) -> Tensors:
        """Of the whole model."""
        return self.inner.second_moments({**self.frozen, **variables}, modules)
