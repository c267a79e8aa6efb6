from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from consilium import config, config_file, registry
from consilium.data import Preprocessing
from consilium.errors import ConfigError


def _table(text: str = "") -> dict[str, Any]:
    return tomllib.loads(text)


def _refused(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.from_dict(_table(text))
    return caught.value


def test_the_quick_start_is_a_valid_configuration() -> None:
    assert config.load(None).sites.source == "phantom"


@pytest.mark.parametrize(
    "text",
    [
        "",
        '[strategy]\nname = "fedprox"\nmu = 0.5',
        '[train]\nlocal_steps = 4\noptimizer = "sgd"\nlearning_rate = 0.1',
        '[head]\nkind = "mlp"\nhidden = 9',
        '[sites.partition]\nkind = "iid"\nnum_sites = 3\nseed = 2',
        '[train]\nrounds = 4\n[evaluation]\nserve = "best"\nselect = "loss"\nevery = 4',
        "[engine]\nworkers = 3",
        '[sites.split]\ncolumn = "fold"',
        '[sites.partition]\nkind = "dirichlet"\nnum_sites = 3\nalpha = 0.5',
        '[[tuner]]\nname = "lora"\nrank = 2\n[[tuner]]\nname = "lora"\ntargets = ["fc1"]',
    ],
)
def test_a_configuration_survives_its_own_plain_form(text: str) -> None:
    first = config.from_dict(_table(text))
    again = config.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again.to_dict() == first.to_dict()


def test_the_plain_form_fills_in_the_defaults_of_the_members() -> None:
    plain = config.from_dict(_table('[strategy]\nname = "fedprox"\nmu = 0.5')).to_dict()
    assert plain["strategy"]["mu"] == 0.5
    assert plain["tuner"][0]["rank"] >= 1


@pytest.mark.parametrize(
    ("text", "key", "allowed"),
    [
        ("sead = 1", "sead", "seed"),
        ("[train]\nlocal_epoch = 1", "train.local_epoch", "local_epochs"),
        ("[train.schedule]\nwarm = 0.1", "train.schedule.warm", "warmup"),
        ("[sites.split]\nseeds = 1", "sites.split.seeds", "seed"),
        ("[head]\nshared = true", "head.shared", "share"),
    ],
)
def test_an_unknown_key_is_refused_and_the_known_ones_are_named(text: str, key: str, allowed: str) -> None:
    error = _refused(text)
    assert error.what == f"unknown key: {key}"
    assert allowed in str(error.allowed).split(", ")


def test_an_unknown_option_of_a_member_is_refused_too() -> None:
    assert _refused('[strategy]\nname = "fedavg"\nmu = 0.5').what == "unknown key: mu"
    assert _refused('[[tuner]]\nname = "lora"\nranc = 4').where == "tuners.lora"


@pytest.mark.parametrize(
    "text",
    [
        "seed = -1",
        'name = ""',
        'name = ".."',
        'name = "a/b"',
        "[backbone]\nstd = [0.0, 0.5, 0.5]",
        "[train]\nrounds = 0",
        "[train]\nlocal_epochs = 1\nlocal_steps = 5",
        "[train]\nmomentum = 0.5",
        '[sites.partition]\nkind = "dirichlet"\nnum_sites = 3',
        '[sites.partition]\nkind = "iid"\nnum_sites = 3\nalpha = 0.5',
        '[sites.partition]\nkind = "natural"\nnum_sites = 3',
        "[sites.split]\ntrain = 0.9",
        '[sites.split]\ncolumn = "fold"\nfile = "split.parquet"',
        '[sites.split]\ncolumn = "fold"\nseed = 3',
        "tuner = []",
        '[head]\nshare = "sometimes"',
        "[head]\nhidden = 9",
        "[sites.partition]\nseed = 2",
        '[evaluation]\nselect = "loss"',
        '[train]\nrounds = 4\n[evaluation]\nserve = "best"\nevery = 5',
        "[engine]\nworkers = -3",
        "[engine]\nworkers = 0",
        "[train.learning_rates]\nlora_a = -1.0",
        '[train]\noptimizer = "sgd"',
        '[train]\noptimizer = "sgd"\nlearning_rates = { head = 0.1 }',
    ],
)
def test_values_that_make_no_sense_are_refused(text: str) -> None:
    _refused(text)


@pytest.mark.parametrize("name", ["", " . ", "\u00a0", "..", "a/b", "a\\b"])
def test_a_name_that_is_no_folder_is_refused_in_words(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.from_dict({"name": name})
    assert caught.value.allowed == "a name that can be a folder's: no slash, and not only dots and blanks"
    assert config.from_dict({"name": ".a b. c"}).name == ".a b. c"


def test_a_refused_pairing_does_not_print_the_whole_configuration() -> None:
    error = _refused(f'name = "{"x" * 500}"\n[train]\nrounds = 4\n[evaluation]\nserve = "best"\nevery = 5')
    assert error.what == "these values do not go together"
    assert "Value error" not in str(error)
    assert len(str(error.received)) < 210
    split = _refused("[sites.split]\ntrain = 0.9")
    assert (split.what, split.allowed) == ("this value cannot be used: sites.split", "train + val + test must be 1")


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "run.toml"
    file.parent.mkdir()
    file.write_text(
        '[backbone]\nname = "vit_tiny_patch16_224"\nweights = "../weights.safetensors"\n[engine]\ncache = "c"'
    )
    loaded = config.load(file)
    assert loaded.backbone.weights == tmp_path / "weights.safetensors"
    assert loaded.engine.cache == tmp_path / "deep" / "c"


class _Elsewhere(registry.Options):
    listing: Path
    more: tuple[Path, ...] = ()
    model: Path | Literal["none"] = "none"
    title: str = "a/b"


def test_paths_of_any_member_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in registry.KINDS:
        registry.members(kind)
    monkeypatch.setattr(registry, "_members", dict(registry._members))
    for kind in registry.KINDS:
        registry.register(kind, "elsewhere", options=_Elsewhere, summary="a test's own")(lambda options: options)
    keys = {"listing": "a.csv", "more": ["b", "/c"], "model": "none", "title": "d/e"}
    member = {"name": "elsewhere", **keys}
    table = {"sites": {"source": "elsewhere", "split": {"file": "s"}, **keys}, "tuner": [member, member]}
    loaded = config.from_dict({**table, "task": member, "strategy": member}, base=tmp_path)
    wanted = {**keys, "listing": str(tmp_path / "a.csv"), "more": [str(tmp_path / "b"), "/c"]}
    assert [each.options() for _, _, each in loaded.members()] == [wanted] * 5
    assert loaded.sites.split.file == tmp_path / "s"


@pytest.mark.parametrize("word", ["random", "embedded"])
def test_words_for_weights_are_no_paths(word: str) -> None:
    assert config.from_dict({"backbone": {"weights": word}}).backbone.weights == word


def test_overrides_reach_nested_keys_and_keep_their_types() -> None:
    loaded = config.load(None, ["train.rounds=3", "train.schedule.name=constant", "seed = 7", 'tuner={name="linear"}'])
    assert (loaded.train.rounds, loaded.train.schedule.name, loaded.seed) == (3, "constant", 7)
    assert [tuner.name for tuner in loaded.tuner] == ["linear"]


def test_an_override_reaches_the_only_tuner_and_one_of_several_by_its_place() -> None:
    table = {"tuner": [{"name": "lora"}, {"name": "lora"}]}
    config_file.override(table, "tuner.1.rank=2")
    assert table["tuner"] == [{"name": "lora"}, {"name": "lora", "rank": 2}]
    assert config.load(None, ['tuner=[{name="lora"}]', "tuner.rank=2"]).tuner[0].options() == {"rank": 2}


@pytest.mark.parametrize("override", ["train.rounds", "=3", "seed.deeper=1", "tuner.7.rank=1", "tuner.first.rank=1"])
def test_an_override_that_reaches_nothing_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        config.load(None, [override])


@pytest.mark.parametrize("content", [b"[train", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        config.load(file)


IMAGES = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _hashes(**changes: object) -> tuple[str, str]:
    made = config.from_dict(changes)
    return config.agreement_hash(made, "digest", ["a", "b"], IMAGES), config.config_hash(made, "digest", IMAGES)


def test_what_changes_no_result_changes_no_hash() -> None:
    assert _hashes() == _hashes(engine={"workers": 4, "cache": "elsewhere"})


def test_where_data_lie_and_the_threads_change_the_configuration_but_not_the_agreement() -> None:
    for change in ({"engine": {"threads": 2}}, {"sites": {"split": {"seed": 5}}}, {"evaluation": {"bootstrap": 10}}):
        agreement, whole = _hashes(**change)
        assert agreement == _hashes()[0]
        assert whole != _hashes()[1]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"tuner": {"name": "linear"}},
        {"head": {"share": "personal"}},
        {"strategy": {"name": "local"}},
        {"train": {"rounds": 11}},
    ],
)
def test_what_all_sites_must_share_changes_the_agreement(change: dict[str, object]) -> None:
    agreement, whole = _hashes(**change)
    assert agreement != _hashes()[0]
    assert whole != _hashes()[1]


@pytest.mark.parametrize("change", [{"image_size": 48}, {"mean": (0.4, 0.5, 0.5)}, {"crop_mode": "border"}])
def test_images_prepared_otherwise_change_both_hashes_whoever_says_so(change: dict[str, Any]) -> None:
    made, other = config.from_dict({}), replace(IMAGES, **change)
    assert config.agreement_hash(made, "digest", ["a", "b"], other) != _hashes()[0]
    assert config.config_hash(made, "digest", other) != _hashes()[1]


def test_a_default_written_out_is_the_same_configuration() -> None:
    assert _hashes() == _hashes(train={"rounds": 10}, head={"kind": "linear"})


def test_tuners_may_be_named_in_a_list() -> None:
    short, tables = (
        config.from_dict({"tuner": t}) for t in (["lora", "prompts"], [{"name": "lora"}, {"name": "prompts"}])
    )
    assert short == tables
    assert config.from_dict({"tuner": "bitfit"}).tuner[0].name == "bitfit"


@pytest.mark.parametrize("key", ["prefix_cache", "compile", "gradient_checkpointing"])
def test_a_switch_is_true_or_false_and_no_text(key: str) -> None:
    error = _refused(f'[engine]\n{key} = "no"')
    assert (error.what, error.allowed) == (
        f"this value cannot be used: engine.{key}",
        "Input should be a valid boolean",
    )


@pytest.mark.parametrize(("value", "limit"), [('"yes"', "valid integer"), ("0", "greater than or equal to 1")])
def test_all_types_of_a_key_are_named(value: str, limit: str) -> None:
    error = _refused(f"[engine]\nstacked_sites = {value}")
    assert error.what == "this value cannot be used: engine.stacked_sites"
    assert limit in str(error.allowed)
    assert str(error.allowed).endswith(" or 'auto'")


def test_a_table_of_numbers_still_names_the_number() -> None:
    error = _refused("[train]\nlearning_rates = { head = 0, lora_a = 0 }")
    assert error.what == "this value cannot be used: train.learning_rates.head"
