"""Stage 2, backbones. In: a timm vision transformer. Out: which of its modules plays which role in which block."""

from __future__ import annotations

import re

from torch import nn

from consilium.protocols import ModuleRole

_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_LINEAR = {
    "qkv": (".attn.qkv", ".attn.q_proj", ".attn.k_proj", ".attn.v_proj"),
    "proj": (".attn.proj",),
    "fc1": (".mlp.fc1", ".mlp.fc1_g", ".mlp.fc1_x"),  # SwiGLU has a gate and a value in the first layer's place
    "fc2": (".mlp.fc2",),
}


def find(module: nn.Module) -> dict[str, ModuleRole]:
    """Dotted name of every linear, norm and patch-embedding module that has a role, in the order of the model."""
    found = {}
    for name, child in module.named_modules():
        match = _BLOCK.match(name)
        role = _role(name, child, match.group(2) if match else None)
        if role is not None:
            found[name] = ModuleRole(role, int(match.group(1)) if match else None)
    return found


def num_blocks(modules: dict[str, ModuleRole]) -> int:
    """How many transformer blocks hold a module with a role."""
    return len({place.block for place in modules.values() if place.block is not None})


def _role(name: str, module: nn.Module, inside: str | None) -> str | None:
    if _is_norm(module):
        last = name.rpartition(".")[2]
        return last if inside and last in ("norm1", "norm2") else "norm"
    biases_positions = ".rel_pos." in name  # by an MLP of its own
    if isinstance(module, nn.Linear) and inside and not biases_positions:
        return next((role for role, ends in _LINEAR.items() if f".{inside}".endswith(ends)), None)
    return "patch_embed" if name == "patch_embed.proj" else None


def _is_norm(module: nn.Module) -> bool:
    """A module whose own tensors are a scale over channels and perhaps a shift: LayerNorm, RMSNorm and variants."""
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and own["weight"].ndim == 1 and own.keys() <= {"weight", "bias"}
