"""What is exported gives the run's own logits in plain timm and in `peft`; what cannot be exported is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from consilium import checkpoint, config, experiment, tensors
from consilium.backbones import timm_backbone
from consilium.errors import ConfigError, StateError
from consilium.export import ADAPTER, export, load
from consilium.predict import load_trained
from tests import small, variants

peft = pytest.importorskip("peft")

CLASSES = ["a", "b", "c"]
VIT, DEIT = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
EVA, APART = "eva02_tiny_patch14_224", "eva02_base_patch14_224"
EVERYWHERE = {"name": "lora", "rank": 4, "alpha": 6, "targets": ["qkv", "proj", "fc1", "fc2"]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of weights away from their special start values, for a timm name."""
    folder, draw = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(1)

    def write(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            state = timm.create_model(name, num_classes=0).state_dict()
            save_file({key: v + 0.02 * torch.randn(v.shape, generator=draw) for key, v in state.items()}, path)
        return path

    return write


def _run(folder: Path, backbone: dict[str, object], *tuners: dict[str, object], **tables: Any) -> Path:
    """A finished run as `run.py` leaves it, with a global and one site's model."""
    plain = {"backbone": backbone, "tuner": list(tuners), **tables}
    settings = config.from_dict(plain)
    pieces = experiment.assemble(settings, CLASSES)
    checkpoint.write_json(folder / "config.json", {"classes": CLASSES, "config": settings.to_dict()})
    for name, seed in (("global", 0), ("north", 1)):
        variables = small.moved(dict(pieces.model.initial(seed)), 0.03)
        meta = {"model": name, "backbone_digest": pieces.backbone.digest}
        checkpoint.save(folder / "adapters" / f"{name}.safetensors", variables, meta)
    summary = {"image_passes": {"total": 3, "per_site": {"south": 1, "north": 2}}, "served_round": 5}
    checkpoint.write_json(folder / "summary.json", summary)
    return folder


def _images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4))


def _logits(run: Path, site: str | None, size: int) -> torch.Tensor:
    trained = load_trained(run, site)
    with torch.no_grad():
        return trained.model.forward(trained.variables, _images(size))


def _plain(out: Path) -> torch.nn.Module:
    card = json.loads((out / "config.json").read_text())
    model: torch.nn.Module = timm.create_model(
        card["architecture"], num_classes=card["num_classes"], **card["model_args"]
    )
    return model.eval()


@pytest.mark.parametrize(
    ("name", "size", "tuners"),
    [
        (VIT, 32, [EVERYWHERE]),
        (DEIT, 32, [{"name": "lora", "rank": 2, "alpha": 2.0, "rank_stabilised": True}]),
        (EVA, 28, [{"name": "lora"}]),
        (VIT, 32, [{"name": "full"}]),
        (VIT, 32, [{"name": "linear"}]),
        ("embedded", 64, [{"name": "lora"}]),
        (VIT, 32, [{**EVERYWHERE, "dora": True, "ranks": {"blocks.0": 2}}]),
        (EVA, 28, [{"name": "lora", "dora": True}, {"name": "ia3"}]),
    ],
)
def test_timm_gives_the_same_logits(
    name: str, size: int, tuners: list[dict[str, object]], weights: Callable[[str], Path], tmp_path: Path
) -> None:
    own = {} if name == "embedded" else {"weights": str(weights(name))}
    run = _run(tmp_path / "run", {"name": name, "image_size": size, **own}, *tuners)
    for site in (None, "north"):
        out = export(run, "timm", tmp_path / f"out-{site}", site)
        model = _plain(out)
        model.load_state_dict(load_file(out / "model.safetensors"), strict=True)
        with torch.no_grad():
            torch.testing.assert_close(model(_images(size)), _logits(run, site, size), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(_logits(run, None, size), _logits(run, "north", size))
    assert tensors.meta_of((out / "model.safetensors").read_bytes())["model"] == "north"


def test_timm_itself_finds_weights_and_preprocessing_in_the_folder(
    weights: Callable[[str], Path], tmp_path: Path
) -> None:
    backbone = {"name": VIT, "weights": str(weights(VIT)), "image_size": 32, "mean": (0.1, 0.2, 0.3)}
    run = _run(tmp_path / "run", backbone, {"name": "lora"})
    out = export(run, "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(_images(32)), _logits(run, None, 32), rtol=1e-3, atol=1e-4)
    assert model.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert model.pretrained_cfg["label_names"] == CLASSES


@pytest.mark.parametrize(
    ("name", "size", "tuners"),
    [
        (VIT, 32, [EVERYWHERE]),
        (VIT, 32, [{"name": "lora", "rank": 2}, {"name": "lora", "rank": 3, "alpha": 9.0, "targets": ["proj"]}]),
        (DEIT, 32, [{"name": "lora", "alpha": 4.0, "rank_stabilised": True, "blocks": [0, 11]}]),
        (EVA, 28, [{"name": "lora", "targets": ["fc1", "proj"]}]),
        ("embedded", 64, [{"name": "lora", "dropout": 0.2}, {"name": "linear"}]),
        (VIT, 32, [{**EVERYWHERE, "dora": True, "ranks": {"blocks.0": 2, "blocks.1.attn.qkv": 3}}]),
        (APART, 28, [{"name": "lora", "rank": 2, "targets": ["qkv", "fc1"], "dora": True, "blocks": [0, 1]}]),
        (EVA, 28, [{"name": "lora", "rank": 3, "alpha": 6, "targets": ["fc2"], "dora": True, "rank_stabilised": True}]),
        (VIT, 32, [{"name": "ia3"}]),
        (VIT, 32, [{"name": "ia3", "targets": ["q", "v"], "blocks": [0, 11]}]),
        (APART, 28, [{"name": "ia3"}]),
        (EVA, 28, [{"name": "ia3", "targets": ["fc2"]}, {"name": "linear"}]),
    ],
)
def test_peft_gives_the_same_logits(
    name: str, size: int, tuners: list[dict[str, object]], weights: Callable[[str], Path], tmp_path: Path
) -> None:
    own = {} if name == "embedded" else {"weights": str(weights(name))}
    run = _run(tmp_path / "run", {"name": name, "image_size": size, **own}, *tuners)
    out = export(run, "peft", tmp_path / "out")
    model = _plain(out)
    base = timm_backbone.load(config.BackboneConfig(name=name, image_size=size, **own))
    missing, unexpected = model.load_state_dict(base.module.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith("head") for key in missing)
    tuned = peft.PeftModel.from_pretrained(model, out).eval()
    with torch.no_grad():
        torch.testing.assert_close(tuned(_images(size)), _logits(run, None, size), rtol=1e-3, atol=1e-4)
    assert tensors.meta_of((out / "adapter_model.safetensors").read_bytes())["format"] == "peft"


EVERY = [(variant, {}) for variant in sorted({**variants.TUNERS, **variants.HYBRIDS})]
HEADS: list[tuple[str, dict[str, object]]] = [("lora dora", {"share": "frozen"}), ("prompts", {"kind": "mlp"})]


@pytest.mark.parametrize(("variant", "head"), [*EVERY, *HEADS])
def test_every_tuner_loads_back_from_safetensors(
    variant: str, head: dict[str, object], weights: Callable[[str], Path], tmp_path: Path
) -> None:
    backbone = {"name": VIT, "weights": str(weights(VIT)), "image_size": 32}
    run = _run(tmp_path / "run", backbone, *variants.table(variant), head=head, seed=7)
    out = export(run, "safetensors", tmp_path / "out", "north")
    shutil.rmtree(run)
    loaded = load(out, weights=str(weights(VIT)))
    assert loaded.name == "north"
    values, manifest = checkpoint.load(out / ADAPTER)
    assert tensors.equal(values, loaded.variables)
    heads = {name for name, said in manifest["tensors"].items() if said["role"] == "head"}
    assert heads == {name for name in values if name.startswith("head.")} == loaded.model.head_start.keys()
    with torch.no_grad():
        logits = loaded.model.forward(loaded.variables, _images(32))
    again = _run(tmp_path / "run", backbone, *variants.table(variant), head=head, seed=7)
    assert torch.equal(logits, _logits(again, "north", 32))
    assert not torch.equal(logits, _logits(again, None, 32))
    card = json.loads((out / "config.json").read_text())
    assert (card["architecture"], card["pretrained_cfg"]["label_names"]) == (VIT, CLASSES)


def test_the_manifest_says_what_the_file_holds(weights: Callable[[str], Path], tmp_path: Path) -> None:
    backbone = {"name": VIT, "weights": str(weights(VIT)), "image_size": 32}
    tuner = {"name": "lora", "rank": 2, "alpha": 6, "blocks": [3], "dora": True}
    out = export(_run(tmp_path / "run", backbone, tuner), "safetensors", tmp_path / "out")
    values, manifest = checkpoint.load(out / ADAPTER)
    assert manifest["tensors"].keys() == values.keys()
    assert manifest["tensors"]["blocks.3.attn.qkv.lora.shared.a"] == {
        "role": "lora_a",
        "part": "shared",
        "scale": 3.0,
        "shape": [2, 192],
        "dtype": "float32",
    }
    assert manifest["tensors"]["blocks.3.attn.qkv.lora.magnitude"]["role"] == "magnitude"
    assert (manifest["sites"], manifest["round"], manifest["classes"]) == (["north", "south"], 5, CLASSES)
    assert manifest["settings"]["tuner"][0]["blocks"] == [3]
    assert manifest["preprocessing"]["image_size"] == 32
    assert manifest["backbone"].keys() == {"name", "digest", "licence"}
    assert manifest["settings"]["backbone"]["weights"] is None
    assert not any(str(path) in json.dumps(manifest) for path in (tmp_path, weights(VIT)))


def test_safetensors_over_another_backbone_are_refused(weights: Callable[[str], Path], tmp_path: Path) -> None:
    backbone = {"name": VIT, "weights": str(weights(VIT)), "image_size": 32}
    out = export(_run(tmp_path / "run", backbone, {"name": "lora"}), "safetensors", tmp_path / "out")
    with pytest.raises(StateError, match="not the one this run was trained on"):
        load(out, weights="random")


PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("format", "number"), [("peft", 0), ("timm", 1), ("safetensors", 2)])
def test_the_page_on_export_reads_each_format(
    format: Any, number: int, weights: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = {"name": VIT, "weights": str(weights(VIT)), "image_size": 32}
    run = _run(tmp_path / "run", backbone, {"name": "lora", "dora": True})
    export(run, format, tmp_path / ("adapter", "merged", "tuned")[number])
    shutil.copy(weights(VIT), tmp_path / "backbone.safetensors")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[number], found)
    with torch.no_grad():
        torch.testing.assert_close(found["model"](_images(32)), _logits(run, None, 32), rtol=1e-3, atol=1e-4)


def test_the_page_on_export_names_the_keys_of_the_manifest(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", {"name": VIT, "weights": "random", "image_size": 32}, {"name": "lora"})
    _, manifest = checkpoint.load(export(run, "safetensors", tmp_path / "out") / ADAPTER)
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", PAGE.partition("## The manifest")[2], re.M)))
    assert set(named) == manifest.keys()


def test_a_frozen_head_is_exported_too(weights: Callable[[str], Path], tmp_path: Path) -> None:
    backbone = {"name": VIT, "weights": str(weights(VIT)), "image_size": 32}
    run = _run(tmp_path / "run", backbone, {"name": "lora"}, head={"share": "frozen"})
    out = export(run, "timm", tmp_path / "out")
    trained = load_trained(run)
    assert torch.equal(load_file(out / "model.safetensors")["head.weight"], trained.model.head_start["head.weight"])


@pytest.mark.parametrize(
    ("format", "name", "tuners", "tables", "words"),
    [
        ("peft", VIT, [{"name": "full"}], {}, r"(?s)no such method.*lora, or ia3.*full.*safetensors"),
        ("peft", VIT, [{"name": "linear"}], {}, "no such method"),
        ("peft", EVA, [{"name": "lora"}], {}, "without calling its qkv"),
        ("peft", VIT, [{"name": "lora"}], {"head": {"kind": "mlp"}}, "classifiers are linear"),
        ("timm", VIT, [{"name": "lora"}], {"head": {"kind": "mlp"}}, r"(?s)classifiers are linear.*format safetensors"),
        ("peft", VIT, [{"name": "lora"}, {"name": "ia3"}], {}, r"(?s)no such method.*received: ia3, lora"),
        ("peft", VIT, [{"name": "prompts"}], {}, r"(?s)no such method.*received: prompts"),
        ("peft", EVA, [{"name": "ia3"}], {}, "without calling its qkv"),
        (
            "peft",
            VIT,
            [{"name": "lora", "dora": True}, {"name": "lora", "targets": ["proj"]}],
            {},
            "DoRA on all layers or on none",
        ),
        ("timm", VIT, [{"name": "lora"}, {"name": "adapter"}], {}, r"(?s)adapter.*no linear map.*format safetensors"),
        ("timm", VIT, [{"name": "prompts"}], {}, r"(?s)prompts.*tokens in the sequence.*format safetensors"),
    ],
)
def test_what_a_format_cannot_say_is_refused(
    format: Any, name: str, tuners: Any, tables: Any, words: str, tmp_path: Path
) -> None:
    size = 28 if name == EVA else 32
    run = _run(tmp_path / "run", {"name": name, "weights": "random", "image_size": size}, *tuners, **tables)
    with pytest.raises(ConfigError, match=words):
        export(run, format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_base_goes_to_timm_only(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", {"name": VIT, "weights": "random", "image_size": 32}, {"name": "lora"})
    variables, meta = checkpoint.load(run / "adapters" / "global.safetensors")
    name = "blocks.0.attn.qkv.weight"
    changed = torch.randn(576, 192, generator=torch.Generator().manual_seed(0))
    checkpoint.save(run / "adapters" / "global.safetensors", {**variables, name: changed}, meta)
    with pytest.raises(ConfigError, match="changed the backbone itself"):
        export(run, "peft", tmp_path / "peft")
    out = export(run, "timm", tmp_path / "timm")
    model = _plain(out)
    model.load_state_dict(load_file(out / "model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(model(_images(32)), _logits(run, None, 32), rtol=1e-3, atol=1e-4)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", {"name": VIT, "weights": "random", "image_size": 32}, {"name": "lora"})
    with pytest.raises(StateError, match=r"(?s)no model of this name.*global, north.*south"):
        export(run, "timm", tmp_path / "out", "south")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(StateError, match="not empty"):
        export(run, "timm", tmp_path / "full")
    path = run / "adapters" / "global.safetensors"
    variables, meta = checkpoint.load(path)
    checkpoint.save(path, variables, {**meta, "backbone_digest": "0" * 64})
    with pytest.raises(StateError, match="not the one this run was trained on"):
        export(run, "timm", tmp_path / "out")
    del variables["head.bias"]
    checkpoint.save(path, variables, meta)
    with pytest.raises(StateError, match=r"(?s)lacks tensors.*head\.bias"):
        export(run, "timm", tmp_path / "out")
    path.unlink()
    with pytest.raises(StateError, match=r"(?s)no global model.*name a site"):
        export(run, "timm", tmp_path / "out")
