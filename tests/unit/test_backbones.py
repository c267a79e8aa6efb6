"""Backbones: every make is frozen and whole; weights load strictly or not at all and bring their own preprocessing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from consilium import tensors
from consilium.backbones import roles, timm_backbone, weights
from consilium.config import BackboneConfig
from consilium.data import Preprocessing
from consilium.errors import BackboneError
from consilium.protocols import Backbone
from tests import small

TINY = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def _load(**keys: object) -> Backbone:
    return timm_backbone.load(BackboneConfig.model_validate(keys))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT-Tiny with its classifier, at random, as somebody would have saved it."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    return path


@pytest.mark.parametrize("make", sorted(small.MAKES))
def test_every_make_is_frozen_in_eval_mode_and_knows_its_roles(make: str) -> None:
    backbone = small.backbone(make)
    assert not any(p.requires_grad for p in backbone.module.parameters())
    assert not any(child.training for child in backbone.module.modules())
    assert backbone.module(small.images()).shape == (3, backbone.num_features)
    assert backbone.num_blocks == 2
    assert backbone.num_parameters == sum(p.numel() for p in backbone.module.parameters())
    assert backbone.digest == tensors.digest_all(backbone.module.state_dict())
    inside = {place.role for place in backbone.modules.values() if place.block == 1}
    assert inside >= {"qkv", "proj", "fc1", "fc2", "norm1", "norm2"}
    assert backbone.modules["patch_embed.proj"].role == "patch_embed"
    assert all(name in dict(backbone.module.named_modules()) for name in backbone.modules)


def test_roles_of_separate_projections_and_gated_mlp() -> None:
    places = small.backbone("eva_apart").modules
    assert {n for n, p in places.items() if p.role == "qkv" and p.block == 0} == {
        f"blocks.0.attn.{letter}_proj" for letter in "qkv"
    }
    assert {n for n, p in places.items() if p.role == "fc1" and p.block == 1} == {
        "blocks.1.mlp.fc1_g",
        "blocks.1.mlp.fc1_x",
    }


@pytest.mark.parametrize("name", ["vit_small_patch16_18x2_224", "beit_base_patch16_224", "vit_small_patch16_dinov3"])
def test_roles_of_further_families(name: str) -> None:
    with torch.device("meta"):
        places = roles.find(timm.create_model(name, num_classes=0))
    assert {"qkv", "proj", "fc1", "fc2"} <= {place.role for place in places.values() if place.block == 5}


@pytest.mark.parametrize("make", ["eva_fused"])
def test_reaching_the_qkv_module_changes_no_function(make: str) -> None:
    backbone = small.backbone(make)
    through = backbone.module(small.images())
    around = backbone.module
    for child in around.modules():
        if hasattr(child, "qkv_bias_separate"):
            assert child.qkv_bias_separate
            child.qkv_bias_separate = False
    torch.testing.assert_close(around(small.images()), through)


def test_a_file_loads_strictly_and_drops_the_classifier(checkpoint: Path) -> None:
    backbone = _load(name=TINY, weights=str(checkpoint))
    loaded = backbone.module.state_dict()
    saved = tensors.loads(checkpoint.read_bytes())
    assert loaded.keys() == saved.keys() - {"head.weight", "head.bias"}
    assert all(torch.equal(loaded[name], saved[name]) for name in loaded)
    assert backbone.preprocessing == Preprocessing(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.9, "center")
    assert backbone.licence == "apache-2.0"


def test_positions_are_resampled_and_the_digest_stays(checkpoint: Path) -> None:
    native, other = (_load(name=TINY, weights=str(checkpoint), image_size=size) for size in (224, 96))
    assert other.module.get_parameter("pos_embed").shape == (1, 37, 192)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    theirs.load_state_dict(native.module.state_dict())
    theirs.set_input_size(96)
    torch.testing.assert_close(other.module.get_parameter("pos_embed"), theirs.pos_embed)
    assert native.digest == other.digest == tensors.digest_all(native.module.state_dict())


def test_pickles_are_read_when_they_hold_tensors_only(checkpoint: Path, tmp_path: Path) -> None:
    state = tensors.loads(checkpoint.read_bytes())
    torch.save({"model": state, "epoch": 3}, tmp_path / "good.pth")
    assert (
        _load(name=TINY, weights=str(tmp_path / "good.pth")).digest == _load(name=TINY, weights=str(checkpoint)).digest
    )
    torch.save({"model": state, "args": Path("x")}, tmp_path / "bad.pth")
    with pytest.raises(BackboneError, match="cannot be read"):
        _load(name=TINY, weights=str(tmp_path / "bad.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(BackboneError, match="no state dict"):
        _load(name=TINY, weights=str(tmp_path / "list.pth"))


def test_raw_dinov2_names_go_through_the_filter_of_timm() -> None:
    """The authors' file has register_tokens, a mask token, and class positions before those of the patches."""
    ours = small.backbone("registers")
    state = dict(ours.module.state_dict())
    raw = {name: value for name, value in state.items() if name not in ("reg_token", "cls_token", "pos_embed")}
    raw["register_tokens"], raw["mask_token"] = state["reg_token"], torch.zeros(1, 16)
    raw["cls_token"] = state["cls_token"] - 1
    raw["pos_embed"] = torch.cat([torch.ones(1, 1, 16), state["pos_embed"]], dim=1)
    name, arguments = "vit_small_patch14_reg4_dinov2", {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
    found = weights.Weights(name, raw, {}, arguments)
    again = timm_backbone.assemble(name, found, ours.preprocessing)
    torch.testing.assert_close(again.module(small.images()), ours.module(small.images()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("norm.bias"), r"(?s)do not fit.*norm\.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), r"(?s)do not fit.*extra"),
        (lambda state: state.update({"norm.bias": torch.zeros(3)}), r"(?s)do not fit.*norm\.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: object, words: str, checkpoint: Path, tmp_path: Path) -> None:
    state = tensors.loads(checkpoint.read_bytes())
    change(state)  # type: ignore[operator]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BackboneError, match=words):
        _load(name=TINY, weights=str(tmp_path / "model.safetensors"))


def test_a_config_beside_the_file_wins_and_the_configuration_wins_over_it(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(checkpoint.read_bytes())
    own = {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.75, "input_size": [3, 64, 64], "license": "cc-by-4.0"}
    for card in (own, {"architecture": "x", "pretrained_cfg": own}):
        (tmp_path / "config.json").write_text(json.dumps(card))
        found = _load(name=TINY, weights=str(tmp_path / "model.safetensors"))
        assert found.preprocessing == Preprocessing(64, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "bicubic", 0.75, "center")
        assert found.licence == "cc-by-4.0"
    keys = {"mean": (0.4, 0.4, 0.4), "std": (0.6, 0.6, 0.6), "interpolation": "bilinear", "image_size": 32}
    given = _load(
        name=TINY, weights=str(tmp_path / "model.safetensors"), **keys, crop_fraction=0.5, crop_mode="squash"
    ).preprocessing
    assert given == Preprocessing(32, (0.4, 0.4, 0.4), (0.6, 0.6, 0.6), "bilinear", 0.5, "squash")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BackboneError, match="card"):
        _load(name=TINY, weights=str(tmp_path / "model.safetensors"))


def test_the_hub_gives_what_the_file_gives(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache as the hub's own client leaves it; offline, so nothing else can be the source."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"(?s)could not be fetched.*connect to the model hub"):
        _load(name=TINY)
    snapshot = tmp_path / f"models--timm--{TINY}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(checkpoint.read_bytes())
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    assert _load(name=TINY, image_size=96).digest == _load(name=TINY, weights=str(checkpoint)).digest


def test_random_is_seeded_and_needs_nothing() -> None:
    one, two = (_load(name="vit_tiny_patch16_224", weights="random", image_size=32) for _ in range(2))
    assert one.digest == two.digest
    assert one.module.get_parameter("blocks.0.attn.qkv.weight").std() > 0
    torch.manual_seed(0)
    before = torch.rand(1)
    torch.manual_seed(0)
    _load(name="embedded", weights="random")
    assert torch.equal(torch.rand(1), before)


def test_embedded_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = _load()
    assert backbone.digest == _load(weights="embedded").digest != _load(weights="random").digest
    assert backbone.licence == "Apache-2.0"
    assert {p.dtype for p in backbone.module.parameters()} == {torch.float32}
    assert _load(image_size=96).digest == backbone.digest
    for name in ("card.json", "embedded.safetensors"):
        (tmp_path / name).write_bytes((weights.EMBEDDED / name).read_bytes())
    (tmp_path / "embedded.safetensors").write_bytes((tmp_path / "embedded.safetensors").read_bytes() + b"x")
    monkeypatch.setattr(weights, "EMBEDDED", tmp_path)
    with pytest.raises(BackboneError, match="checksum"):
        _load()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"name": "resnet18", "weights": "random"}, "not a supported vision transformer"),
        ({"name": "mixer_s32_224", "weights": "random"}, "not a supported vision transformer"),
        ({"name": "vit_tinny"}, "no model of this name"),
        ({"name": "vit_tiny_patch16_224.nothing"}, "no weights of this name"),
        ({"name": "vit_tiny_patch16_224", "weights": "random", "image_size": 40}, r"(?s)whole patches.*32 or 48"),
        ({"name": "vit_tiny_patch16_224", "weights": "nowhere.pth"}, "does not exist"),
        ({"name": "vit_tiny_patch16_224", "weights": "embedded"}, "embedded backbone only"),
        ({"name": "embedded", "weights": "model.pth"}, "its own weights"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(BackboneError, match=words):
        _load(**keys)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_file_that_is_no_checkpoint_is_never_to_be_loaded_unsafely(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(BackboneError, match=r"cannot be read[\s\S]*safetensors") as caught:
        _load(name="vit_tiny_patch16_224", weights=tmp_path / name)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("size", [224, 96])
def test_the_shared_checkpoint_loads(shared: Path, size: int) -> None:
    path = shared / "data" / "vit_tiny_patch16_224_augreg" / "model.safetensors"
    if not path.is_file():
        pytest.skip("no checkpoint here")
    backbone = _load(name=TINY, weights=str(path), image_size=size)
    assert (backbone.num_blocks, backbone.num_features) == (12, 192)
    assert backbone.preprocessing.crop_fraction == 0.9


def test_an_mlp_in_a_position_bias_is_no_mlp_of_the_block() -> None:
    module = timm.create_model("vit_relpos_small_patch16_224", num_classes=0, depth=1, embed_dim=32, num_heads=2)
    inside = [name for name in dict(module.named_modules()) if name.endswith("rel_pos.mlp.fc1")]
    assert inside
    assert not [name for name in roles.find(module) if "rel_pos" in name]
