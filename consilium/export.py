"""Composition: adapters for other tools. In: a run folder. Out: a folder that `peft`, plain timm or `load` reads.

Every format holds `config.json` as the model hub has it (architecture, arguments, preprocessing, class names), and a
manifest in the header of the safetensors file; which tuner goes into which format stands in docs/export.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor

from consilium import __version__, checkpoint, config, instances, members, seeds, tensors
from consilium.backbones import timm_backbone
from consilium.errors import ConfigError, StateError
from consilium.merging import adapters
from consilium.predict import ADAPTER, Trained, load_exported, load_trained
from consilium.tensors import Tensors
from consilium.tuners import base, compose, ia3
from consilium.tuners.lora import factors
from consilium.tuners.low_rank import Folding

Format = Literal["peft", "timm", "safetensors"]
SAFETENSORS = "export with --format safetensors, which takes every tuner"


def export(
    run: Path,
    format: Format,
    out: Path,
    site: str | None = None,
    *,
    sign: Path | None = None,
    counts: bool = False,
    weights: str | None = None,
) -> Path:
    """Write the model of a finished run (of `site`, or the global one) into the empty folder `out`.

    peft: `PeftModel.from_pretrained(timm.create_model(architecture, num_classes=C, **model_args), out)`, the base with
    the run's own weights. timm: `model.safetensors` loads strictly into that same timm model. safetensors: variables as
    they are, of any tuner, for `load` and, signed with a private key, for `merge`; `counts`: with the site's numbers of
    training images. `weights`: as for `load`, of a folder that is no run. ConfigError where the format has no way to
    say it, StateError where `out` is in use.
    """
    if format != "safetensors" and (sign or counts):
        what = "only safetensors can be signed for a merge"
        raise ConfigError(what, where="--sign, --counts", allowed="safetensors", received=format)
    if out.exists() and any(out.iterdir()):
        raise StateError("the folder to export into is not empty", where=str(out), remedy="choose another --out")
    trained = load_trained(run, site, "cpu", weights)
    _check_model(trained, format)
    if format == "safetensors":
        values, manifest = _adapter(trained, run)
        if sign is not None or counts:
            manifest = adapters.signed(trained, values, manifest, run, sign, counts)
        checkpoint.save(out / ADAPTER, values, manifest)
    else:
        for name, content in {"peft": _peft, "timm": _timm}[format](trained).items():
            write = checkpoint.write_json if isinstance(content, dict) else checkpoint.write_bytes
            write(out / name, content)
    checkpoint.write_json(out / "config.json", card(trained))
    return out


def _check_model(trained: Trained, format: Format) -> None:
    """ConfigError for a model that this format has no way to say."""
    if members.averaged(trained.variables) is not None or instances.MOST in trained.variables:
        what = "an ensemble, and a model that is weighed image by image, are more than a format holds"
        raise ConfigError(what, where="strategy", remedy="use `consilium predict`")
    if format != "safetensors" and trained.model.head.config.kind != "linear":
        raise ConfigError(
            "timm classifiers are linear; this run has another head",
            where="head.kind",
            received="mlp",
            allowed="linear",
            remedy=SAFETENSORS,
        )


def load(folder: Path, weights: str | None = None, device: str = "cpu") -> Trained:
    """Rebuild the model of `--format safetensors`: `loaded.model.forward(loaded.variables, images)`.

    `weights`: a file with the backbone's weights, left out: where the run had them from, if that was no file.
    StateError where the backbone is another than the one in the manifest.
    """
    return load_exported(folder / ADAPTER, weights, device)


def _adapter(trained: Trained, run: Path) -> tuple[Tensors, dict[str, object]]:
    """The variables with, so that they are a whole model, a frozen head; and the manifest, without paths."""
    if not (run / "summary.json").is_file():
        raise StateError("this folder is safetensors already", where=str(run), remedy="copy it")
    values = {**trained.model.head_start, **trained.variables}
    summary = checkpoint.read_json(run / "summary.json")
    return values, manifest_of(trained, values, sorted(summary["image_passes"]["per_site"]), summary["served_round"])


def manifest_of(trained: Trained, values: Tensors, sites: Sequence[str], round: int) -> dict[str, object]:
    """All that stands beside the values of a model that needs no run folder, without paths."""
    pieces, plain = trained.experiment, trained.experiment.config.to_dict()
    backbone = plain["backbone"]
    weights = backbone["weights"] if backbone["weights"] in ("random", "embedded") else None
    return {
        **_manifest(trained, "safetensors"),
        "backbone_digest": pieces.backbone.digest,
        "agreement_hash": pieces.handshake.agreement,
        "settings": {key: plain[key] for key in config.AGREED} | {"backbone": {**backbone, "weights": weights}},
        "sites": list(sites),
        "round": round,
        "tensors": {name: _described(trained, name, value) for name, value in sorted(values.items())},
    }


def _described(trained: Trained, name: str, value: Tensor) -> dict[str, object]:
    """What nobody trains is a frozen head, or a frozen weight that the strategy changed."""
    spec = trained.model.specs.get(name) or trained.experiment.frozen.get(name)
    frozen = ("head" if name in trained.model.head_start else "base", "shared", 1.0)
    role, part, scale = frozen if spec is None else (spec.tag.role, spec.tag.part, spec.scale)
    dtype = str(value.dtype).removeprefix("torch.")
    return {"role": role, "part": part, "scale": scale, "shape": list(value.shape), "dtype": dtype}


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
    own, state = _ia3(trained) if _method(trained) == "ia3" else _lora(trained)
    named = {f"base_model.model.{name}": value for name, value in {**_classifier(trained), **state}.items()}
    shared = {
        "task_type": None,
        "base_model_name_or_path": trained.experiment.backbone.name,
        "inference_mode": True,
        "modules_to_save": sorted({name.partition(".")[0] for name in _classifier(trained)}),
    }
    return {
        "adapter_config.json": {**shared, **own},
        "adapter_model.safetensors": tensors.dumps(tensors.detach(named), _manifest(trained, "peft")),
    }


def _method(trained: Trained) -> str:
    """The one tuner that `peft` has too; ConfigError for what it has no words for, or would not carry out."""
    model = trained.model
    remedy = "export with --format safetensors, or with timm where the tuner can be merged"
    tables = [*trained.experiment.config.tuner, *(each.table for each in trained.experiment.hung)]
    found = sorted({table.name for table in tables} - {"linear"})
    if found not in (["lora"], ["ia3"]):
        received = ", ".join(found) or "a head alone"
        raise ConfigError(
            "peft has no such method", where="tuner", allowed="lora, or ia3", received=received, remedy=remedy
        )
    if changed := sorted(trained.variables.keys() & base.parameters(model.backbone.module).keys()):
        raise ConfigError("the run changed the backbone itself", where="strategy", received=changed[:3], remedy=remedy)
    bypassed = [
        name
        for name, place in model.backbone.modules.items()
        if place.role == "qkv" and f"{name.removesuffix('qkv')}q_bias" in base.parameters(model.backbone.module)
    ]
    if any(hasattr(model.backbone.module.get_submodule(name), found[0]) for name in bypassed):
        what = "plain timm computes this attention without calling its qkv module, so peft's adapter would do nothing"
        raise ConfigError(what, where="tuner.targets", received="qkv", remedy=remedy)
    return found[0]


def _ia3(trained: Trained) -> tuple[dict[str, Any], Tensors]:
    """Layers by their whole names, so that patch_embed.proj is never among them."""
    layers = ia3.vectors(trained.model.backbone, trained.variables)
    state = {f"{name}.ia3_l": value[None] if before else value[:, None] for name, (value, before) in layers.items()}
    before = sorted(name for name, (_, before) in layers.items() if before)
    return {"peft_type": "IA3", "target_modules": sorted(layers), "feedforward_modules": before}, state


def _lora(trained: Trained) -> tuple[dict[str, Any], Tensors]:
    """Ranks and scales layer by layer; a rank-stabilised scale is written as the alpha that gives it."""
    module = trained.model.backbone.module
    holders = {name: module.get_submodule(name) for name in trained.model.backbone.modules}
    layers = {n: factors(held, n, trained.variables) for n, held in holders.items() if hasattr(held, "lora")}
    state: dict[str, Tensor] = {}
    for name, found in layers.items():
        state |= {f"{name}.lora_A.weight": found.a, f"{name}.lora_B.weight": found.b}
        state |= {} if found.magnitude is None else {f"{name}.lora_magnitude_vector": found.magnitude}
    ranks = {name: (len(found.a), found.scale) for name, found in layers.items()}
    rank, scale = Counter(ranks.values()).most_common(1)[0][0]
    special = {name: pair for name, pair in ranks.items() if pair != (rank, scale)}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": _dora(layers),
        "target_modules": sorted(layers),
        "rank_pattern": {name: pair[0] for name, pair in special.items()},
        "alpha_pattern": {name: pair[0] * pair[1] for name, pair in special.items()},
    }, state


def _dora(layers: Mapping[str, Folding]) -> bool:
    kinds = {found.magnitude is not None for found in layers.values()}
    if len(kinds) > 1:
        remedy = "export with --format timm or safetensors"
        raise ConfigError("peft has DoRA on all layers or on none", where="tuner.dora", remedy=remedy)
    return kinds.pop()


def _classifier(trained: Trained) -> dict[str, Tensor]:
    """The head by timm's names; a distilled model has two and averages them, so both get the same."""
    names = ("head", "head_dist") if hasattr(trained.model.backbone.module, "head_dist") else ("head",)
    values: Tensors = {**trained.model.head_start, **trained.variables}
    return {f"{name}.{end}": values[f"head.{end}"].clone() for name in names for end in ("weight", "bias")}


def _plain(trained: Trained) -> torch.nn.Module:
    about = card(trained)
    built: torch.nn.Module = timm.create_model(
        about["architecture"], num_classes=about["num_classes"], **about["model_args"]
    )
    return built


def card(trained: Trained) -> dict[str, Any]:
    """What the model hub calls config.json."""
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
