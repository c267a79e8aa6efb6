"""Stage 3, tuners. In: a backbone, one or several tuners, a head. Out: one function of the trainable tensors.

A hybrid is a list: variables are the union, each tuner chooses among its own, and the order changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from consilium import tensors
from consilium.config import HeadConfig
from consilium.errors import ConfigError
from consilium.halves import Halves, split
from consilium.protocols import Attached, Backbone, Declaration, Selector, Specs, Tag, Tuner
from consilium.tensors import Tensors
from consilium.tuners import base
from consilium.tuners.head import RATE, Head
from consilium.tuners.placed import EVERY, Placed, attached


@dataclass(frozen=True)
class TunedModel:
    """`protocols.Model`: the frozen weights live in `backbone.module`, all that is learnt comes in as `variables`."""

    backbone: Backbone
    tuners: tuple[Tuner, ...]
    head: Head
    specs: Specs
    learning_rates: Mapping[str, float]
    attached: tuple[Attached, ...]  # one per tuner
    head_start: dict[str, Tensor]  # a frozen head's values
    names: frozenset[str]  # of every parameter and buffer of the backbone, adapters included
    begin: Tensors = field(default_factory=dict)  # start values that are not drawn
    watching: list[dict[str, Tensor]] = field(default_factory=list)  # open `watch`es of this very call, see there

    def initial(self, seed: int) -> Tensors:
        """Start values of all variables, drawn from `seed` and each variable's own name."""
        head = tensors.select(self.head.initial(seed), self.head.specs)
        found = {name: value for each in self.attached for name, value in each.initial(seed).items()}
        return tensors.detach({**found, **head, **self.begin})

    def forward(self, variables: Tensors, images: Tensor, depth: int = 0) -> Tensor:
        """Outputs [B, num_outputs], never in half precision; missing names keep their frozen value. With a `depth`,
        `images` are what `halves` made of them up to there."""
        outputs = self.head.apply({**self.head_start, **variables}, self.features(variables, images, depth))
        return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs

    @contextmanager
    def watch(self, modules: Collection[str]) -> Iterator[Tensors]:
        """While open, what enters these modules [B, ..., in], and under "" the last pooled features [B, num_features].
        ConfigError for a module that the backbone does not have."""
        if unknown := sorted(set(modules) - self.backbone.modules.keys()):
            raise ConfigError("the backbone has no such module", received=unknown[:3])
        seen: dict[str, Tensor] = {}
        handles = [self._watched(name, seen) for name in sorted(modules)]
        self.watching.append(seen)
        try:
            yield seen
        finally:
            self.watching.pop()
            for handle in handles:
                handle.remove()

    def _watched(self, name: str, seen: dict[str, Tensor]) -> RemovableHandle:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            seen[name] = inputs[0]

        return self.backbone.module.get_submodule(name).register_forward_pre_hook(note)

    def features(self, variables: Tensors, images: Tensor, depth: int = 0) -> Tensor:
        """Pooled features [B, num_features]; ConfigError for a name that is neither the backbone's nor the head's."""
        inside = self._inside(variables)
        if depth and self.halves is not None:
            features = self.halves.run(inside, images, depth, self.halves.deepest)
        else:
            features = functional_call(self.backbone.module, inside, (images,), tie_weights=False)
        for seen in self.watching:
            seen[""] = features
        return features

    @cached_property
    def halves(self) -> Halves | None:
        """How the backbone can be split, with all that tuners hung in; None where it cannot."""
        draws = self.initial(0)
        values = {name: value.to(self._device) for name, value in self._inside(draws).items()}
        return split(self.backbone.module, values, self.backbone.preprocessing.image_size)

    @property
    def _device(self) -> torch.device:
        return next(self.backbone.module.parameters()).device

    def _inside(self, variables: Tensors) -> dict[str, Tensor]:
        inside = {name: value for name, value in variables.items() if name not in self.head_start}
        if not inside.keys() <= self.names:
            raise ConfigError("the model has no such variable", received=sorted(inside.keys() - self.names)[:3])
        return inside

    @property
    def inert(self) -> int:
        """Scalars that are trained in name only."""
        return sum(each.inert for each in self.attached)

    @property
    def never_trained(self) -> frozenset[str]:
        """Variables that no round trains."""
        return frozenset(name for each in self.attached for name in each.never_trained)

    @property
    def forgotten(self) -> frozenset[str]:
        """Variables whose optimiser moments never outlive a round."""
        return frozenset(name for each in self.attached if each.forgets_moments for name in each.specs)

    def active(self, round: int, site: str, seed: int) -> Selector:
        """What any tuner trains among its own tensors, and the head unless it is frozen."""
        pairs = [(tuner, each.specs) for tuner, each in zip(self.tuners, self.attached, strict=True) if each.specs]
        choices = [(_tags(specs), tuner.active(specs, round, site, seed)) for tuner, specs in pairs]
        head = _tags(self.head.specs)
        return lambda tag: tag in head or any(tag in own and chosen(tag) for own, chosen in choices)


def attach(
    backbone: Backbone,
    tuners: Sequence[Tuner],
    head: HeadConfig,
    num_outputs: int,
    declaration: Declaration,
    seed: int,
    earlier: Sequence[Placed] = (),
) -> TunedModel:
    """Attach all tuners to the backbone, those of earlier stages too, and put a head on top.

    Raises ConfigError where two tuners claim one tensor or nothing is left to train. `seed` draws a frozen head.
    """
    own = [Placed(tuner, declaration.parts, declaration.combination, EVERY) for tuner in tuners]
    placed = sorted([*earlier, *own], key=lambda each: getattr(each.tuner, "precedence", 0))
    tuners = [each.tuner for each in placed]
    added = tuple(attached(each, backbone) for each in placed)
    still = not declaration.trains(Tag("head", "head"), 1)
    top = Head(head, backbone.num_features, num_outputs, still)
    specs = _union([*(each.specs for each in added), top.specs], [name for each in added for name in each.stands_for])
    if not specs:
        raise ConfigError("nothing is left to train", where="head.share", allowed="shared, personal", received="frozen")
    device = next(backbone.module.parameters()).device
    return TunedModel(
        backbone=backbone,
        tuners=tuple(tuners),
        head=top,
        specs=specs,
        learning_rates=_rates(added),
        attached=added,
        head_start={name: value.to(device) for name, value in top.initial(seed).items()},
        names=frozenset(name for name, _ in [*backbone.module.named_parameters(), *backbone.module.named_buffers()]),
    )


def merge(model: TunedModel, variables: Tensors) -> nn.Module:
    """Fold everything into the backbone, in place, and take the adapters off; the plain module, without the head.

    To unmerge, load the backbone again. ConfigError where a tuner cannot be folded.
    """
    for reason in filter(None, (each.merge_refused for each in model.attached)):
        remedy = "use `consilium predict`, or keep the adapters apart: export --format safetensors"
        raise ConfigError(reason, where="tuner", remedy=remedy)
    own = base.parameters(model.backbone.module).keys()
    changed = variables.keys() & own - model.specs.keys()  # by a strategy that changes the base
    base.replace(model.backbone.module, tensors.select(variables, changed))
    for tuner in model.tuners:
        tuner.merge(model.backbone, variables)
    return model.backbone.module


def _tags(specs: Specs) -> set[Tag]:
    return {spec.tag for spec in specs.values()}


def _union(all_specs: Sequence[Specs], taken: Sequence[str]) -> Specs:
    claims = Counter([*(name for specs in all_specs for name in specs), *taken])
    twice = [name for name, times in claims.items() if times > 1]
    if twice:
        remedy = "train each tensor with one of them"
        raise ConfigError("two tuners claim the same tensor", where="tuner", received=sorted(twice)[:3], remedy=remedy)
    return dict(sorted(item for specs in all_specs for item in specs.items()))


def _rates(added: Sequence[Attached]) -> dict[str, float]:
    """By role; where two tuners suit one role differently the smaller rate is safe for both. A tuner that trains only
    the head may name the head's rate, which no longer holds in a hybrid with moving features."""
    moving = [each for each in added if each.specs]
    rates: dict[str, float] = {"head": RATE}
    for each in moving or added:
        for role, rate in each.learning_rates.items():
            rates[role] = min(rate, rates[role]) if role in rates and moving else rate
    return rates
