"""Common: the words of the house. Everything that flows between stages, and what a tuner, task or strategy must offer.

A tuner makes a few trainable tensors and gives each a Tag. A strategy reads tags and decides what travels. They meet
nowhere else. All state is named tensors, in and out; nothing here is mutable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from consilium.choice import Choice
from consilium.data import Batch, IntArray, Preprocessing
from consilium.halves import Halves
from consilium.tensors import Tensors

Slot = Literal["parameter", "control", "statistic", "base"]


# ------------------------------------------------------------------------------------------------ what a tensor is
@dataclass(frozen=True)
class Tag:
    """What a tensor is for.

    `role`: head, lora_a, lora_b, prompt, adapter, norm, bias, attention, weight, router ... `part`: the adapter it
    belongs to (shared, personal, ...). `block`: index of the transformer block, None outside of blocks.
    """

    module: str
    role: str
    part: str = "shared"
    block: int | None = None
    slot: Slot = "parameter"


@dataclass(frozen=True)
class Factor:
    """One side of a product that is added to frozen tensors `base` of the backbone or of an adapter, by their names.

    A right factor may serve several bases, each with a left factor of its own: base_i + scale * left_i @ right.
    """

    base: tuple[str, ...]
    side: Literal["left", "right"]


@dataclass(frozen=True)
class Spec:
    """Shape, type and tag of one named tensor; None in a shape is a free dimension."""

    shape: tuple[int | None, ...]
    tag: Tag
    dtype: torch.dtype = torch.float32
    scale: float = 1.0  # alpha / r of a low-rank factor: W x + scale * B A x
    factor: Factor | None = None  # of a product: only scale * left @ right acts, so a mean of factors is no mean of it
    shrinks: int | None = None  # a dimension that may come shorter, to one size in a message: the rank of a site


Specs = Mapping[str, Spec]
Selector = Callable[[Tag], bool]
Trains = Callable[[Tag, int], bool]  # tag, round


@dataclass(frozen=True)
class Part:
    """One adapter on the backbone. `personal` ones never travel; `rank` overrides a tuner's, `ranks` at some sites."""

    name: str = "shared"
    personal: bool = False
    rank: int | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)


Combination = Literal["sum", "router"]  # how several parts act on one module


# ------------------------------------------------------------------------------------------------ the model
@dataclass(frozen=True)
class ModuleRole:
    """Place of a linear or norm module of the backbone: role qkv, proj, fc1, fc2, norm1, norm2, norm, patch_embed."""

    role: str
    block: int | None


@dataclass(frozen=True)
class Backbone:
    """A frozen feature extractor: `module(images [B,3,H,W]) -> features [B, num_features]`, in eval mode."""

    module: torch.nn.Module
    name: str
    digest: str  # of all frozen weights, 64 hexadecimal digits
    preprocessing: Preprocessing
    modules: Mapping[str, ModuleRole]  # dotted module name -> its role
    num_blocks: int
    num_features: int
    num_parameters: int
    licence: str = "unknown"


@dataclass(frozen=True)
class Attached:
    """What a tuner added: the trainable tensors, their initial values and the learning rate that suits each role.

    `initial(seed)` may be called many times: shared tensors start from the run's seed, personal ones from the site's
    own (a head that the server ever knew gives labels away, Yang et al. 2021).
    """

    specs: Specs
    initial: Callable[[int], Tensors]
    learning_rates: Mapping[str, float]  # role -> AdamW learning rate
    inert: int = 0  # scalars the method trains in name that provably change no output: held, counted, never sent
    forgets_moments: bool = False  # moments of its tensors start anew in every round, whatever train.moments says
    never_trained: frozenset[str] = frozenset()  # of its own: drawn from the run's seed, sent to sites, never sent back
    stands_for: frozenset[str] = frozenset()  # the backbone's own tensors that its own take the place of, in part
    merge_refused: str = ""  # why this cannot be folded into weights, if so; compose asks before it folds anything


class Tuner(Protocol):
    """Makes a few trainable tensors on a frozen backbone. Options are its own frozen pydantic model.

    An optional class attribute `precedence` says when its turn is where several act on one layer, in the forward pass
    and in merging, whatever the order of the list: 0 the backbone's own tensors (the default), 1 what is added to a
    layer's weight, 2 to its bias, 3 and 4 what rescales all of that. An optional attribute `stackable` says that its
    tensors may come stacked, [S, ...], for rows of S sites (`tuners/stacking.py`); without it sites train in turns.
    """

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Add adapters to `backbone.module` in place, or name existing parameters."""

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:
        """Which of `specs`, the tensors it attached, are trained in this round at this site."""

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        """Fold `variables` into the backbone's own weights, remove the adapters; ConfigError where algebra forbids."""


class Model(Protocol):
    """Backbone, tuner and head as one function of its trainable tensors; the frozen weights are shared by all sites."""

    @property
    def specs(self) -> Specs: ...

    def initial(self, seed: int) -> Tensors:
        """Start values of all variables, drawn from `seed` and each variable's own name."""

    @property
    def learning_rates(self) -> Mapping[str, float]: ...

    @property
    def inert(self) -> int:
        """Scalars that the tuners train in name only, see `Attached.inert`."""

    @property
    def never_trained(self) -> frozenset[str]:
        """Variables that no round trains."""

    @property
    def forgotten(self) -> frozenset[str]:
        """Variables whose optimiser moments never outlive a round."""

    @property
    def halves(self) -> Halves | None:
        """How the backbone can be split in front of a block; None where it cannot."""

    def forward(self, variables: Tensors, images: Tensor, depth: int = 0) -> Tensor:
        """Head outputs [B, C] for images float [B, 3, H, W], or for what `halves` made of them up to `depth`. Names
        that are missing keep their frozen value; one of the backbone itself may be given too (a changed base)."""

    def features(self, variables: Tensors, images: Tensor, depth: int = 0) -> Tensor:
        """Pooled features [B, num_features] before the head."""

    def watch(self, modules: Collection[str]) -> AbstractContextManager[Tensors]:
        """While open, what enters these modules of the backbone, [B, ..., in], and under "" the pooled features."""

    def active(self, round: int, site: str, seed: int) -> Selector:
        """What is trained in this round at this site: the tuners' choice and, unless frozen, the head."""


class Task(Protocol):
    """Owns the head's size, the loss and what is measured."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def num_outputs(self) -> int: ...

    @property
    def class_counts(self) -> Literal["site", "federation"]:
        """Whose class counts the loss wants; "federation" makes every site send its own before the first round."""

    def with_classes(self, classes: Sequence[str]) -> Task:
        """The same task for these classes."""

    def loss(self, outputs: Tensor, labels: Tensor, class_counts: Sequence[int]) -> Tensor:
        """Mean loss of a batch; outputs [B, num_outputs], labels [B]; class_counts of the site or the federation."""

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Outputs [n, num_outputs] as the numbers that are stored and reported, [n, C]."""

    def validation(self, probabilities: Any, labels: IntArray) -> Mapping[str, float]:
        """Quick metrics without intervals for a round's log; NaN where undefined."""

    def metrics(
        self, predictions: Any, bootstrap: int = 1000, seed: int = 0, sites: Sequence[str] = ()
    ) -> Mapping[str, Any]:
        """Full metrics from a table of predictions (site, id, group, label, one column per class), with intervals."""


# ------------------------------------------------------------------------------------------------ learning at a site
Objective = Callable[[Tensors, Batch, torch.Generator], Tensor]


@dataclass(frozen=True)
class Fitted:
    """Result of one call of `LocalTraining.fit`."""

    variables: Tensors
    loss: float  # mean over the steps
    num_steps: int
    image_passes: int
    step_lengths: Mapping[str, float]  # name -> sum of its learning rates over the steps


class LocalTraining(Protocol):
    """The only training loop, as a strategy sees it. Data, device, optimiser, schedule and seeds are inside."""

    @property
    def round(self) -> int: ...

    @property
    def site(self) -> str: ...

    @property
    def specs(self) -> Specs: ...

    @property
    def num_examples(self) -> int: ...

    @property
    def class_counts(self) -> Sequence[int]: ...

    def active(self, tag: Tag) -> bool:
        """Whether the tuner, and the strategy's `trains`, train this tensor in this round."""

    def loss(self, variables: Tensors, batch: Batch) -> Tensor:
        """The task's loss of the model with these variables."""

    def watch(self, modules: Collection[str]) -> AbstractContextManager[Tensors]:
        """`Model.watch` around a `loss`: what it left in the backbone, with its gradient."""

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
        """Train what `only` (default: `active`) selects; any mapping may be given, model variables or not. A name
        "x/variable" is a copy of a variable: chosen, decayed and, unless `learning_rate` is given, paced like it.
        The objective sees `fixed` beside the variables; both are where the model is. `learning_rate` takes the place of
        the configured ones, `after_step` maps what is trained to where it may be, `purpose` sets several fits apart.
        """

    def features(self, variables: Tensors) -> tuple[Tensor, Tensor]:
        """Features [n, num_features] and labels [n] of the training split, without augmentation."""

    def second_moments(self, variables: Tensors, modules: Collection[str]) -> Tensors:
        """Mean of x x^T over all tokens x of the training split that enter these modules of the backbone, [in, in] by
        module, float64, without augmentation; nothing at no images."""

    def gradient(self, variables: Tensors) -> Tensors:
        """Mean gradient of the loss over the training split, by name, of what is `active`; one pass over the images."""


# ------------------------------------------------------------------------------------------------ the federation
@dataclass(frozen=True)
class Personal:
    """What a site keeps. It is no mapping and has no way into a message."""

    tensors: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What a site sends back after one round."""

    site: str
    tensors: Tensors
    num_examples: int


@dataclass(frozen=True)
class Learned:
    """Outcome of `Strategy.learn`: `update` leaves the site, `personal` stays."""

    update: Tensors
    personal: Personal
    loss: float
    num_steps: int
    image_passes: int
    numbers: Mapping[str, float] = field(default_factory=dict)  # finite, each named in `Declaration.numbers`


@dataclass(frozen=True)
class ServerState:
    """What the coordinator holds: `shared` may be sent; `memory` (momentum, control variates, ...) is not, as such."""

    round: int
    sites: tuple[str, ...]
    shared: Tensors
    memory: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A site that gave no update, and why: non_finite, stale, refused, lost, error."""

    site: str
    code: str
    message: str


@dataclass(frozen=True)
class Declaration:
    """What a strategy says of itself before anything runs. `passes(round)`: how often `learn` goes through images."""

    parts: tuple[Part, ...] = (Part(),)
    combination: Combination = "sum"
    needs_individual_updates: bool = False  # False: only the weighted sum, so secure aggregation is possible
    once: bool = False  # one-shot: sites send in the last round alone
    pools_images: bool = False  # images of all sites are in one place: a simulation can do that, a hospital refuses
    required_roles: frozenset[str] = frozenset()
    changes_base: bool = False  # `initial` then also holds the frozen weights, under the backbone's own names
    last_block: int | None = None  # the highest block it speaks of, which the backbone must have
    trains: Trains = lambda tag, round: True  # what is trained at all: freezing or alternating a factor  # noqa: ARG005
    prunes: bool = False  # sites may come down to smaller ranks by themselves: `ranks.py`
    restarts_factors: bool = False  # factors of products come back in another basis, so moments of them are dropped
    refactors: Callable[[int], bool] = lambda round: False  # after it all of them are new, sent or not  # noqa: ARG005
    plain_sgd: bool = False  # it reads gradients off the way that was gone: no other optimiser, no momentum
    numbers: Mapping[str, str] = field(default_factory=dict)  # of each round, beside the tensors: name -> what it says
    passes: Callable[[int], Sequence[float | None]] = lambda round: (None,)  # epochs; None: as configured  # noqa: ARG005
    largest_update: float | None = None  # of what a site sends, as a step from what it was sent; a longer is refused
    checks: Callable[[Update], None] | None = None  # WireError, with the site's name, for what no sum could use
    instances: int = 0  # training images whose features, at the site, weigh the personal part image by image
    finish_epochs: float = 0.0  # a last local phase at every site: the personal model
    finishes: Selector = lambda tag: True  # what is trained in it, of all that the tuners train  # noqa: ARG005
    choice: Choice | None = None  # states after the last round, of which sites' validation chooses

    @property
    def personal_parts(self) -> frozenset[str]:
        """Parts whose tensors never travel; "personal", the part of a personal head, is always one."""
        return frozenset({"personal", *(part.name for part in self.parts if part.personal)})


class Strategy(Protocol):
    """Both halves of a federated algorithm, as pure functions."""

    @property
    def declares(self) -> Declaration: ...

    def up(self, specs: Specs, round: int) -> Specs:
        """Everything a site may send in this round; `specs` are all variables of the model."""

    def down(self, specs: Specs, round: int) -> Specs:
        """Everything the coordinator may send in this round. Slot "statistic": what it makes of replies, which is not
        there before the first; a free first dimension has a row per site that replied."""

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:
        """State before round 1; `initial` and `specs` are all variables of the model."""

    def send(self, server: ServerState, site: str) -> Tensors:
        """All that `site` should know now; the coordinator sends what the site does not have yet."""

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:
        """A site's state before its first round; `initial` and `specs` are all variables of the model."""

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        """One round at a site; `received` is all the site knows of what was sent to it."""

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:
        """One round at the coordinator; updates sorted by site, each tensor averaged over the sites that trained it.
        They can be read once, as they come, unless `needs_individual_updates`; reading them fails below the quorum.
        `specs` are all variables of the model; which of them are factors of a product stands there."""

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        """Full variables of the models to use: "personal" always, "global" where the shared tensors alone are a model;
        several models that are used as one are named as `members` says.
        Called with what was received last, and, for the model before aggregation, with what the site itself trained."""
