"""Stage 3, tuners. In: a backbone. Out: its own parameters, told apart from what tuners added, and their tags."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from timm.layers.attention import Attention, AttentionRope
from torch import nn

from consilium import tensors
from consilium.errors import ConfigError
from consilium.protocols import Attached, Backbone, Combination, ModuleRole, Part, Spec, Tag
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


def place(backbone: Backbone, name: str) -> ModuleRole:
    """Role and block of one of the backbone's own parameters; the role is empty where its module has none."""
    known = backbone.modules.get(name.rpartition(".")[0])
    if known is not None:
        return known
    pieces = name.split(".")
    beside = name.endswith((".q_bias", ".v_bias"))  # EVA keeps them beside its fused qkv
    return ModuleRole("qkv" if beside else "", int(pieces[1]) if pieces[0] == "blocks" else None)


def tag(backbone: Backbone, name: str, part: str) -> Tag:
    """Tag of one of the backbone's own parameters; role norm, attention, bias, weight or embedding."""
    where = place(backbone, name)
    return Tag(module=name.rpartition(".")[0], role=_role(where.role, name), part=part, block=where.block)


def _role(role: str, name: str) -> str:
    if role.startswith("norm"):
        return "norm"
    if role in ("qkv", "proj"):
        return "attention"
    if name.endswith("bias"):
        return "bias"
    return "weight" if name.endswith("weight") else "embedding"  # tokens, positions, layer scales


def in_blocks(backbone: Backbone, blocks: Iterable[int], roles: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The backbone's own parameters in these blocks whose modules have one of these roles; None: whatever the role."""
    own = parameters(backbone.module)
    places = {name: place(backbone, name) for name in own}
    inside = {name: at for name, at in places.items() if at.block in frozenset(blocks)}
    return {name: own[name] for name, at in inside.items() if roles is None or at.role in roles}


def own_tensors(backbone: Backbone, chosen: Tensors, part: Part, rate: float, role: str | None = None) -> Attached:
    """Parameters of the backbone as variables that start at their pre-trained values, all at one rate; with a `role`
    in place of their own ones, where one is given."""
    specs = {}
    for name, value in chosen.items():
        own = tag(backbone, name, part.name)
        specs[name] = Spec(tuple(value.shape), dataclasses.replace(own, role=role or own.role), value.dtype)
    rates = dict.fromkeys(sorted({spec.tag.role for spec in specs.values()}), rate)
    return Attached(specs=specs, initial=lambda _: tensors.detach(chosen), learning_rates=rates)


def blocks_or_all(backbone: Backbone, blocks: Iterable[int] | None, where: str) -> frozenset[int]:
    """The chosen blocks; ConfigError for one that the backbone does not have, and where none is chosen."""
    chosen = frozenset(range(backbone.num_blocks) if blocks is None else blocks)
    beyond = sorted(block for block in chosen if not 0 <= block < backbone.num_blocks)
    if beyond or not chosen:
        what = "the backbone has no such block" if beyond else "no block is chosen"
        allowed = f"0 to {backbone.num_blocks - 1} ({backbone.name})"
        raise ConfigError(what, where=where, allowed=allowed, received=beyond)
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


def ignores_a_shift_of_keys(backbone: Backbone, attention: nn.Module) -> bool:
    """Plain attention: what comes after the keys is their product with queries, then a softmax over keys."""
    plain = isinstance(attention, Attention | AttentionRope) and isinstance(attention.k_norm, nn.Identity)
    return plain and getattr(backbone.module, "rope", None) is None
