"""Stage 3, tuners. In: a frozen backbone. Out: a sub-module of every block as variables, few blocks active per round.

Stochastic block attention (SBA): Alkhunaizi, Almalik, Al-Refai, Naseer, Nandakumar, "Probing the Efficacy of Federated
Parameter-Efficient Fine-Tuning of Vision Transformers for Medical Image Classification", MICCAI workshops 2024,
arXiv 2407.11573; its code was never released.

    b_t, the block of round t -> active(...)

Leaves the site: what was trained in the round. Comes back: every block that changed since the site last heard; a
tensor's version is its content. Stays, and is kept between rounds: nothing; moments of the optimiser start anew in
every round, because those of a block would be stale by the time it is drawn again.
Departures: any number of blocks, any sub-module. `draw`: "uniform" blocks in each round, or a shuffled "cycle" without
replacement, which takes each block once in ceil(L / n) rounds, the last of which has fewer where n does not divide L.
`scope`: one draw for all ("global") or one per "site", where each block is averaged over the sites that trained it.
The draw comes from (run seed, round[, site]), so that a resumed run repeats it and `check` predicts its bytes.
The identity that pins it: with all blocks in every round and the default target it is `attention`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field

from consilium import registry, seeds, tensors
from consilium.errors import ConfigError
from consilium.protocols import Attached, Backbone, Combination, Part, Selector, Specs
from consilium.tensors import Tensors
from consilium.tuners import base

RATE = 1e-3  # AdamW: docs/results/tuners.md
Target = Literal["attention", "mlp", "norm", "block", "qkv", "proj", "fc1", "fc2", "norm1", "norm2"]
_SUBMODULES: Mapping[Target, tuple[str, ...] | None] = {
    "attention": ("qkv", "proj"),
    "mlp": ("fc1", "fc2"),
    "norm": ("norm1", "norm2", "norm"),  # those inside of an attention and an MLP too
    "block": None,  # everything, layer scales too
    "qkv": ("qkv",),
    "proj": ("proj",),
    "fc1": ("fc1",),
    "fc2": ("fc2",),
    "norm1": ("norm1",),
    "norm2": ("norm2",),
}


class StochasticBlockOptions(registry.Options):
    """Options of `[[tuner]] name = "stochastic_block"`."""

    blocks_per_round: int = Field(default=1, ge=1)
    draw: Literal["uniform", "cycle"] = "uniform"
    scope: Literal["global", "site"] = "global"
    blocks: tuple[int, ...] | None = None  # that can be drawn; None: all
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("attention",)


@registry.register(
    "tuners",
    "stochastic_block",
    options=StochasticBlockOptions,
    summary="attention, or another sub-module, of a few blocks drawn anew in every round",
    source="Alkhunaizi et al. 2024, arXiv 2407.11573",
    facts={
        "start": "identity",
        "merge": "exact",
        "moments": "reset",
        "formula": "W of block b_t, b_t drawn from (seed, round[, site])",
        "count": "4 d^2 + 4 d per block and round; 2,362,368 for ViT-B",
    },
)
class StochasticBlock:
    """Trains a sub-module of the blocks that the round draws."""

    def __init__(self, options: StochasticBlockOptions) -> None:
        self.options = options

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Name the sub-module's parameters in every block that can be drawn; ConfigError where they are too few."""
        part = base.only_part("stochastic_block", parts, combination)
        return replace(base.own_tensors(backbone, self._own(backbone), part, RATE), forgets_moments=True)

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:
        """The blocks drawn for this round, and this site if the scope is a site."""
        blocks = sorted({spec.tag.block for spec in specs.values() if spec.tag.block is not None})
        drawn = self.drawn(blocks, round, site, seed)
        return lambda tag: tag.block in drawn

    def drawn(self, blocks: Sequence[int], round: int, site: str, seed: int) -> frozenset[int]:
        """Which of `blocks` are trained in `round` (from 1)."""
        options, number = self.options, self.options.blocks_per_round
        length = -(-len(blocks) // number)  # of a cycle, in rounds
        shuffle, at = divmod(round - 1, length) if options.draw == "cycle" else (round, 0)
        purpose = f"stochastic_block/{'+'.join(sorted(set(options.targets)))}"
        draw = seeds.generator(seed, round=shuffle, site=site if options.scope == "site" else "", purpose=purpose)
        order = torch.randperm(len(blocks), generator=draw).tolist()
        return frozenset(blocks[index] for index in order[at * number : (at + 1) * number])

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        """Write the variables into the backbone."""
        base.replace(backbone.module, tensors.select(variables, self._own(backbone)))

    def _own(self, backbone: Backbone) -> Tensors:
        chosen = base.blocks_or_all(backbone, self.options.blocks, "tuner.blocks")
        if self.options.blocks_per_round > len(chosen):
            raise ConfigError(
                "more blocks per round than there are to draw from",
                where="tuner.blocks_per_round",
                allowed=f"1 to {len(chosen)}",
                received=self.options.blocks_per_round,
            )
        found = {target: base.in_blocks(backbone, chosen, _SUBMODULES[target]) for target in self.options.targets}
        if missing := [target for target, own in found.items() if not own]:
            allowed = [target for target, roles in _SUBMODULES.items() if base.in_blocks(backbone, chosen, roles)]
            raise ConfigError("no block has this", where="tuner.targets", allowed=allowed, received=missing)
        return {name: value for own in found.values() for name, value in own.items()}
