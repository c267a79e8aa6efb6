"""Stage 3, tuners. In: a frozen backbone. Out: learnt tokens in its sequence that are a product of two small factors.

Low-rank decomposition of visual prompts (DVPT): Alkhunaizi et al., "Probing the Efficacy of Federated
Parameter-Efficient Fine-Tuning of Vision Transformers for Medical Image Classification", MICCAI workshops 2024, arXiv
2407.11573; the prompts are VPT's, see `prompts`. The paper's code is not public: this factorisation, its start and its
three forms (shallow, deep, deep with one basis for all layers) are ours.

    P_l = offset_l + sum over parts of L_l R_l      L_l -> left.l [length, rank]      R_l -> right.l [rank, d]

`offset` is frozen and zero: what strategies that fold a product into a base fold it into. With `share_basis` there is
one R = right.0. Start: L and R uniform in (-u, u), u = (3 v^2 / rank)^(1/4). Then an entry of P, a sum of `rank`
products, has variance rank (u^2 / 3)^2 = v^2 / 3, which is that of VPT's U(-v, v). Parts behind the first have L = 0.

Leaves the site: left and right of the shared parts. Stays: personal parts. Kept between rounds: nothing else.
Departures: none can be stated, since the original is not public.
The identity that pins it: it is `prompts` with the tokens L R; any factors with the same product are the same model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from consilium import registry, seeds
from consilium.errors import ConfigError
from consilium.protocols import Attached, Backbone, Combination, Factor, Part, Selector, Spec, Specs, Tag
from consilium.tensors import Tensors
from consilium.tuners import tokens

NAME = "low_rank_prompts"
RATES = {"prompt_left": 1e-2, "prompt_right": 1e-2}  # AdamW


class LowRankPromptsOptions(registry.Options):
    """Options of `[[tuner]] name = "low_rank_prompts"`."""

    length: int = Field(default=50, ge=1)  # tokens
    rank: int = Field(default=4, ge=1)
    depth: tokens.Depth = "shallow"
    share_basis: bool = False  # one R for the prompts of all blocks
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of the tokens, in training only

    @model_validator(mode="after")
    def _layers_to_share(self) -> LowRankPromptsOptions:
        if self.share_basis and self.depth == "shallow":
            raise ValueError('share_basis needs depth = "deep": shallow prompts are one product')
        return self


class Factors(nn.Module):
    """One part: left [length, rank] per layer, right [rank, d] per layer or once, empty until variables come."""

    def __init__(self, like: Tensor, left: tuple[int, int], right: tuple[int, int], layers: int, bases: int) -> None:
        super().__init__()
        self.left = _zeros(like, left, layers)
        self.right = _zeros(like, right, bases)

    def forward(self, layer: int) -> Tensor:
        """L_layer R_layer [length, d]."""
        product: Tensor = self.left[layer] @ self.right[min(layer, len(self.right) - 1)]
        return product


class LowRankPromptsAdapter(tokens.Tokens):
    """All parts, added to the offset."""

    def __init__(self, backbone: Backbone, options: LowRankPromptsOptions, ranks: dict[str, int]) -> None:
        layers, width = tokens.num_layers(backbone, options.depth), tokens.width(backbone)
        super().__init__(options.length, layers, options.dropout)
        self.parts, like = tuple(ranks), next(backbone.module.parameters())
        self.offset = _zeros(like, (options.length, width), layers)
        for part, rank in ranks.items():
            bases = 1 if options.share_basis else layers
            self.add_module(part, Factors(like, (options.length, rank), (rank, width), layers, bases))

    def forward(self, layer: int) -> Tensor:
        """P_layer [length, d]."""
        offset: Tensor = self.offset[layer]
        return sum((self.get_submodule(part)(layer) for part in self.parts), start=offset)


@registry.register(
    "tuners",
    NAME,
    options=LowRankPromptsOptions,
    summary="learnt tokens that are a product of two small factors",
    source="Alkhunaizi et al. 2024, arXiv 2407.11573; the factorisation is ours",
    facts={
        "start": "changed",
        "merge": "refused",
        "merge_refused": tokens.NO_MERGE,
        "formula": "prompts with P = L R; deep: P_l = L_l R_l, or L_l R",
        "count": "r (p + d); deep L r (p + d), or L p r + r d; r (p + 768), 12 r (p + 768), 12 p r + 768 r on ViT-B",
    },
)
class LowRankPrompts:
    """Adds tokens that are products to the sequence."""

    def __init__(self, options: LowRankPromptsOptions) -> None:
        self.options, self.stackable = options, not options.dropout

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Put products in front of the first or every block. ConfigError for a router, where prompts are already, and
        for a rank that saves nothing."""
        tokens.require_sum(NAME, parts, combination)
        width, layers = tokens.width(backbone), tokens.num_layers(backbone, self.options.depth)
        if any(part.ranks for part in parts):
            what = (
                "prompts start as a product, of which a site of a smaller rank would have another: ranks are for lora"
            )
            raise ConfigError(what, where="strategy.ranks", allowed="none with this tuner")
        ranks = {part.name: part.rank or self.options.rank for part in parts}
        for rank in ranks.values():
            _require_saving(self.options, rank, layers, width)
        adapter = LowRankPromptsAdapter(backbone, self.options, ranks)
        tokens.insert(backbone, NAME, adapter)
        trained = {name: v for name, v in adapter.named_parameters() if not name.startswith("offset.")}
        specs = {f"{NAME}.{name}": self._spec(name, tuple(v.shape), layers) for name, v in trained.items()}
        v = tokens.bound(backbone, width)

        def initial(seed: int) -> Tensors:
            return {name: _start(name, spec, seed, v, spec.tag.part == parts[0].name) for name, spec in specs.items()}

        return Attached(specs, initial, RATES, merge_refused=tokens.no_merge(NAME).what)

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        """Everything."""
        return lambda _: True

    def merge(self, backbone: Backbone, variables: Tensors) -> None:  # noqa: ARG002
        """Always a ConfigError: tokens are no weights."""
        raise tokens.no_merge(NAME)

    def _spec(self, name: str, shape: tuple[int, ...], layers: int) -> Spec:
        part, kind, last = name.split(".")
        everywhere = kind == "right" and self.options.share_basis
        tag = Tag(f"{NAME}.{part}.{kind}", f"prompt_{kind}", part, None if everywhere else int(last))
        bases = tuple(f"{NAME}.offset.{layer}" for layer in (range(layers) if everywhere else [int(last)]))
        return Spec(shape, tag, factor=Factor(bases, "left" if kind == "left" else "right"))


def _zeros(like: Tensor, shape: tuple[int, int], count: int) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(like.new_zeros(shape), requires_grad=False) for _ in range(count))


def _require_saving(options: LowRankPromptsOptions, rank: int, layers: int, width: int) -> None:
    """ConfigError for a rank at which the factors are no decomposition, or cost no less than the prompts."""
    whole = layers * options.length * width
    each = layers * options.length + (1 if options.share_basis else layers) * width  # factors of rank 1
    largest = min((whole - 1) // each, options.length - 1)
    if rank <= largest:
        return
    reason = f"rank {rank} takes {rank * each:,} scalars, the prompts themselves {whole:,}"
    if rank >= options.length:
        reason = f"rank {rank} is not below length {options.length}, so no prompt is decomposed; {reason}"
    raise ConfigError(
        f"the factors save nothing over the prompts they stand for: {reason}",
        where="tuner.rank",
        allowed=f"1 to {largest} (length {options.length}, {width} channels)" if largest else "no rank",
        received=rank,
        remedy="lower rank, raise length, or use prompts",
    )


def _start(name: str, spec: Spec, seed: int, v: float, drawn: bool) -> Tensor:
    """Uniform, so that entries of the product vary as VPT's do; left factors of later parts are zero."""
    value = torch.zeros([size or 0 for size in spec.shape])
    rank = value.shape[1] if spec.tag.role == "prompt_left" else value.shape[0]
    limit = (3 * v**2 / rank) ** 0.25 if drawn or spec.tag.role == "prompt_right" else 0.0
    return value.uniform_(-limit, limit, generator=seeds.generator(seed, purpose=f"init/{name}"))
