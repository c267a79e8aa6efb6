"""Stage 3, tuners. In: a frozen backbone. Out: learnt tokens in its sequence, in front of the first or of every block.

VPT: Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119.

    P, P_l -> tokens.l [length, d], or [length, project] with a projection      p -> length      l -> layer, from 0
    [x, Z, E] -> [prefix, tokens, patches], prefix: class, distillation and register tokens, where there are any

Several parts are added entry by entry, a shared prompt and a personal correction: the first part is drawn, the tokens
of the others start at zero, as does the bias of their projections. There is no token router for tokens.

Leaves the site: tokens and projections of the shared parts. Stays: personal parts. Kept between rounds: nothing else.
Departures: with a norm in front of the blocks (CLIP) prompts enter behind it; average pools see patches alone.
The identity that pins it: a loop over timm's own blocks in float64; deep prompts that are what shallow ones became.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from consilium import registry, seeds
from consilium.protocols import Attached, Backbone, Combination, Part, Selector, Spec, Specs, Tag
from consilium.tensors import Tensors
from consilium.tuners import tokens
from consilium.tuners.stacking import affine

RATES = {"prompt": 1e-2, "prompt_projection": 2e-3}  # AdamW


class PromptsOptions(registry.Options):
    """Options of `[[tuner]] name = "prompts"`."""

    length: int = Field(default=10, ge=1)  # tokens
    depth: tokens.Depth = "shallow"
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of the tokens, in training only
    project: int | None = Field(default=None, ge=1)  # columns of tokens that one linear map per part projects to d


class Prompts(nn.Module):
    """One part: tokens [length, columns] per layer and perhaps their projection, empty until variables come."""

    def __init__(self, like: Tensor, options: PromptsOptions, layers: int, width: int) -> None:
        super().__init__()
        shape = (options.length, options.project or width)
        self.tokens = nn.ParameterList(nn.Parameter(like.new_zeros(shape), requires_grad=False) for _ in range(layers))
        self.projection = None
        if options.project is not None:  # no nn.Linear, which would draw start values from torch's global generator
            empty = {"weight": like.new_zeros(width, options.project), "bias": like.new_zeros(width)}
            held = {name: nn.Parameter(value, requires_grad=False) for name, value in empty.items()}
            self.projection = nn.ParameterDict(held)

    def forward(self, layer: int) -> Tensor:
        """[length, d]."""
        found: Tensor = self.tokens[layer]
        return found if self.projection is None else affine(found, **self.projection)


class PromptsAdapter(tokens.Tokens):
    """All parts, added up."""

    def __init__(self, backbone: Backbone, options: PromptsOptions, parts: Sequence[Part]) -> None:
        layers = tokens.num_layers(backbone, options.depth)
        super().__init__(options.length, layers, options.dropout)
        self.parts = tuple(part.name for part in parts)
        like, width = next(backbone.module.parameters()), tokens.width(backbone)
        for part in self.parts:
            self.add_module(part, Prompts(like, options, layers, width))

    def forward(self, layer: int) -> Tensor:
        """P_layer [length, d]."""
        each: list[Tensor] = [self.get_submodule(part)(layer) for part in self.parts]
        return sum(each[1:], start=each[0])


@registry.register(
    "tuners",
    "prompts",
    options=PromptsOptions,
    summary="learnt tokens before the first or every block",
    source="Jia et al. 2022, arXiv 2203.12119",
    facts={
        "start": "changed",
        "merge": "refused",
        "merge_refused": tokens.NO_MERGE,
        "formula": "[prefix, P, patches]; deep: P_l takes the place of P_(l-1) before block l",
        "count": "shallow p d, deep L p d; 768 p and 9,216 p on ViT-B",
    },
)
class PromptsTuner:
    """Adds tokens to the sequence."""

    def __init__(self, options: PromptsOptions) -> None:
        self.options, self.stackable = options, not options.dropout

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        """Put tokens in front of the first or every block. ConfigError for a router, or where prompts are already."""
        tokens.require_sum("prompts", parts, combination)
        adapter = PromptsAdapter(backbone, self.options, parts)
        tokens.insert(backbone, "prompts", adapter)
        specs = {f"prompts.{name}": Spec(tuple(v.shape), _tag(name)) for name, v in adapter.named_parameters()}
        columns = self.options.project or tokens.width(backbone)
        limits = {"prompt": tokens.bound(backbone, columns), "prompt_projection": columns**-0.5}

        def initial(seed: int) -> Tensors:
            limit = {name: limits[s.tag.role] if s.tag.part == parts[0].name else 0.0 for name, s in specs.items()}
            return {name: _start(name, spec, seed, limit[name]) for name, spec in specs.items()}

        return Attached(specs, initial, RATES, merge_refused=tokens.no_merge("prompts").what)

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:  # noqa: ARG002
        """Everything."""
        return lambda _: True

    def merge(self, backbone: Backbone, variables: Tensors) -> None:  # noqa: ARG002
        """Always a ConfigError: tokens are no weights."""
        raise tokens.no_merge("prompts")


def _tag(name: str) -> Tag:
    part, kind, last = name.split(".")
    role, block = ("prompt", int(last)) if kind == "tokens" else ("prompt_projection", None)
    return Tag(f"prompts.{part}.{kind}", role, part, block)


def _start(name: str, spec: Spec, seed: int, limit: float) -> Tensor:
    """As published: tokens and bias uniform within their limit (v; 1 / sqrt(columns)), weight Kaiming normal."""
    value = torch.zeros([size or 0 for size in spec.shape])
    draw = seeds.generator(seed, purpose=f"init/{name}")
    if name.endswith(".weight"):
        return nn.init.kaiming_normal_(value, mode="fan_out", generator=draw)
    return value.uniform_(-limit, limit, generator=draw)
