"""A pre-norm ViT written out in float64: the slow reference for what tuners put between its operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from consilium.tuners import compose
from tests import small

WIDTH, HEADS, PATCH, DEPTH = 16, 2, 8, 2
Edit = Callable[[str, Tensor, Tensor], Tensor]  # (name of the operation, its output, its input) -> what goes on


def features(edit: Edit) -> Tensor:
    """Features [3, 16] of `small.backbone()` for `small.images()`, with every operation's output edited.

    Operations: patch_embed.proj, norm, and in blocks.N: norm1, attn.qkv, attn.proj, attn, norm2, mlp.fc1, mlp.act,
    mlp.fc2, mlp; attn and mlp are whole branches.
    """
    w = {name: value.double() for name, value in small.backbone().module.state_dict().items()}
    images = small.images().double()
    patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    tokens = edit(
        "patch_embed.proj", patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"], patches
    )
    x = torch.cat([w["cls_token"].expand(len(images), -1, -1), tokens], dim=1) + w["pos_embed"]
    for block in range(DEPTH):
        x = _block(f"blocks.{block}.", x, w, edit)
    return _norm("norm", x, w, edit)[:, 0]


def _block(at: str, x: Tensor, w: Mapping[str, Tensor], edit: Edit) -> Tensor:
    inside = _norm(f"{at}norm1", x, w, edit)
    q, k, v = _heads(_linear(f"{at}attn.qkv", inside, w, edit))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / (WIDTH // HEADS) ** 0.5
    mixed = torch.einsum("bhij,bhjd->bihd", scores.exp() / scores.exp().sum(-1, keepdim=True), v).flatten(2)
    x = x + edit(f"{at}attn", _linear(f"{at}attn.proj", mixed, w, edit), inside)
    inside = _norm(f"{at}norm2", x, w, edit)
    wide = _linear(f"{at}mlp.fc1", inside, w, edit)
    hidden = edit(f"{at}mlp.act", wide * (1 + torch.erf(wide / 2**0.5)) / 2, wide)
    return x + edit(f"{at}mlp", _linear(f"{at}mlp.fc2", hidden, w, edit), inside)


def _linear(name: str, x: Tensor, w: Mapping[str, Tensor], edit: Edit) -> Tensor:
    return edit(name, x @ w[f"{name}.weight"].T + w[f"{name}.bias"], x)


def _norm(name: str, x: Tensor, w: Mapping[str, Tensor], edit: Edit) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return edit(name, unit * w[f"{name}.weight"] + w[f"{name}.bias"], x)


def _heads(qkv: Tensor) -> list[Tensor]:
    """[b, n, 3 d] -> q, k, v, each [b, heads, n, d / heads]."""
    return [each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in qkv.chunk(3, dim=-1)]


def plain() -> Tensor:
    """The same features without any edit."""
    return features(lambda _, output, __: output)


def start(model: compose.TunedModel) -> dict[str, Tensor]:
    """float64 variables at their start."""
    return {name: value.double() for name, value in model.initial(0).items()}


def moved(model: compose.TunedModel, by: float = 0.1) -> dict[str, Tensor]:
    """float64 variables away from their start."""
    return {name: value.double() for name, value in small.moved(dict(model.initial(0)), by).items()}


def assert_merged_equals_unmerged(model: compose.TunedModel) -> None:
    """To 1e-10, for a model in float64."""
    variables, images = moved(model), small.images().double()
    before, at_start = model.features(variables, images), model.features(start(model), images)
    after = compose.merge(model, variables)(images)
    assert not torch.allclose(before, at_start)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)


def assert_gradients_are_finite_differences(model: compose.TunedModel) -> None:
    """For a model in float64, by all variables of its tuners."""
    variables, images = moved(model), small.images(1).double()
    names = [name for name in variables if not name.startswith("head.")]

    def function(*values: Tensor) -> Tensor:
        return model.features({**variables, **dict(zip(names, values, strict=True))}, images)

    assert torch.autograd.gradcheck(function, [variables[name].requires_grad_() for name in names], fast_mode=True)
