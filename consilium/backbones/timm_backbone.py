"""Stage 2, backbones. In: the `[backbone]` table. Out: a frozen timm ViT with digest, roles and preprocessing.

Any timm model whose blocks hold an attention and an MLP: ViT, DeiT (distilled too), DINOv2 with and without registers,
EVA; fused or separate q, k, v. Names of modules and parameters stay timm's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from consilium import seeds, tensors
from consilium.backbones import roles, weights
from consilium.config import BackboneConfig
from consilium.data import Preprocessing
from consilium.errors import BackboneError
from consilium.protocols import Backbone, ModuleRole

_OVERRIDES = ("mean", "std", "interpolation", "crop_fraction", "crop_mode")


def load(config: BackboneConfig) -> Backbone:
    """Build, load strictly, freeze. BackboneError for unknown names, models that are no ViT, weights that misfit."""
    found = _weights(config)
    return assemble(config.name, found, _preprocessing(config, found.settings))


def recipe(config: BackboneConfig) -> tuple[str, dict[str, Any]]:
    """What `timm.create_model` needs to build the same module: a name, and arguments that are not its defaults."""
    if config.name != "embedded":
        return config.name, {}
    found = weights.embedded(pretrained=False)
    return found.architecture, {key: value for key, value in found.arguments.items() if key != "num_classes"}


def assemble(name: str, found: weights.Weights, preprocessing: Preprocessing) -> Backbone:
    """The same from weights in hand."""
    module = _build(found, preprocessing.image_size).eval().requires_grad_(False)
    places = roles.find(module)
    _require_vit(name, module, places)
    _require_whole_patches(module, preprocessing.image_size)
    _reach_qkv(module)
    return Backbone(
        module=module,
        name=name,
        digest=_digest(module, found),
        preprocessing=preprocessing,
        modules=places,
        num_blocks=roles.num_blocks(places),
        num_features=_num_features(name, module, preprocessing.image_size),
        num_parameters=sum(parameter.numel() for parameter in module.parameters()),
        licence=str(found.settings.get("license", "unknown")),
    )


def _weights(config: BackboneConfig) -> weights.Weights:
    if config.name == "embedded":
        if config.weights not in (None, "embedded", "random"):
            raise BackboneError(
                "the embedded backbone has its own weights", where="backbone.weights", received=config.weights
            )
        return weights.embedded(pretrained=config.weights != "random")
    if config.weights == "embedded":
        raise BackboneError(
            "the embedded weights fit the embedded backbone only",
            where="backbone.name",
            allowed="embedded",
            received=config.name,
        )
    if config.weights == "random":
        return weights.at_random(config.name)
    return (
        weights.from_hub(config.name)
        if config.weights is None
        else weights.from_file(config.name, Path(config.weights))
    )


def _preprocessing(config: BackboneConfig, settings: Mapping[str, Any]) -> Preprocessing:
    """What the weights were trained with, unless the configuration says otherwise."""
    own = {
        "mean": tuple(settings.get("mean", (0.5, 0.5, 0.5))),
        "std": tuple(settings.get("std", (0.5, 0.5, 0.5))),
        "interpolation": settings.get("interpolation", "bicubic"),
        "crop_fraction": settings.get("crop_pct", 1.0),
        "crop_mode": settings.get("crop_mode", "center"),
    }
    given = {key: getattr(config, key) for key in _OVERRIDES if getattr(config, key) is not None}
    native = settings.get("input_size", (3, 224, 224))
    return Preprocessing(image_size=config.image_size or int(native[-1]), **{**own, **given})


def _build(found: weights.Weights, image_size: int) -> nn.Module:
    """timm's own loader, strict; its checkpoint filter converts foreign names and resamples position embeddings."""
    overlay: dict[str, Any] = {"num_classes": 0, "label_offset": 0}
    if found.tensors is not None:
        overlay |= {"state_dict": dict(found.tensors), "custom_load": False, "source": None}
    arguments = {**found.arguments, "num_classes": 0, "img_size": image_size}
    try:
        with seeds.ambient(seeds.derive(0, purpose=f"backbone/{found.architecture}")):
            module: nn.Module = timm.create_model(
                found.architecture, pretrained=found.tensors is not None, pretrained_cfg_overlay=overlay, **arguments
            )
    except (RuntimeError, TypeError, AssertionError, KeyError, ValueError, AttributeError) as error:
        raise _misfit(found.architecture, error) from error
    for name in ("pretrained_cfg", "default_cfg"):
        setattr(module, name, {})  # they hold a second copy of the weights
    return module


def _misfit(architecture: str, error: Exception) -> BackboneError:
    if isinstance(error, TypeError) and "img_size" in str(error):
        return _no_vit(architecture, "it takes no image size")
    return BackboneError(
        "the weights do not fit the architecture",
        where=f"backbone {architecture}",
        received=re.sub(r"\s+", " ", str(error))[:600],
        remedy="give the timm name under which these weights were trained",
    )


def _require_vit(name: str, module: nn.Module, places: Mapping[str, ModuleRole]) -> None:
    held: dict[int, set[str]] = {}
    for place in places.values():
        if place.block is not None:
            held.setdefault(place.block, set()).add(place.role)
    blocks = getattr(module, "blocks", None)
    depth = len(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else 0
    if not depth or any(not {"qkv", "proj", "fc1", "fc2"} <= held.get(block, set()) for block in range(depth)):
        raise _no_vit(name, "its blocks have no attention with qkv and proj beside an MLP with fc1 and fc2")


def _require_whole_patches(module: nn.Module, image_size: int) -> None:
    patch = int(getattr(module.get_submodule("patch_embed"), "patch_size", (1,))[0])
    if image_size % patch:
        below = max(image_size // patch, 1) * patch
        raise BackboneError(
            "the image must be made of whole patches; timm would drop the rest without a word",
            where="backbone.image_size",
            allowed=f"a multiple of {patch}, such as {below} or {below + patch}",
            received=image_size,
        )


def _no_vit(name: str, reason: str) -> BackboneError:
    return BackboneError(
        "this model is not a supported vision transformer",
        where="backbone.name",
        allowed="timm models such as vit_*, deit*, eva*",
        received=f"{name}: {reason}",
    )


def _reach_qkv(module: nn.Module) -> None:
    """EVA adds its q and v bias inside one functional call that never calls the qkv module, so an adapter hooked there
    would be bypassed; adding the bias separately is the same function and calls it."""
    for child in module.modules():
        if hasattr(child, "qkv_bias_separate"):
            child.__dict__["qkv_bias_separate"] = True


def _digest(module: nn.Module, found: weights.Weights) -> str:
    """Over all frozen weights; a resampled tensor counts as it was before, because the bits of an interpolation differ
    between processors and hospitals must agree on the digest."""
    state: dict[str, Tensor] = module.state_dict()
    original = found.tensors or {}
    resampled = {name for name in state.keys() & original.keys() if state[name].shape != original[name].shape}
    before = {name: original[name].to(state[name].dtype) for name in resampled}
    return tensors.digest_all({**state, **before})


@torch.no_grad()
def _num_features(name: str, module: nn.Module, image_size: int) -> int:
    features = module(torch.zeros(1, 3, image_size, image_size))
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise _no_vit(name, "it gives no single feature vector per image")
    return int(features.shape[1])
