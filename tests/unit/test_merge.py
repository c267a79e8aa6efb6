"""Merging signed adapters: equal to the dense sum, exact to take away from, and refused by name where it cannot be."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consilium import checkpoint, config, run, signing
from consilium.data import SiteData
from consilium.errors import BackboneError, ConfigError, StateError
from consilium.export import ADAPTER, export, load
from consilium.merging import adapters, candidates, merge
from consilium.merging.merge import Options
from consilium.predict import Trained, load_exported, load_trained
from consilium.products import products
from consilium.tuners import base
from tests import federation, signed_hospitals, variants
from tests.signed_hospitals import Hospital, hospital

CLOSE = {"rtol": 0, "atol": 1e-6}
ONE = Options(scale=1.0)


def _merge(out: Path, *sites: Hospital, options: Options = ONE) -> Path:
    return merge.merge([site.adapter for site in sites], [site.trust for site in sites], out, options, lambda _: None)


def _subtract(out: Path, merged: Path, *sites: Hospital, options: Options = Options()) -> Path:  # noqa: B008
    trust = [site.trust for site in sites]
    return merge.subtract(merged, [site.adapter for site in sites], trust, out, options, lambda _: None)


def _dense(trained: Trained) -> dict[str, Tensor]:
    """Every weight that the model acts with, products folded in, float64."""
    frozen = {n: p.detach().double() for n, p in base.parameters(trained.model.backbone.module).items()}
    own, specs = {n: v.double() for n, v in trained.variables.items()}, trained.model.specs
    plain = {**frozen, **own}
    for product in products(specs):
        rows = torch.cat([own[name] for name in product.left]) @ own[product.right] * product.scale
        sizes = [len(own[name]) for name in product.left]
        offsets = trained.model.backbone.module
        for name, piece in zip(product.base, torch.split(rows, sizes), strict=True):
            plain[name] = own.get(name, offsets.get_parameter(name).detach().double()) + piece
    factors = {name for p in products(specs) for name in (*p.left, p.right)}
    return {name: value for name, value in plain.items() if name not in factors}


def _start(site: Hospital) -> Trained:
    trained = load_exported(site.adapter, device="cpu")
    return Trained(trained.experiment, trained.model, adapters.start_of(trained), "start")


def _images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def _outputs(trained: Trained) -> Tensor:
    with torch.no_grad():
        return trained.model.forward(trained.variables, _images())


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Hospital]:
    """Other ranks and other alphas at every site."""
    folder = tmp_path_factory.mktemp("three")
    tuners = [{"rank": 2}, {"rank": 3, "alpha": 12.0}, {"rank": 4, "alpha": 2.0, "rank_stabilised": True}]
    return [
        hospital(folder, name, seed, counts=True, tuner=[{"name": "lora", **tuner}])
        for seed, (name, tuner) in enumerate(zip(("east", "north", "west"), tuners, strict=True))
    ]


# ------------------------------------------------------------------------------------------------ what comes out
def test_one_adapter_at_scale_one_is_the_sites_model_bit_for_bit(tmp_path: Path, three: list[Hospital]) -> None:
    merged = load(_merge(tmp_path / "out", three[0]))
    own = load_exported(three[0].adapter, device="cpu")
    assert torch.equal(_outputs(merged), _outputs(own))
    assert all(torch.equal(merged.variables[name], value) for name, value in own.variables.items())


@pytest.mark.parametrize("weigh", ["uniform", "examples"])
@pytest.mark.parametrize(("rule", "scale"), [("mean", 1.0), ("mean", 0.3), ("sum", 0.5)])
def test_the_merged_model_is_the_dense_sum(
    tmp_path: Path, three: list[Hospital], rule: Any, scale: float, weigh: Any
) -> None:
    """theta_pre + lambda sum c_k tau_k of whole weight matrices, whatever the ranks and scales of the sites."""
    if (rule, weigh) == ("sum", "examples"):
        with pytest.raises(ConfigError, match="--weigh"):
            _merge(tmp_path / "out", *three, options=Options(rule=rule, scale=scale, weigh=weigh))
        return
    merged = load(_merge(tmp_path / "out", *three, options=Options(rule=rule, scale=scale, weigh=weigh)))
    counts = [10.0, 20.0, 30.0] if weigh == "examples" else [1.0] * 3
    shares = [1.0] * 3 if rule == "sum" else [count / sum(counts) for count in counts]
    start, models = _dense(_start(three[0])), [_dense(load_exported(s.adapter, device="cpu")) for s in three]
    expected = {
        n: w + scale * sum(c * (m[n] - w) for c, m in zip(shares, models, strict=True)) for n, w in start.items()
    }
    found = _dense(merged)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE)


@pytest.mark.parametrize("variant", sorted({*variants.TUNERS, *variants.HYBRIDS}))
@pytest.mark.parametrize("rule", ["mean", "ties"])
def test_every_tuner_is_merged_as_its_dense_weights_are(tmp_path: Path, variant: str, rule: Any) -> None:
    tuner = variants.table(variant)
    sites = [hospital(tmp_path, name, seed, tuner=tuner) for seed, name in enumerate(("east", "west"))]
    options = Options(rule=rule, scale=0.8, density=0.5 if rule == "ties" else 0.2)
    merged = load(_merge(tmp_path / "out", *sites, options=options))
    start, models = _dense(_start(sites[0])), [_dense(load_exported(s.adapter, device="cpu")) for s in sites]
    found = _dense(merged)
    assert found.keys() == start.keys()
    if rule == "mean":
        for name, value in start.items():
            steps = sum(model[name] - value for model in models) / 2
            torch.testing.assert_close(found[name], value + 0.8 * steps, **CLOSE)
        return
    for name, value in start.items():  # every entry that moved went where one of the sites, or both, went
        moved = (found[name] - value).abs() > 1e-6
        ways = torch.stack([(model[name] - value).sign() for model in models])
        assert (((found[name] - value).sign() == ways).any(dim=0) | ~moved).all()


def test_the_order_of_the_files_does_not_matter(tmp_path: Path, three: list[Hospital]) -> None:
    first, second = _merge(tmp_path / "a", *three), _merge(tmp_path / "b", *reversed(three))
    assert (first / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()


def test_a_rank_cuts_and_says_so(tmp_path: Path, three: list[Hospital]) -> None:
    exact = json.loads((_merge(tmp_path / "exact", *three) / merge.REPORT).read_text())
    cut = json.loads((_merge(tmp_path / "cut", *three, options=Options(scale=1.0, rank=3)) / merge.REPORT).read_text())
    assert exact["cut_off"] == 0
    assert 0 < cut["cut_off"] < 1
    assert load(tmp_path / "exact").experiment.config.tuner[0].options()["rank"] == 2 + 3 + 4
    assert load(tmp_path / "cut").experiment.config.tuner[0].options()["rank"] == 3


def test_ties_with_a_rank_stays_an_adapter(tmp_path: Path, three: list[Hospital]) -> None:
    options = Options(rule="ties", scale=1.0, rank=5)
    merged = load(_merge(tmp_path / "out", *three, options=options))
    assert merged.variables.keys() == merged.model.specs.keys()


def test_layers_of_other_ranks_keep_them(tmp_path: Path) -> None:
    tuner = [{"name": "lora", "rank": 2, "ranks": {"blocks.3": 3}}, {"name": "lora", "rank": 1, "targets": ["fc1"]}]
    sites = [hospital(tmp_path, name, seed, tuner=tuner) for seed, name in enumerate(("east", "west"))]
    merged = load(_merge(tmp_path / "out", *sites))
    shapes = {name: tuple(v.shape) for name, v in merged.variables.items() if name.endswith("lora.shared.a")}
    ranks = {name: shape[0] for name, shape in shapes.items()}
    assert ranks["blocks.0.attn.qkv.lora.shared.a"] == 4
    assert ranks["blocks.3.attn.qkv.lora.shared.a"] == 6
    assert ranks["blocks.3.mlp.fc1.lora.shared.a"] == 2
    expected = [_dense(load_exported(site.adapter, device="cpu")) for site in sites]
    found = _dense(merged)
    for name, value in found.items():
        torch.testing.assert_close(value, sum(model[name] for model in expected) / 2, **CLOSE)


# ------------------------------------------------------------------------------------------------ taking away
def _values(folder: Path) -> dict[str, Tensor]:
    """Plain values and products in float64, as the file has them."""
    values, _ = checkpoint.load(folder / ADAPTER)
    trained = load(folder)
    found = dict(values)
    for product in products(trained.model.specs):
        left = torch.cat([found.pop(name).double() for name in product.left])
        found[product.right] = product.scale * left @ values[product.right].double()
    return {name: value.double() for name, value in found.items()}


@pytest.mark.parametrize("variant", ["lora", "prompts", "low_rank_prompts", "full", "lora dora", "lora + prompts"])
@pytest.mark.parametrize("rule", ["mean", "sum"])
def test_subtraction_gives_the_merge_of_the_others(tmp_path: Path, rule: Any, variant: str) -> None:
    """(ii) of the reference, up to the rounding of float64."""
    names, tuner = ("east", "north", "west"), variants.table(variant)
    sites = [hospital(tmp_path, name, seed, counts=True, tuner=tuner) for seed, name in enumerate(names)]
    options = Options(rule=rule, scale=0.6, weigh="examples" if rule == "mean" else "uniform")
    whole = _merge(tmp_path / "abc", *sites, options=options)
    expected = _values(_merge(tmp_path / "ab", *sites[:2], options=options))
    found = _values(_subtract(tmp_path / "back", whole, sites[2]))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
    shapes = [{n: v.shape for n, v in checkpoint.load(tmp_path / f / ADAPTER)[0].items()} for f in ("ab", "back")]
    assert shapes[0] == shapes[1]
    told = json.loads((tmp_path / "back" / merge.REPORT).read_text())
    assert [term["site"] for term in told["terms"]] == ["east", "north"]


def test_two_are_taken_out_one_by_one_or_at_once(tmp_path: Path, three: list[Hospital]) -> None:
    whole = _merge(tmp_path / "abc", *three)
    at_once = _values(_subtract(tmp_path / "once", whole, three[1], three[2]))
    first = _subtract(tmp_path / "first", whole, three[1])
    one_by_one = _values(_subtract(tmp_path / "second", first, three[2]))
    alone = _values(_merge(tmp_path / "alone", three[0]))
    for name, value in alone.items():
        torch.testing.assert_close(at_once[name], value, rtol=0, atol=1e-12)
        torch.testing.assert_close(one_by_one[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["ties", "dare"])
def test_nobody_can_be_taken_out_of_a_rule_that_is_not_linear(tmp_path: Path, three: list[Hospital], rule: Any) -> None:
    whole = _merge(tmp_path / "abc", *three, options=Options(rule=rule, scale=1.0))
    with pytest.raises(ConfigError, match=rf"{rule} looks at all sites' entries together(.|\n)*mean or sum"):
        _subtract(tmp_path / "back", whole, three[2])


def test_what_cannot_be_subtracted_is_refused(tmp_path: Path, three: list[Hospital]) -> None:
    two = _merge(tmp_path / "ab", *three[:2])
    with pytest.raises(StateError, match=r"this adapter of 'west' is not in the merged model(.|\n)*east, north"):
        _subtract(tmp_path / "back", two, three[2])
    with pytest.raises(ConfigError, match="nobody would be left"):
        _subtract(tmp_path / "back", two, *three[:2])
    cut = _merge(tmp_path / "cut", *three, options=Options(scale=1.0, rank=2))
    with pytest.raises(ConfigError, match="cut to a rank"):
        _subtract(tmp_path / "back", cut, three[2])
    still = _merge(tmp_path / "still", *three, options=Options(scale=0.0))
    with pytest.raises(ConfigError, match="scale 0"):
        _subtract(tmp_path / "back", still, three[2])
    with pytest.raises(StateError, match="no merged folder"):
        _subtract(tmp_path / "back", three[0].adapter.parent, three[2])
    assert not (tmp_path / "back").exists()


# ------------------------------------------------------------------------------------------------ what is refused
def test_an_adapter_that_is_not_signed_is_refused(tmp_path: Path, three: list[Hospital]) -> None:
    run = signed_hospitals.finished(tmp_path / "run", "south", 5)
    plain = export(run, "safetensors", tmp_path / "plain", "south") / ADAPTER
    with pytest.raises(StateError, match=r"not signed(.|\n)*plain"):
        merge.merge([three[0].adapter, plain], [three[0].trust], tmp_path / "out", ONE, lambda _: None)


@pytest.mark.parametrize("how", ["a byte", "a value", "the name"])
def test_an_adapter_that_was_changed_is_refused(tmp_path: Path, three: list[Hospital], how: str) -> None:
    file = tmp_path / "west.safetensors"
    shutil.copy(three[2].adapter, file)
    if how == "a byte":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    else:
        tensors, meta = checkpoint.load(file)
        tensors["head.bias"] = tensors["head.bias"] + (how == "a value")
        checkpoint.save(file, tensors, {**meta, "model": "south"} if how == "the name" else meta)
    trust = [three[0].trust, str(three[2].public)]
    with pytest.raises(StateError, match=r"(damaged|changed this adapter)(.|\n)*west\.safetensors"):
        merge.merge([three[0].adapter, file], trust, tmp_path / "out", ONE, lambda _: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("trust", ["nobody", "another", "the same key for another site"])
def test_a_key_that_is_not_trusted_is_refused(tmp_path: Path, three: list[Hospital], trust: str) -> None:
    words = {"nobody": [], "another": [three[0].trust], "the same key for another site": [f"east={three[2].public}"]}
    with pytest.raises(StateError, match=r"'west' is signed with a key that is not trusted"):
        merge.merge([three[2].adapter], words[trust], tmp_path / "out", ONE, lambda _: None)


@pytest.mark.parametrize(
    ("tables", "what"),
    [
        ({"backbone": {**signed_hospitals.BACKBONE, "mean": [0.4, 0.4, 0.4]}}, "preprocessing"),
        ({"backbone": {"name": "test_vit2", "weights": "random", "image_size": 32}}, "the frozen backbone"),
        ({"classes": ["dark", "green", "blue"]}, "classes"),
        ({"head": {"kind": "mlp", "hidden": 8}}, "head"),
        ({"tuner": [{"name": "bitfit"}]}, "tuner"),
        ({"tuner": [{"name": "lora", "targets": ["fc1"]}]}, "tuner"),
        ({"tuner": [{"name": "lora", "dora": True}]}, "tuner"),
        ({"seed": 1}, "the start of training"),
    ],
)
def test_sites_that_fine_tuned_different_things_are_refused(
    tmp_path: Path, three: list[Hospital], tables: dict[str, Any], what: str
) -> None:
    other = hospital(tmp_path, "south", 5, **tables)
    with pytest.raises(
        StateError, match=rf"'east' and 'south' do not go together: {what}(.|\n)*allowed(.|\n)*received"
    ):
        _merge(tmp_path / "out", three[0], other)


def _resigned(site: Hospital, out: Path, change: Any) -> Hospital:
    tensors, meta = checkpoint.load(site.adapter)
    change(tensors)
    checkpoint.save(out, tensors, signing.sign(tensors, meta, site.private))
    return Hospital(site.name, out, site.public, site.private)


def test_a_site_that_signs_rubbish_is_refused_by_name(tmp_path: Path, three: list[Hospital]) -> None:
    def broken(tensors: dict[str, Tensor]) -> None:
        tensors["head.bias"][0] = torch.nan

    def missing(tensors: dict[str, Tensor]) -> None:
        del tensors["blocks.0.attn.qkv.lora.shared.b"]

    def shorter(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.0.attn.qkv.lora.shared.a"] = tensors["blocks.0.attn.qkv.lora.shared.a"][:1]

    def more(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.0.norm1.weight"] = torch.ones(64)

    def unknown(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.99.norm1.weight"] = torch.ones(64)

    for change, words in (
        (broken, "'west' holds NaN or infinity"),
        (missing, "lacks tensors of the model"),
        (shorter, "'west' has tensors of another shape"),
        (more, "'east' and 'west' are of different layers"),
        (unknown, "'west' has tensors that this model has not"),
    ):
        bad = _resigned(three[2], tmp_path / f"{change.__name__}.safetensors", change)
        with pytest.raises(StateError, match=re.escape(words)):
            _merge(tmp_path / "out", three[0], bad)
    with pytest.raises(StateError, match=r"a site can be added once(.|\n)*east"):
        _merge(tmp_path / "out", three[0], three[0])
    with pytest.raises(StateError, match=r"there is no adapter(.|\n)*nowhere"):
        merge.merge([tmp_path / "nowhere"], [], tmp_path / "out", ONE, lambda _: None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(), "--validate"),
        (Options(scale=1.0, density=0.5), "--density"),
        (Options(scale=1.0, seed=3), "--seed"),
        (Options(scale=1.0, rule="ties", weigh="examples"), "--weigh"),
        (Options(scale=1.0, scales=(0.5,)), "--scales"),
        (Options(scale=1.0, select="accuracy"), "--select"),
        (Options(scale=float("nan")), "--scale"),
        (Options(scale=1.0, rule="ties", density=1.5), "--density"),
    ],
)
def test_options_without_an_effect_or_a_sense_are_refused(
    tmp_path: Path, three: list[Hospital], options: Options, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        _merge(tmp_path / "out", *three, options=options)


def test_a_rank_of_what_has_none_and_counts_that_were_not_told(tmp_path: Path) -> None:
    sites = [hospital(tmp_path, name, seed, tuner=[{"name": "norm"}]) for seed, name in enumerate(("east", "west"))]
    with pytest.raises(ConfigError, match="nothing that is merged is a product"):
        _merge(tmp_path / "out", *sites, options=Options(scale=1.0, rank=2))
    with pytest.raises(ConfigError, match="'east' does not tell how many images"):
        _merge(tmp_path / "out", *sites, options=Options(scale=1.0, weigh="examples"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(StateError, match="not empty"):
        _merge(tmp_path / "full", *sites)


# ------------------------------------------------------------------------------------------------ at the site
def test_what_has_no_common_start_is_not_signed(tmp_path: Path) -> None:
    key = tmp_path / "key"
    signing.new_key(key)
    for at, (tables, words) in enumerate(
        [
            ({"strategy": {"name": "local"}}, "started from a secret of the site"),
            ({"strategy": {"name": "dual_lora"}}, "one adapter whose start all sites share"),
            ({"head": {"share": "personal"}}, "one adapter whose start all sites share"),
        ]
    ):
        run = signed_hospitals.finished(tmp_path / f"run{at}", "east", 0, **tables)
        with pytest.raises(ConfigError, match=words):
            export(run, "safetensors", tmp_path / "out", "east", sign=key)
    run = signed_hospitals.finished(tmp_path / "run", "east", 0)
    (run / "adapters" / "east.safetensors").rename(run / "adapters" / "global.safetensors")
    with pytest.raises(ConfigError, match="--site"):
        export(run, "safetensors", tmp_path / "out", sign=key)
    with pytest.raises(ConfigError, match="only safetensors can be signed"):
        export(run, "timm", tmp_path / "out", sign=key)
    with pytest.raises(ConfigError, match="--counts"):
        export(run, "safetensors", tmp_path / "out", counts=True)


def test_counts_leave_the_site_only_where_it_says_so(tmp_path: Path, three: list[Hospital]) -> None:
    silent = hospital(tmp_path, "south", 1)
    _, meta = checkpoint.load(silent.adapter)
    assert meta["vector"] | {"start": ""} == {"start": "", "num_examples": None, "class_counts": None}
    _, meta = checkpoint.load(three[0].adapter)
    assert meta["vector"]["num_examples"] == 10
    assert meta["vector"]["class_counts"] == signed_hospitals.COUNTS["classes"]


# ------------------------------------------------------------------------------------------------ what it is good for
def test_a_merged_folder_predicts_and_is_exported_like_a_run(tmp_path: Path, three: list[Hospital]) -> None:
    merged = _merge(tmp_path / "out", *three, options=Options(scale=1.0, sign=three[0].private))
    trained = load_trained(merged, device="cpu")
    assert trained.name == "merged"
    assert torch.equal(_outputs(trained), _outputs(load(merged)))
    assert (export(merged, "peft", tmp_path / "peft") / "adapter_config.json").is_file()
    assert (export(merged, "timm", tmp_path / "timm") / "model.safetensors").is_file()
    with pytest.raises(StateError, match="safetensors already"):
        export(merged, "safetensors", tmp_path / "again")
    with pytest.raises(StateError, match=r"no model of this name(.|\n)*merged"):
        load_trained(merged, "east")
    values, manifest = checkpoint.load(merged / ADAPTER)
    assert signing.verify(values, manifest, "") == signing.trusted([str(three[0].public)])[0].key


# ------------------------------------------------------------------------------------------------ the choice of a scale
CHOICE = """
[sites]
source = "phantom"
num_images = 60
image_size = 32
[backbone]
name = "test_vit"
weights = "random"
image_size = 32
[[tuner]]
name = "lora"
"""


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Hospital]]:
    """A configuration with images, and adapters for its classes."""
    folder = tmp_path_factory.mktemp("phantom")
    file = folder / "sites.toml"
    file.write_text(CHOICE)
    classes = list(run.prepare(config.load(file), lambda _: None).classes)
    sites = [hospital(folder, name, at, classes=classes) for at, name in enumerate(("east", "west"))]
    return file, sites


def _told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / merge.REPORT).read_text())
    return found


def test_the_scale_is_chosen_on_validation_images_alone(
    tmp_path: Path, phantom: tuple[Path, list[Hospital]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, sites = phantom
    read: list[Any] = []
    looked = candidates.validated

    def watch(trained: Trained, data: SiteData) -> dict[str, float | None]:
        read.append(data.val)
        return looked(trained, replace(data, train=None, test=None))  # type: ignore[arg-type]

    monkeypatch.setattr(candidates, "validated", watch)
    options = Options(validate=(file,), select="loss", scales=(0.5, 1.0, 4.0))
    told = _told(_merge(tmp_path / "out", *sites, options=options))
    means, table = told["validation"]["means"], told["validation"]["sites"]
    assert list(means) == ["start", "east alone", "west alone", "0.5", "1", "4"]
    assert told["scale"] == min((0.5, 1.0, 4.0), key=lambda scale: means[candidates.label(scale)])
    for name, mean in means.items():
        assert mean == pytest.approx(sum(row[name]["loss"] for row in table.values()) / len(table))
    assert len(read) == 6 * len(table)
    prepared = run.prepare(config.load(file), lambda _: None)
    merged = load(tmp_path / "out", device="cpu")
    name, data = next(iter(prepared.sites.items()))
    assert looked(merged, data) == table[name][candidates.label(told["scale"])]


def test_sites_that_validate_apart_choose_like_one_that_has_all(
    tmp_path: Path, phantom: tuple[Path, list[Hospital]]
) -> None:
    """Every site writes its numbers with the same command; the files are read where the merge is made."""
    file, sites = phantom
    together = _told(_merge(tmp_path / "all", *sites, options=Options(validate=(file,))))
    names = list(together["validation"]["sites"])
    apart = []
    for name in names:
        others = ", ".join(f'"{other}"' for other in names if other != name)
        own = tmp_path / f"{name}.toml"
        own.write_text(CHOICE.replace("[sites]", f"[sites]\nheld_out = [{others}]"))
        folder = _merge(tmp_path / name, *sites, options=Options(validate=(own,)))
        assert list(_told(folder)["validation"]["sites"]) == [name]
        apart.append(folder / merge.REPORT)
    found = _told(_merge(tmp_path / "told", *sites, options=Options(validate=tuple(apart))))
    assert found["validation"]["means"] == together["validation"]["means"]
    assert found["scale"] == together["scale"]
    with pytest.raises(StateError, match="of other adapters, or of another rule"):
        _merge(tmp_path / "sum", *sites, options=Options(rule="sum", validate=tuple(apart)))
    with pytest.raises(StateError, match="lack candidates"):
        _merge(tmp_path / "more", *sites, options=Options(scales=(0.33,), validate=tuple(apart)))
    with pytest.raises(ConfigError, match="a site validates once"):
        _merge(tmp_path / "twice", *sites, options=Options(validate=(file, apart[0])))


def test_what_cannot_choose_is_refused(
    tmp_path: Path, phantom: tuple[Path, list[Hospital]], three: list[Hospital]
) -> None:
    file, sites = phantom
    with pytest.raises(ConfigError, match=r"no such validation metric(.|\n)*balanced_accuracy"):
        _merge(tmp_path / "out", *sites, options=Options(validate=(file,), select="luck"))
    with pytest.raises(ConfigError, match="classes of this configuration"):
        _merge(tmp_path / "out", *three, options=Options(validate=(file,)))
    with pytest.raises(ConfigError, match="positive number"):
        _merge(tmp_path / "out", *sites, options=Options(validate=(file,), scales=(-1.0,)))
    other = tmp_path / "other.toml"
    other.write_text(CHOICE.replace('weights = "random"', 'weights = "random"\nmean = [0.1, 0.1, 0.1]'))
    with pytest.raises(ConfigError, match="prepared in another way"):
        _merge(tmp_path / "out", *sites, options=Options(validate=(other,)))
    assert not (tmp_path / "out").exists()


def test_what_is_left_after_a_subtraction_can_choose_again(
    tmp_path: Path, phantom: tuple[Path, list[Hospital]]
) -> None:
    file, sites = phantom
    whole = _merge(tmp_path / "whole", *sites, options=Options(scale=2.0))
    options = Options(validate=(file,), select="loss", scales=(0.5, 1.0))
    told = _told(_subtract(tmp_path / "left", whole, sites[1], options=options))
    assert told["scale"] in (0.5, 1.0)
    again = _told(_merge(tmp_path / "again", sites[0], options=options))["validation"]["means"]
    assert told["validation"]["means"]["0.5"] == pytest.approx(again["0.5"], abs=1e-6)


def test_a_backbone_that_is_nowhere_and_a_scale_at_the_edge_are_told(
    tmp_path: Path, phantom: tuple[Path, list[Hospital]]
) -> None:
    file, sites = phantom
    told: list[Any] = []
    words = [site.adapter for site in sites], [site.trust for site in sites]
    merge.merge(*words, tmp_path / "edge", Options(validate=(file,), select="loss", scales=(0.1, 0.2)), told.append)
    assert [e["text"] for e in told if e["event"] == "warning" and "edge of the candidates" in e["text"]]
    with pytest.raises(BackboneError, match=r"adapter\.safetensors"):
        merge.merge(*words, tmp_path / "out", Options(scale=1.0, weights=str(tmp_path / "no file")), told.append)


# ------------------------------------------------------------------------------------------------ as the start of a run
def _federation(sites: list[Hospital], out: Path, rank: int = 3, **tables: Any) -> Any:
    """A merge, and a configuration of a small federation that starts from it."""
    tuner = [{"name": "lora", "rank": rank}]
    _merge(out, *sites, options=Options(scale=1.0, rank=rank)) if not out.exists() else None
    return federation.configure(**{"start": str(out), "tuner": tuner, "train": {"rounds": 1}, **tables})


def test_a_run_starts_from_a_merged_model(tmp_path: Path, three: list[Hospital]) -> None:
    out = tmp_path / "merged"
    settings = _federation(three, out)
    pieces, merged = federation.assemble(settings), load(out)
    for seed in (0, 5):
        assert all(torch.equal(value, merged.variables[name]) for name, value in pieces.model.initial(seed).items())
    assert set(pieces.common) == set(pieces.model.specs), "every site has it, so the start is not sent"
    outcome = federation.run(tmp_path / "run", settings, federation.hospitals(14, 9))
    assert not outcome.sent("down")
    drift = {name: value - merged.variables[name] for name, value in outcome.served("a").items()}
    assert 0 < max(float(value.abs().max()) for value in drift.values()) < 0.1
    hashes = {config.agreement_hash(s, "b", ("x",), pieces.backbone.preprocessing) for s in (settings, settings)}
    other = _federation(three[:2], tmp_path / "other")
    hashes.add(config.agreement_hash(other, "b", ("x",), pieces.backbone.preprocessing))
    assert len(hashes) == 2, "which start it is, not where it lies"


def test_a_personal_part_still_starts_from_the_sites_secret(tmp_path: Path, three: list[Hospital]) -> None:
    settings = _federation(three, tmp_path / "merged", strategy={"name": "dual_lora"})
    model = federation.assemble(settings).model
    first, other = model.initial(0), model.initial(1)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {name for name in first if name.endswith("personal.a")}


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, three: list[Hospital]) -> None:
    out = tmp_path / "merged"
    for rank, tables, words in (
        (3, {"tuner": [{"name": "lora", "rank": 2}]}, "tensors of another size"),
        (3, {"tuner": [{"name": "lora", "rank": 3, "alpha": 6.0}]}, r"another size or scale(.|\n)*scale 2"),
        (3, {"tuner": [{"name": "norm"}]}, "other tensors than this run"),
        (3, {"backbone": {**federation.TABLE["backbone"], "name": "test_vit2"}}, "another backbone"),
        (3, {"start": str(tmp_path / "nowhere")}, "nothing to start from"),
    ):
        with pytest.raises(ConfigError, match=words):
            federation.assemble(_federation(three, out, rank, **tables))
    folded = _merge(tmp_path / "ties", *three, options=Options(rule="ties", scale=1.0))
    with pytest.raises(ConfigError, match=r"other tensors than this run(.|\n)*--rank"):
        federation.assemble(_federation(three, folded, tuner=[{"name": "lora", "rank": 2}]))


def test_what_began_elsewhere_is_no_vector(tmp_path: Path, three: list[Hospital]) -> None:
    merged = _merge(tmp_path / "merged", three[0])
    run = signed_hospitals.finished(tmp_path / "run", "east", 0, start=str(merged))
    key = tmp_path / "key"
    signing.new_key(key)
    with pytest.raises(ConfigError, match="began with what another left"):
        export(run, "safetensors", tmp_path / "out", "east", sign=key)
    shutil.rmtree(merged)
    assert load_trained(run, "east", device="cpu").name == "east", "a finished run needs its start no more"
