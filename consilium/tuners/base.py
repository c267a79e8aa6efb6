"""Stage 3, tuners. In: a backbone. Out: its own parameters, told apart from what tuners added, and their tags."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from consilium.errors import ConfigError
from consilium.protocols import Backbone, Combination, Part, Tag
from consilium.tensors import Tensors


class Adapter(nn.Module):
    """Base of every module that a tuner hangs into a backbone; what is below it does not belong to the backbone."""


def parameters(module: nn.Module, prefix: str = "") -> dict[str, nn.Parameter]:
    """The backbone's own parameters by name, whatever tuners were attached before."""
    found = {f"{prefix}{name}": own for name, own in module.named_parameters(recurse=False)}
    for name, child in module.named_children():
        if not isinstance(child, Adapter):
            found |= parameters(child, f"{prefix}{name}.")
    return found


def replace(module: nn.Module, values: Tensors) -> None:
    """Give parameters new values. The old tensors stay as they are: other models may share them."""
    for name, value in values.items():
        holder, _, own = name.rpartition(".")
        old = module.get_parameter(name)
        new = nn.Parameter(value.detach().to(old.device, old.dtype, copy=True), requires_grad=False)
        setattr(module.get_submodule(holder), own, new)


def tag(backbone: Backbone, name: str, part: str) -> Tag:
    """Tag of one of the backbone's own parameters; role norm, attention, bias, weight or embedding."""
    module = name.rpartition(".")[0]
    pieces = name.split(".")
    block = int(pieces[1]) if pieces[0] == "blocks" else None
    return Tag(module=module, role=_role(backbone, module, name), part=part, block=block)


def _role(backbone: Backbone, module: str, name: str) -> str:
    place = backbone.modules.get(module)
    if place is not None and place.role.startswith("norm"):
        return "norm"
    if (place is not None and place.role in ("qkv", "proj")) or name.endswith((".q_bias", ".v_bias")):
        return "attention"
    if name.endswith("bias"):
        return "bias"
    return "weight" if name.endswith("weight") else "embedding"  # tokens, positions, layer scales


def blocks_or_all(backbone: Backbone, blocks: Iterable[int] | None, where: str) -> frozenset[int]:
    """The chosen blocks; ConfigError for one that the backbone does not have."""
    chosen = frozenset(range(backbone.num_blocks) if blocks is None else blocks)
    beyond = sorted(block for block in chosen if not 0 <= block < backbone.num_blocks)
    if beyond:
        raise ConfigError(
            "the backbone has no such block",
            where=where,
            allowed=f"0 to {backbone.num_blocks - 1} ({backbone.name})",
            received=beyond,
        )
    return chosen


def only_part(tuner: str, parts: Iterable[Part], combination: Combination) -> Part:
    """The single part of a tuner whose tensors are the backbone's own: they exist once and cannot be summed."""
    listed = list(parts)
    if len(listed) != 1 or combination != "sum":
        raise ConfigError(
            f"{tuner!r} trains the backbone's own tensors, which exist once; this strategy needs several adapters",
            where="tuner.name",
            allowed="a tuner that adds modules, such as lora",
            received=f"{tuner} with parts {[part.name for part in listed]}",
        )
    return listed[0]
