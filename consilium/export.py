"""Composition: adapters for other tools. In: a run folder. Out: a folder that `peft` or plain timm reads.

Both formats hold `config.json` as the model hub has it (architecture, arguments, preprocessing, class names), and a
manifest in the header of the safetensors file.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor

from consilium import __version__, checkpoint, seeds, tensors
from consilium.backbones import timm_backbone
from consilium.errors import ConfigError, StateError
from consilium.predict import Trained, load_trained
from consilium.tensors import Tensors
from consilium.tuners import base, compose
from consilium.tuners.linear import Linear
from consilium.tuners.lora import Lora, factors

Format = Literal["peft", "timm"]


def export(run: Path, format: Format, out: Path, site: str | None = None) -> Path:
    """Write the model of a finished run (of `site`, or the global one) into the empty folder `out`.

    peft: `PeftModel.from_pretrained(timm.create_model(architecture, num_classes=C, **model_args), out)`, the base with
    the run's own weights. timm: `model.safetensors` loads strictly into that same timm model. ConfigError where the
    format has no way to say it, StateError where `out` is in use.
    """
    if out.exists() and any(out.iterdir()):
        raise StateError("the folder to export into is not empty", where=str(out), remedy="choose another --out")
    trained = load_trained(run, site, device="cpu")
    if trained.model.head.config.kind != "linear":
        raise ConfigError(
            "timm classifiers are linear; this run has another head",
            where="head.kind",
            received="mlp",
            allowed="linear",
        )
    files = {"peft": _peft, "timm": _timm}[format](trained)
    checkpoint.write_json(out / "config.json", _config(trained))
    for name, content in files.items():
        if isinstance(content, dict):
            checkpoint.write_json(out / name, content)
        else:
            checkpoint.write_bytes(out / name, content)
    return out


def _timm(trained: Trained) -> dict[str, bytes]:
    """Everything folded into the backbone's own weights; compared with the model it came from."""
    size = trained.experiment.backbone.preprocessing.image_size
    images = torch.randn(2, 3, size, size, generator=seeds.generator(0, purpose="export"))
    with torch.no_grad():
        expected = trained.model.forward(trained.variables, images)
        merged = compose.merge(trained.model, trained.variables)
    state = tensors.detach({**merged.state_dict(), **_classifier(trained)})
    plain = _plain(trained)
    plain.load_state_dict(state, strict=True)
    with torch.no_grad():
        difference = float((plain.eval()(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not difference < 1e-3:
        raise StateError("the merged model does not give the outputs of the run's model", received=f"{difference:.2g}")
    return {"model.safetensors": tensors.dumps(state, _manifest(trained, "timm"))}


def _peft(trained: Trained) -> dict[str, Any]:
    _require_lora(trained)
    module = trained.model.backbone.module
    layers = {
        name: factors(module.get_submodule(name), name, trained.variables)
        for name in trained.model.backbone.modules
        if hasattr(module.get_submodule(name), "lora")
    }
    state: dict[str, Tensor] = {f"base_model.model.{name}": value for name, value in _classifier(trained).items()}
    for name, (a, b, _) in layers.items():
        state |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    return {
        "adapter_config.json": _adapter_config(trained, {name: (len(a), s) for name, (a, _, s) in layers.items()}),
        "adapter_model.safetensors": tensors.dumps(tensors.detach(state), _manifest(trained, "peft")),
    }


def _adapter_config(trained: Trained, layers: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """Ranks and scales layer by layer; layers by their whole names, so that patch_embed.proj is never among them."""
    rank, scale = Counter(layers.values()).most_common(1)[0][0]
    special = {name: pair for name, pair in layers.items() if pair != (rank, scale)}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": trained.experiment.backbone.name,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": sorted(layers),
        "modules_to_save": sorted({name.partition(".")[0] for name in _classifier(trained)}),
        "rank_pattern": {name: pair[0] for name, pair in special.items()},
        "alpha_pattern": {name: pair[0] * pair[1] for name, pair in special.items()},
    }


def _require_lora(trained: Trained) -> None:
    """ConfigError for what `peft` has no words for, or would not carry out on a plain timm model."""
    model = trained.model
    remedy = "export with --format timm"
    kinds = [type(tuner).__name__.lower() for tuner in model.tuners if not isinstance(tuner, Lora | Linear)]
    if kinds or not any(isinstance(tuner, Lora) for tuner in model.tuners):
        received = ", ".join(kinds) or "a head alone"
        raise ConfigError("peft has no such method", where="tuner", allowed="lora", received=received, remedy=remedy)
    if changed := sorted(trained.variables.keys() & base.parameters(model.backbone.module).keys()):
        raise ConfigError("the run changed the backbone itself", where="strategy", received=changed[:3], remedy=remedy)
    bypassed = [
        name
        for name, place in model.backbone.modules.items()
        if place.role == "qkv" and f"{name.removesuffix('qkv')}q_bias" in base.parameters(model.backbone.module)
    ]
    if any(hasattr(model.backbone.module.get_submodule(name), "lora") for name in bypassed):
        what = "plain timm computes this attention without calling its qkv module, so peft's adapter would do nothing"
        raise ConfigError(what, where="tuner.targets", received="qkv", remedy=remedy)


def _classifier(trained: Trained) -> dict[str, Tensor]:
    """The head by timm's names; a distilled model has two and averages them, so both get the same."""
    names = ("head", "head_dist") if hasattr(trained.model.backbone.module, "head_dist") else ("head",)
    values: Tensors = {**trained.model.head_start, **trained.variables}
    return {f"{name}.{end}": values[f"head.{end}"].clone() for name in names for end in ("weight", "bias")}


def _plain(trained: Trained) -> torch.nn.Module:
    config = _config(trained)
    built: torch.nn.Module = timm.create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    )
    return built


def _config(trained: Trained) -> dict[str, Any]:
    pieces, own = trained.experiment, trained.experiment.backbone.preprocessing
    architecture, arguments = timm_backbone.recipe(pieces.config.backbone)
    name, _, tag = architecture.partition(".")
    size, classes = own.image_size, list(pieces.task.classes)
    return {
        "architecture": name,
        "num_classes": len(classes),
        "num_features": pieces.backbone.num_features,
        "model_args": {**arguments, "img_size": size},
        "pretrained_cfg": {
            "tag": tag,
            "num_classes": len(classes),
            "label_names": classes,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "mean": list(own.mean),
            "std": list(own.std),
            "interpolation": own.interpolation,
            "crop_pct": own.crop_fraction,
            "crop_mode": own.crop_mode,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": pieces.backbone.licence,
        },
    }


def _manifest(trained: Trained, format: Format) -> dict[str, object]:
    pieces = trained.experiment
    return {
        "format": format,
        "consilium_version": __version__,
        "run": pieces.config.name,
        "model": trained.name,
        "classes": list(pieces.task.classes),
        "backbone": {
            "name": pieces.backbone.name,
            "digest": pieces.backbone.digest,
            "licence": pieces.backbone.licence,
        },
        "preprocessing": vars(pieces.backbone.preprocessing),
        "tuner": [table.model_dump(mode="json") for table in pieces.config.tuner],
    }
