"""Stage 2, backbones. In: a name and a place of weights. Out: a state dict and the settings it was trained with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file

from consilium.errors import BackboneError
from consilium.tensors import Tensors

PLAIN = "vit_base_patch16_224"  # timm's entry for a VisionTransformer of any size: the card gives the numbers
EMBEDDED = Path(__file__).parent / "embedded"
SETTINGS = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size", "license")


@dataclass(frozen=True)
class Weights:
    """A state dict (None: start at random), the timm architecture it fits, and its settings in timm's words."""

    architecture: str
    tensors: Tensors | None
    settings: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(
        default_factory=dict
    )  # of the architecture, where they are not timm's defaults


def from_hub(name: str) -> Weights:
    """Pre-trained weights by timm name, from the hub or its cache; BackboneError where they cannot be had."""
    settings = timm_settings(name)
    try:
        module = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:
        raise BackboneError(
            "the pre-trained weights could not be fetched",
            where="backbone.name",
            received=f"{name} ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''})",
            remedy="connect to the model hub once (it keeps a cache), or set backbone.weights to a file or 'random'",
        ) from error
    return Weights(name, module.state_dict(), settings)


def from_file(name: str, path: Path) -> Weights:
    """A local safetensors or pickle file for the timm model `name`; a config.json beside it wins over timm's own."""
    settings = {**timm_settings(name), **_settings_beside(path)}
    return Weights(name, _without_classifier(_read(path), timm_settings(name)), settings)


def at_random(name: str) -> Weights:
    """No weights: the architecture's own seeded initialisation, with timm's settings of that name."""
    return Weights(name, None, timm_settings(name))


def embedded(pretrained: bool = True) -> Weights:
    """The small ViT that comes with the package; its checksum is verified."""
    path = EMBEDDED / "embedded.safetensors"
    card = _read_json(EMBEDDED / "card.json")
    if hashlib.sha256(path.read_bytes()).hexdigest() != card["sha256"]:
        raise BackboneError(
            "the embedded weights do not have the checksum of their card", remedy="install the package again"
        )
    own, size = card["preprocessing"], card["preprocessing"]["image_size"]
    settings = {**own, "crop_pct": own["crop_fraction"], "input_size": (3, size, size), "license": card["licence"]}
    return Weights(PLAIN, load_file(path) if pretrained else None, settings, card["architecture"])


def timm_settings(name: str) -> dict[str, Any]:
    """Settings timm has for a name; BackboneError where timm has no such model."""
    if not timm.is_model(name.partition(".")[0]):
        close = timm.list_models(f"{name[:8]}*")[:5]
        raise BackboneError(
            "timm has no model of this name", where="backbone.name", allowed=close or "vit_*", received=name
        )
    try:
        found = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_models(name.partition(".")[0], pretrained=True)
        raise BackboneError(
            "timm has no weights of this name", where="backbone.name", allowed=tags, received=name
        ) from error
    plain = asdict(found) if found is not None else {}
    return {key: plain[key] for key in (*SETTINGS, "classifier") if plain.get(key) is not None}


def _settings_beside(path: Path) -> dict[str, Any]:
    """What config.json beside the weights says, in the hub's nested form or flat."""
    config = path.with_name("config.json")
    if not config.is_file():
        return {}
    table = _read_json(config)
    table = {**table, **table.get("pretrained_cfg", {})}
    if "img_size" in table and "input_size" not in table:
        table["input_size"] = (3, table["img_size"], table["img_size"])
    return {key: table[key] for key in SETTINGS if table.get(key) is not None}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError("the card of the weights cannot be read", where=str(path), received=str(error)) from error
    return found


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        remedy = "put it there, or name another place; a hospital does in its own file: [backbone] weights"
        what = "the file of weights does not exist"
        raise BackboneError(what, where="backbone.weights", received=str(path), remedy=remedy)
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise BackboneError(
            "the file of weights cannot be read",
            where=str(path),
            allowed="safetensors, or a pickle that holds tensors only",
            received=type(error).__name__,  # torch's own text advises to load it unsafely
            remedy="save the model's state dict as safetensors",
        ) from error
    return _unwrap(found, path)


def _unwrap(found: Any, path: Path) -> dict[str, torch.Tensor]:
    """Training scripts wrap the state dict: {"model": ...}, {"state_dict": ...}, {"model_ema": ...}."""
    while isinstance(found, Mapping) and (inner := [k for k in ("model_ema", "model", "state_dict") if k in found]):
        found = found[inner[0]]
    tensors = dict(found) if isinstance(found, Mapping) else {}
    if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise BackboneError("the file holds no state dict", where=str(path), received=type(found).__name__)
    return tensors


def _without_classifier(tensors: Tensors, settings: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The old classifier is never used: the federation brings its own head."""
    names = settings.get("classifier") or "head"
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    return {name: value for name, value in tensors.items() if not name.startswith(prefixes)}
