"""Stage 8, strategies: a shared and a personal adapter that are trained together and kept orthogonal by a penalty.

In: updates of sites. Out: the next shared tensors.

FedOPAL: Tupper, Gagné, "Personalized Federated Fine-Tuning of Vision Foundation Models for Healthcare", SMASH 2025,
arXiv 2510.12741. Its full recipe is not public to us and there is no code. Known are orthogonal LoRA adapters that
keep what is general apart from what is a client's own, probably trained at the same time, with the regulariser on
weights or on representations. So this is a family: all that is unknown (kind, side, norm, lambda, its warm-up,
gradient, floor, head, server rule) is an option, every default is ours, and the two variants are presets. Numbers of
the paper do not apply to it.

    minimised at site k: CE + strength * mean over layers of Omega(g, p)
    lambda -> strength (* round / warmup_rounds)    Omega -> penalty    g, p -> parts shared, personal
    on weights, X = A (side right), B^T (left): entrywise sum |X_g X_p^T| (O-LoRA's code), frobenius, rows, subspace;
    product <DW_g, DW_p>^2 / (||DW_g||^2 ||DW_p||^2)
    on representations, per token: cos_squared, cos of u_g, u_p; pooled: cos^2 of f(g) and f(g, p) - f(g), pooled
    features

Leaves the site, stays, kept: as dual_lora; a design stays and is kept. gradient = "personal" takes g, and what enters
a layer, as constants of Omega. A-side orthogonality makes what the adapters read disjoint, B-side what they write
(outputs orthogonal for every input). The server's mean undoes in part what each site reached; hard = "projected" makes
A_p (or B_p, by `side`) orthogonal to the shared part that arrived, before training goes on, beside the penalty or
(strength = 0) in its place.
hard = "designed": in a site's first round A_p is set to the leading directions of what enters the layer there, without
those that A_g reads, U_r^T / sqrt 3 of the SVD of (I - Q_g Q_g^T) H with H the mean of x x^T over the training images
(InfLoRA); it is not trained, B_p is. As A_g moves, every round uses the design's projection as above.
Departures: cannot be listed, see above. Dropout of the adapters is left out of u_g and u_p. pooled costs one more
forward pass, with gradient = "personal" two.
Identity: strength = 0 is dual_lora, bit by bit; with personal_rank = 0 FedIT (tests/identities/test_dual.py).
Family: dual LoRA
Identity test: test_without_a_penalty_it_is_dual_lora_and_a_penalty_shows
Slow reference: test_dual::test_rounds_are_those_of_the_formulas
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from consilium import orthogonality
from consilium.config_sites import changed
from consilium.data import Batch
from consilium.orthogonality import OF_SIDES, PREPARE, Couple, Sides
from consilium.protocols import LocalTraining, Objective
from consilium.registry import register
from consilium.strategies.dual import Dual, whole
from consilium.strategies.dual_lora import DualOptions, declared, rule, shares
from consilium.strategies.federated_lora import RIGHT
from consilium.tensors import Tensors

OfWeights = Literal["subspace", "rows", "frobenius", "entrywise", "product"]
OfRepresentations = Literal["cos_squared", "cos", "pooled"]
WEIGHTS = frozenset({*OF_SIDES, "product"})


class FedopalOptions(DualOptions):
    """Keys of `[strategy]` for fedopal."""

    penalty: OfWeights | OfRepresentations = "subspace"
    strength: float = Field(default=1.0, ge=0)  # lambda, of the mean over layers; 0: no penalty
    warmup_rounds: int = Field(default=0, ge=0)  # lambda grows to its full size in so many rounds
    side: Sides = "right"  # of weights, and of projected: right, what the adapters read (A); left, what they write (B)
    gradient: Literal["both", "personal"] = "both"  # which part the penalty moves
    floor: float = Field(default=1e-3, gt=0)  # smaller norms count as this one: B starts at zero
    hard: Literal["projected", "designed"] | None = Field(
        default=None,
        description="projected: the personal part made orthogonal at the start of every round; designed: its A made of "
        "the directions that a site's own inputs have beside the shared A, not trained, and projected in every round",
    )

    @model_validator(mode="after")
    def _act(self) -> FedopalOptions:
        given, weighs = changed(self), self.strength > 0 and self.penalty in OF_SIDES
        rights, kept = weighs and self.side == "right", self.server in ("ffa", "fedsvd")  # kept: the shared A
        if self.personal_rank == 0 and (self.strength > 0 or self.hard):
            raise ValueError("personal_rank = 0 leaves nothing to be orthogonal: strength = 0, and hard left out")
        if rights and self.hard == "designed" and (kept or self.gradient == "personal"):
            raise ValueError("the penalty moves nothing: its side is A's, of which one is designed and one fixed")
        if rights and kept and "gradient" in given:
            raise ValueError(f"gradient has no effect: the penalty is on A, and {self.server} trains no shared one")
        if "floor" in given and self.penalty in ("entrywise", "frobenius"):
            raise ValueError(f"floor has no effect with penalty = {self.penalty!r}, which divides by no norm")
        if "side" in given and not weighs and self.hard != "projected":
            raise ValueError(f"side is of weights, and has no effect with penalty = {self.penalty!r}")
        if self.strength == 0 and (idle := sorted(given & {"penalty", "warmup_rounds", "gradient", "floor"})):
            raise ValueError(f"{', '.join(idle)} without effect: strength = 0 is no penalty")
        return self


class WeightsOptions(FedopalOptions):
    """Keys of `[strategy]` for fedopal_weights."""

    penalty: OfWeights = "subspace"


class RepresentationsOptions(FedopalOptions):
    """Keys of `[strategy]` for fedopal_representations."""

    penalty: OfRepresentations = "cos_squared"


@dataclass(frozen=True)
class Penalty:
    """loss + lambda Omega; `options` say which."""

    options: FedopalOptions

    def __call__(self, training: LocalTraining, pairs: tuple[Couple, ...]) -> Objective:
        """What is minimised in this round; ConfigError where the tuner trains nothing that the penalty moves."""
        if self.options.penalty in OF_SIDES and (self.options.hard, self.options.server) != ("designed", "rolora"):
            orthogonality.require_trained(pairs, self.options.side, training)
        share = min(1.0, training.round / self.options.warmup_rounds) if self.options.warmup_rounds else 1.0
        by_layer = self.options.penalty in ("cos_squared", "cos")
        layers = [shared.base[0].removesuffix(".weight") for shared, _ in pairs] if by_layer else []
        looks = bool(layers) or self.options.penalty == "pooled"  # who looks trains alone, see local/seats.py

        def objective(variables: Tensors, batch: Batch, generator: torch.Generator) -> Tensor:  # noqa: ARG001
            with training.watch(layers) if looks else nullcontext({}) as seen:
                loss = training.loss(whole(variables), batch)
            omega = self._omega(training, pairs, variables, batch, seen)
            return loss + self.options.strength * share * omega.to(loss.dtype)

        return objective

    def _omega(
        self, training: LocalTraining, pairs: tuple[Couple, ...], variables: Tensors, batch: Batch, seen: Tensors
    ) -> Tensor:
        fixed = self.options.gradient == "personal"
        shared = {n for n, spec in training.specs.items() if spec.tag.part == "shared"} if fixed else set()
        values = {name: value.detach() if name in shared else value for name, value in variables.items()}
        if self.options.penalty in WEIGHTS:
            kind, side, floor = self.options.penalty, self.options.side, self.options.floor
            return torch.stack([orthogonality.of_weights(kind, side, pair, values, floor) for pair in pairs]).mean()
        if self.options.penalty == "pooled":
            return self._of_pooled(training, values, batch, seen)
        inputs = {name: value.detach() if fixed else value for name, value in seen.items()}
        return torch.stack([self._of_layer(pair, values, inputs) for pair in pairs]).mean()

    def _of_layer(self, pair: Couple, values: Tensors, inputs: Tensors) -> Tensor:
        x = inputs[pair[0].base[0].removesuffix(".weight")]
        u_g, u_p = (orthogonality.output(product, values, x) for product in pair)
        return orthogonality.cosines(u_g, u_p, self.options.floor, squared=self.options.penalty == "cos_squared")

    def _of_pooled(self, training: LocalTraining, values: Tensors, batch: Batch, seen: Tensors) -> Tensor:
        own = {name for name, spec in training.specs.items() if spec.factor is not None and spec.tag.part == "personal"}
        with training.watch(()) as alone:
            training.loss({name: value for name, value in whole(values).items() if name not in own}, batch)
        if self.options.gradient == "personal":
            with training.watch(()) as seen:
                training.loss(whole(values), batch)
        return orthogonality.cosines(alone[""], seen[""] - alone[""], self.options.floor, squared=True)


def fedopal(options: FedopalOptions) -> Dual:
    """Two adapters with this penalty."""
    looks = options.hard == "designed" or (options.penalty in ("cos_squared", "cos") and options.strength > 0)
    still = RIGHT if options.hard == "designed" else ()
    return rule(options)(
        options.weights,
        shares(options),
        declared(options, frozenset({"lora_a"} if looks else ()), still),
        options.aggregation(),
        objective_for=Penalty(options) if options.strength > 0 else None,
        prepare=PREPARE[options.hard](options.side) if options.hard else None,
        head=options.head,
    )


for _name, _options, _on in (
    ("fedopal", FedopalOptions, "weights or representations"),
    ("fedopal_weights", WeightsOptions, "weights"),
    ("fedopal_representations", RepresentationsOptions, "representations"),
):
    register(
        "strategies",
        _name,
        options=_options,
        summary=f"dual_lora with a penalty on {_on} that keeps both adapters orthogonal",
        source="FedOPAL: Tupper and Gagné, SMASH 2025, arXiv 2510.12741; the full recipe is not public",
        facts={"leaves the site": "shared factors and the head", "stays": "personal factors"},
    )(fedopal)
