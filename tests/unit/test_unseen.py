"""Sites that took no part: which images they train on, what they have before and after, crashes, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium import checkpoint, config, registry, run
from consilium.check import check
from consilium.cli import main
from consilium.config_unseen import UnseenConfig
from consilium.data import Examples
from consilium.engines.site import Site
from consilium.errors import ConfigError, DataError, StateError, TrainingError
from consilium.experiment import assemble
from consilium.local.train import Trainer
from consilium.predict import load_trained
from consilium.protocols import ServerState
from consilium.report.html import render
from consilium.tensors import Tensors, digest_all, equal
from consilium.unseen import measure
from consilium.unseen.again import curves, unseen
from consilium.unseen.newcomer import Newcomer, class_counts, trained
from consilium.unseen.shots import few, order
from tests import federation, hospitals, variants
from tests.e2e.runs import contents, events, read

GUEST = "summit"
TABLE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "sites": {"source": "phantom", "num_images": 160, "image_size": 32, "held_out": [GUEST]},
    "backbone": {"name": "test_vit", "weights": "random", "image_size": 32},
    "tuner": [{"name": "lora", "rank": 2}],
    "train": {"rounds": 1, "batch_size": 8, "learning_rate": 0.01, "local_steps": 4},
    "evaluation": {"bootstrap": 20},
    "unseen": {"shots": [2, 1000], "draws": 2, "steps": 4},
    "engine": {"device": "cpu"},
}
Runs = Callable[..., Path]


def configure(**tables: Any) -> config.Config:
    return config.from_dict({**TABLE, **tables})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Finished run folders, by strategy; for reading only."""
    made: dict[str, Path] = {}

    def finished(strategy: str) -> Path:
        if strategy not in made:
            out = tmp_path_factory.mktemp(strategy) / "out"
            made[strategy] = run.run(configure(strategy={"name": strategy}), out)
        return made[strategy]

    return finished


# ------------------------------------------------------------------------------------------------ which images
@st.composite
def splits(draw: st.DrawFn) -> Examples:
    labels = draw(st.lists(st.integers(0, 2), min_size=1, max_size=24))
    groups = draw(st.lists(st.sampled_from("uvwxyz"), min_size=len(labels), max_size=len(labels)))
    ids = np.array([f"i{number:02d}" for number in range(len(labels))])
    return Examples(np.zeros((len(labels), 1, 1, 3), np.uint8), np.arange(len(labels)), np.array(labels), ids,
                    np.array(groups), np.array(["site"] * len(labels)))  # fmt: skip


def drawn(examples: Examples, shots: int, draw: int = 0) -> set[str]:
    return set(few(examples, shots, 5, "site", draw).ids.tolist())


@settings(max_examples=60, deadline=None)
@given(splits(), st.integers(1, 6), st.integers(0, 3))
def test_draws_are_nested_and_hold_k_images_of_every_class_that_has_them(ex: Examples, shots: int, draw: int) -> None:
    found = few(ex, shots, 5, "site", draw)
    assert (
        np.bincount(found.labels, minlength=3).tolist()
        == np.minimum(np.bincount(ex.labels, minlength=3), shots).tolist()
    )
    assert drawn(ex, shots, draw) <= drawn(ex, shots + 1, draw)
    assert found.ids.tolist() == sorted(found.ids.tolist()), "in the order of the split"
    for label in set(ex.labels.tolist()):  # no patient gives a second image of a class before all have given one
        took = pd.Series(found.groups[found.labels == label]).value_counts()
        there = pd.Series(ex.groups[ex.labels == label]).value_counts()
        assert all(took.get(g, 0) >= min(count, took.max() - 1) for g, count in there.items())


@given(splits(), st.randoms(use_true_random=False))
def test_a_draw_does_not_depend_on_the_order_of_the_rows_nor_on_the_images(ex: Examples, random: Any) -> None:
    places = list(range(len(ex)))
    random.shuffle(places)
    moved = Examples(
        ex.images + 7, *(getattr(ex, key)[places] for key in ("rows", "labels", "ids", "groups", "origins"))
    )
    assert ex.ids[order(ex, 5, "site", 0)].tolist() == moved.ids[order(moved, 5, "site", 0)].tolist()


def test_draws_sites_and_seeds_differ() -> None:
    count = 40
    ids = np.array([f"i{number:02d}" for number in range(count)])
    ex = Examples(np.zeros((count, 1, 1, 3), np.uint8), np.arange(count), np.zeros(count, np.int64), ids, ids, ids)
    orders = {tuple(order(ex, seed, site, draw)) for seed in (0, 1) for site in "ab" for draw in (0, 1)}
    assert len(orders) == 8


# ------------------------------------------------------------------------------------------------ identities
def rows(out: Path, model: str, shots: int = 0, draw: int = 0) -> pd.DataFrame:
    table = pd.read_parquet(out / "unseen.parquet")
    chosen = table[(table["model"] == model) & (table["shots"] == shots) & (table["draw"] == draw)]
    return chosen.drop(columns=["model", "shots", "draw"]).reset_index(drop=True)


def said_by(out: Path, variables: Tensors) -> pd.DataFrame:
    """What a model with these variables says of the guest's images."""
    settings = config.from_dict(checkpoint.read_json(out / "config.json")["config"])
    prepared = run.prepare(settings, lambda _: None)
    return Site(assemble(settings, prepared.classes), prepared.held_out[GUEST], out, 0).predicted(variables)


def test_zero_shot_is_the_global_model_that_is_exported(runs: Runs) -> None:
    out = runs("fedavg")
    trained = load_trained(out, None, "cpu")
    pd.testing.assert_frame_equal(rows(out, "zero-shot"), said_by(out, trained.variables), check_exact=True)


def test_a_newcomer_begins_with_the_scale_that_sites_chose(tmp_path: Path) -> None:
    strategy = {"name": "merge", "scales": [0.25, 4.0], "select": "loss"}
    out = run.run(configure(strategy=strategy, unseen={"shots": [1], "draws": 1, "steps": 1}), tmp_path / "out")
    settings = config.from_dict(read(out / "config.json")["config"])
    prepared = run.prepare(settings, lambda _: None)
    experiment = assemble(settings, prepared.classes)
    best = experiment.strategy.declares.choice.candidates  # type: ignore[union-attr]
    chosen = read(out / "summary.json")["chosen"]["best"]
    assert chosen in best
    for scale in best:  # whichever it was: the other one is no model of this run
        summary = {**read(out / "summary.json"), "chosen": {"best": scale}}
        checkpoint.write_json(out / "summary.json", summary)
        assert float(measure._served(out, experiment).shared["merge/scale"]) == float(scale)


def test_a_personal_adapter_at_its_start_adds_nothing(runs: Runs) -> None:
    out = runs("dual_lora")
    table = pd.read_parquet(out / "held_out" / "sites" / GUEST / "predictions.parquet")
    shared = table[table["model"] == "global"].drop(columns="model").reset_index(drop=True)
    pd.testing.assert_frame_equal(rows(out, "zero-shot"), shared, check_exact=True)


def fine_tuned(out: Path, start: Tensors, roles: set[str] | None) -> Tensors:
    """By the plain trainer, on all training images of the guest."""
    settings = config.from_dict(checkpoint.read_json(out / "config.json")["config"])
    prepared = run.prepare(settings, lambda _: None)
    images = prepared.held_out[GUEST].train
    schedule = settings.train.schedule.model_copy(update={"restart": True})
    pieces = assemble(settings.model_copy(update={"train": settings.train.model_copy(update={"schedule": schedule})}),
                      prepared.classes)  # fmt: skip
    trainer = Trainer(pieces.setting, images, 1, GUEST, class_counts(images, len(prepared.classes)))
    only = None if roles is None else lambda tag: tag.role in roles
    return trainer.fit(start, only=only, epochs=None).variables


def test_all_images_are_fine_tuning_by_the_local_trainer(runs: Runs) -> None:
    out = runs("fedavg")
    found = fine_tuned(out, load_trained(out, None, "cpu").variables, None)
    pd.testing.assert_frame_equal(rows(out, "k-shot", 1000), said_by(out, found), check_exact=True)
    pd.testing.assert_frame_equal(rows(out, "k-shot", 1000, 1), said_by(out, found), check_exact=True)


def test_all_images_of_a_personal_head_are_a_linear_probe_of_the_shared_body(runs: Runs) -> None:
    out = runs("fedper")
    start = checkpoint.load(out / "held_out" / "sites" / GUEST / "served.safetensors")[0]
    found = fine_tuned(out, start, {"head"})
    assert equal({n: found[n] for n in found if "lora" in n}, {n: start[n] for n in start if "lora" in n})
    pd.testing.assert_frame_equal(rows(out, "k-shot", 1000), said_by(out, found), check_exact=True)
    about = read(out / "unseen.json")
    assert about["zero_shot"] == {"measured": False, "reason": "the head of a newcomer is untrained"}
    assert about["trains"]["way"] == "own round"


def test_the_baseline_is_a_site_that_trains_alone(runs: Runs, tmp_path: Path) -> None:
    """One round of the strategy `local` in which the guest takes part."""
    sites = {**TABLE["sites"], "held_out": ["alpine"]}
    train = {**TABLE["train"], "schedule": {"restart": True}}
    alone = run.run(configure(strategy={"name": "local"}, sites=sites, train=train, unseen=None), tmp_path / "alone")
    found = checkpoint.load(alone / "adapters" / f"{GUEST}.safetensors")[0]
    pd.testing.assert_frame_equal(
        rows(runs("fedavg"), "local k-shot", 1000), said_by(runs("fedavg"), found), check_exact=True
    )


def test_the_baseline_does_not_depend_on_the_strategy(runs: Runs) -> None:
    for other in ("dual_lora", "fedper", "fedamp"):
        one, two = (rows(runs(name), "local k-shot", 2, 1) for name in ("fedavg", other))
        pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_what_was_received_stays_as_it_came(runs: Runs) -> None:
    """fedopal's own loss trains the personal adapter; the shared one, and the head, are the run's."""
    out = runs("fedopal_weights")
    about = read(out / "unseen.json")
    assert about["trains"]["way"] == "own round"
    start = checkpoint.load(out / "held_out" / "sites" / GUEST / "served.safetensors")[0]
    assert about["trains"]["tensors"] == sum(".personal." in name for name in start)


def test_a_strategy_that_leaves_nothing_for_a_newcomer_says_so(runs: Runs) -> None:
    out = runs("fedamp")
    about, table = read(out / "unseen.json"), pd.read_parquet(out / "unseen.parquet")
    assert "nothing for a site that took no part" in about["zero_shot"]["reason"]
    assert set(table["model"]) == {"local k-shot"}


# ------------------------------------------------------------------------------------------------ it took no part
def patient(site: str, number: int) -> str:
    """Two were seen everywhere, four more at two sites."""
    shared = number < 2 or (number < 6 and site != "south")
    return f"{'' if shared else site}{number}"


PATIENTS = [
    (site, patient(site, number), "ab"[number % 2])
    for site in ("east", "south", "west")
    for number in range(9)
    for _ in "12"
]


def trained_on(folder: Path, table: pd.DataFrame, files: dict[str, bytes], strategy: str, held_out: list[str]) -> Path:
    """A run of real files, in which class counts travel and weigh."""
    hospitals.write(folder, table, files)
    sites = {"source": "manifest", "table": str(folder / "table.csv"), "images": str(folder / "images"),
             "columns": hospitals.COLUMNS, "held_out": held_out}  # fmt: skip
    task = {"class_weight": "inverse", "class_counts": "federation"}
    train = {**TABLE["train"], "rounds": 2, "participation": 0.5}
    unseen = {**TABLE["unseen"], "draws": 1} if held_out else None
    settings = configure(sites=sites, task=task, train=train, unseen=unseen, strategy={"name": strategy})
    return run.run(settings, folder / "out")


def left(out: Path) -> dict[str, Any]:
    """All that a run made: tensors by digest, what its log says, numbers, predictions."""
    names = [*out.glob("checkpoints/*"), *out.glob("adapters/*"), *out.glob("sites/*/*.safetensors")]
    found: dict[str, Any] = {str(path.relative_to(out)): digest_all(checkpoint.load(path)[0]) for path in names}
    result = read(out / "result.json")
    found |= {key: result[key] for key in ("sites", "metrics", "image_passes", "classes")}
    found["bytes"] = [result["bytes"][way] for way in ("up", "down")]  # without envelopes, which hold seconds
    found["log"] = [{k: v for k, v in line.items() if k == "val_mean"} for line in events(out)]
    found["predictions"] = (out / "predictions.parquet").read_bytes()
    found["counts"] = [checkpoint.load(path)[1]["class_counts"] for path in sorted(out.glob("checkpoints/*"))]
    return found


@pytest.mark.parametrize("strategy", ["fedavg", "dual_lora"])
def test_a_run_without_the_site_and_one_that_holds_it_out_are_the_same(tmp_path: Path, strategy: str) -> None:
    """Bit by bit, whatever its images are, although some patients were seen there too."""
    table = hospitals.records(*PATIENTS)
    files = {f"{id}.png": hospitals.png(hospitals.pixels(number, 32, 32)) for number, id in enumerate(table["id"])}
    other = {**files, **{f"{id}.png": hospitals.png(hospitals.pixels(900 + number, 32, 32))
                         for number, id in enumerate(table["id"]) if table["site"][number] == "west"}}  # fmt: skip
    held = left(trained_on(tmp_path / "held", table, files, strategy, ["west"]))
    assert left(trained_on(tmp_path / "other", table, other, strategy, ["west"])) == held
    inside = table[table["site"] != "west"].reset_index(drop=True)
    assert left(trained_on(tmp_path / "without", inside, files, strategy, [])) == held
    assert sum(held["counts"][0]) == sum(each["train"]["n"] for each in held["sites"].values())
    one, two = (pd.read_parquet(tmp_path / name / "out" / "unseen.parquet") for name in ("held", "other"))
    assert not one.equals(two)


# ------------------------------------------------------------------------------------------------ numbers
def test_numbers_are_means_over_draws_with_differences_paired_by_draw(runs: Runs) -> None:
    out = runs("fedavg")
    found = {(r["split"], r["model"], r["shots"], r["metric"]): r for r in read(out / "unseen.json")["rows"]}
    each = []
    for draw in range(2):
        table = rows(out, "k-shot", 2, draw).query("split == 'test'")
        labels, scores = table["label"].to_numpy(), table.filter(like="p.").to_numpy()
        each.append(float((scores.argmax(axis=1) == labels).mean()))
    row = found["test", "k-shot", 2, "accuracy"]
    assert row["value"] == pytest.approx(np.mean(each), abs=1e-12)
    assert (row["least"], row["greatest"], row["draws"]) == (min(each), max(each), 2)
    assert row["sd"] == pytest.approx(np.std(each, ddof=1))
    for other, shots in (("local k-shot", 2), ("zero-shot", 0)):
        difference = found["test", f"k-shot - {other}", 2, "accuracy"]["value"]
        assert difference == pytest.approx(row["value"] - found["test", other, shots, "accuracy"]["value"])
    everything = found["test", "k-shot", 1000, "accuracy"]
    assert everything["sd"] == 0, "all images are one draw"
    about = read(out / "unseen.json")
    assert any("fewer than 1000" in note for note in about["notes"])
    assert about["sites"][GUEST]["taken"]["1000"] == about["sites"][GUEST]["train"]


# ------------------------------------------------------------------------------------------------ crashes
class Killed(BaseException):
    """The process ends here."""


def test_killed_while_training_on_few_images_goes_on_to_the_same_bits(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write, left = tmp_path / "out", checkpoint.write_bytes, [3]

    def dying(path: Path, data: bytes) -> None:
        if "shots-" in str(path):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
        write(path, data)

    settings = configure(strategy={"name": "fedavg"})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_bytes", dying)
        with pytest.raises(Killed):
            run.run(settings, out)
    assert not (out / "unseen.json").exists()
    assert not (out / "result.json").exists()
    before = {path: path.read_bytes() for path in out.rglob("checkpoints/*")}
    done = list(out.glob("held_out/shots-*/*/*.parquet"))
    assert len(done) == 3
    run.run(settings, out, resume=True)
    assert {path: path.read_bytes() for path in before} == before
    for name in ("unseen.json", "unseen.parquet"):
        assert (out / name).read_bytes() == (runs("fedavg") / name).read_bytes()
    assert not list(out.glob("held_out/shots-*"))


@pytest.mark.parametrize("strategy", ["fedavg", "dual_lora"])
def test_bits_do_not_depend_on_the_number_of_workers(runs: Runs, tmp_path: Path, strategy: str) -> None:
    engine = {"device": "cpu", "workers": 3}
    out = run.run(configure(strategy={"name": strategy}, engine=engine), tmp_path / "out")
    assert (out / "unseen.parquet").read_bytes() == (runs(strategy) / "unseen.parquet").read_bytes()


def test_an_error_in_a_worker_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: measure.Guest, name: str, shots: int, draw: int, __: UnseenConfig) -> pd.DataFrame:
        raise TrainingError(f"{name} {shots} {draw}")

    monkeypatch.setattr(measure.Guest, "predicted", broken)
    settings = configure(engine={"device": "cpu", "workers": 2}, unseen={"shots": [1, 2], "draws": 20, "steps": 1})
    with pytest.raises(TrainingError, match="k-shot 1 0"):
        run.run(settings, tmp_path / "out")
    assert not (tmp_path / "out" / "result.json").exists()


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"sites": {**TABLE["sites"], "held_out": []}}, "has an effect with sites.held_out"),
        ({"stages": [{"name": "one"}, {"name": "two"}]}, "several"),
        ({"unseen": {"shots": []}}, "at least 1"),
        ({"unseen": {"shots": [4, 4]}}, "given twice"),
        ({"unseen": {"shots": [0]}}, "greater than or equal to 1"),
        ({"unseen": {"steps": 0}}, "greater than or equal to 1"),
        ({"unseen": {"trains": "body"}}, "personal"),
        ({"unseen": {"shot": [1]}}, "unknown key"),
    ],
)
def test_what_makes_no_sense_is_refused(tables: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configure(**tables)


# ------------------------------------------------------------------------------------------------ the page
def test_the_report_shows_curves_and_says_what_is_missing(runs: Runs) -> None:
    page = (runs("fedavg") / "report.html").read_text()
    assert "Sites that took no part" in page
    assert "gain over alone" in page
    assert "fewer than 1000 training images" in page
    found = {(r["split"], r["model"], r["shots"], r["metric"]): r for r in read(runs("fedavg") / "unseen.json")["rows"]}
    row = found["test", "k-shot", 2, "balanced_accuracy"]
    assert f"{row['value']:.3f} with 2" in page
    for strategy, reason in (("fedper", "head of a newcomer is untrained"), ("fedamp", "leaves nothing for a site")):
        assert reason in (runs(strategy) / "report.html").read_text()


def test_a_damaged_unseen_json_is_named(runs: Runs, tmp_path: Path) -> None:
    out = shutil.copytree(runs("fedavg"), tmp_path / "out")
    (out / "unseen.json").write_text('{"schema_version": 2}')
    with pytest.raises(StateError, match=r"schema_version[\s\S]*unseen.json"):
        render([out])


# ------------------------------------------------------------------------------------------------ later, and again
def test_a_finished_run_is_measured_later_without_being_touched(tmp_path: Path) -> None:
    out = run.run(configure(unseen=None), tmp_path / "out")
    before = contents(out)
    assert not (out / "unseen.json").exists()
    path = unseen(out, {"shots": [2], "draws": 1, "steps": 3})
    first = read(path)
    assert (first["options"]["shots"], first["earlier"]) == ([2], [])
    changed = {name for name, content in contents(out).items() if before.get(name) != content}
    assert changed == {"unseen.json", "unseen.parquet", "report.html"}
    written = path.stat().st_mtime_ns
    assert unseen(out, {"shots": [2], "draws": 1, "steps": 3}).stat().st_mtime_ns == written, "there already"
    again = read(unseen(out, {"shots": [1, 2], "draws": 1, "steps": 3, "trains": "head"}))
    assert again["earlier"] == [first["options"]]
    assert again["trains"]["way"] == "head"
    assert [(row["site"], row["k"]) for row in curves(path)] == [(GUEST, 0), (GUEST, 1), (GUEST, 2)]


def test_later_or_at_once_is_the_same(runs: Runs, tmp_path: Path) -> None:
    out = run.run(configure(unseen=None, strategy={"name": "fedavg"}), tmp_path / "out")
    unseen(out, TABLE["unseen"])
    assert (out / "unseen.parquet").read_bytes() == (runs("fedavg") / "unseen.parquet").read_bytes()
    assert read(out / "unseen.json")["rows"] == read(runs("fedavg") / "unseen.json")["rows"]


def test_folders_that_cannot_be_measured_are_refused(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no run folder"):
        unseen(tmp_path)
    out = shutil.copytree(runs("fedavg"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"draws[\s\S]*unseen"):
        unseen(out, {"draws": 0})
    (out / "unseen.json").write_text("[1]")
    with pytest.raises(StateError, match=r"lacks what was measured[\s\S]*delete"):
        unseen(out)
    stored = read(out / "config.json")
    (out / "config.json").write_text(json.dumps({**stored, "data_digest": "other"}))
    (out / "unseen.json").unlink()
    with pytest.raises(StateError, match=r"data are not those of the run[\s\S]*data_digest"):
        unseen(out)
    (out / "result.json").unlink()
    with pytest.raises(StateError, match="not finished"):
        unseen(out)
    whole = {**stored["config"], "unseen": None, "sites": {**stored["config"]["sites"], "held_out": []}}
    (out / "config.json").write_text(json.dumps({**stored, "config": whole}))
    (out / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="held no site out"):
        unseen(out)
    several = [{"name": "one"}, {"name": "two"}]
    staged = {**stored["config"], "unseen": None, "stages": several}
    (out / "config.json").write_text(json.dumps({**stored, "config": staged}))
    with pytest.raises(ConfigError, match="without several stages"):
        unseen(out)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"unseen": {"trains": "personal"}}, r"keeps nothing personal[\s\S]*head, all"),
        ({"unseen": {"trains": "head"}, "head": {"share": "frozen"}}, r"head is not trained[\s\S]*unseen.trains"),
    ],
)
def test_what_the_strategy_lacks_is_refused_before_training(tables: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        run.run(configure(**tables), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=words):
        check(configure(**tables))


def test_an_unseen_site_without_training_images_is_refused(tmp_path: Path) -> None:
    table = hospitals.records(*PATIENTS).assign(split="train")
    table["split"] = ["test" if site == "west" else "train" for site in table["site"]]
    table["group"] = table["site"] + table["group"]
    hospitals.write(tmp_path, table)
    sites = {"source": "manifest", "table": str(tmp_path / "table.csv"), "images": str(tmp_path / "images"),
             "columns": hospitals.COLUMNS, "held_out": ["west"], "split": {"column": "split"}}  # fmt: skip
    with pytest.raises(DataError, match=r"no training images to draw from[\s\S]*west"):
        run.run(configure(sites=sites), tmp_path / "out")


# ------------------------------------------------------------------------------------------------ every strategy
WAYS = {
    "own round": {"apfl", "ditto", "dual_lora", "fedbn", "feddpa_t", "fedopal", "fedopal_representations",
                  "fedopal_weights", "fedper", "fedrep", "fedsa", "lg", "pfedme"},
    "own model": {"fedala", "fedalt", "local"},
    "finish": {"fedavg_finetune", "fedbabu", "feddpa_f"},
    "nothing": {"fedacs", "fedamp"},
}  # fmt: skip


def newcomer(strategy: str) -> tuple[Newcomer, ServerState, Examples]:
    """Before round 1, with two rounds configured, and a few images; the server has moved every tensor a little."""
    settings = variants.settings(strategy, train={"rounds": 2})
    pieces = federation.assemble(settings)
    server = pieces.strategy.init_server(pieces.initial(3), pieces.model.specs, ["a", "b"])
    site = federation.hospital("new", 6)
    return Newcomer(pieces, "new", measure.received(pieces, server, "new"), 5), server, site.train


@pytest.mark.parametrize("strategy", sorted(registry.members("strategies")))
def test_how_each_strategy_trains_a_newcomer(strategy: str) -> None:
    found, _, images = newcomer(strategy)
    expected = next((way for way, names in WAYS.items() if strategy in names), "all")
    assert bool(found.start) == (expected != "nothing")
    if expected == "nothing":
        return
    assert found.way(None, images) == expected
    for wanted in ("head", "all"):
        model = found.adapted(images, found.way(wanted, images), UnseenConfig(steps=2))
        moved = set(trained(found.start, model))
        heads = {name for name in found.experiment.model.specs if name.startswith("head.")}
        assert moved == heads if wanted == "head" else moved > set() and moved <= model.keys()
    if expected == "all":
        with pytest.raises(ConfigError, match="nothing personal"):
            found.way("personal", images)
        return
    assert found.way("personal", images) == expected
    model = found.adapted(images, expected, UnseenConfig(steps=2))
    moved = set(trained(found.start, model))
    assert moved
    if expected == "own round":
        kept = found.received.keys() & {n for n in moved if "/" not in n}
        own = {"apfl", "ditto", "pfedme", "feddpa_t"}  # a copy of the site's own, or a weight, stands in that place
        assert not kept or strategy in own


def test_a_newcomer_of_fedalt_has_the_mean_of_all_sites_beside_it() -> None:
    found, server, _ = newcomer("fedalt")
    moved = {name: value + 1 if name.startswith("blocks.") else value for name, value in server.shared.items()}
    held = measure.received(found.experiment, replace(server, shared=moved), "new")
    model = Newcomer(found.experiment, "new", held, 5).start
    for name in (n for n in model if ".personal." in n and "lora" in n and "router" not in n):
        shared = name.replace(".personal.", ".shared.")
        torch.testing.assert_close(model[name], moved[shared], rtol=0, atol=1e-5)
        assert torch.equal(model[shared], server.shared[f"start/{shared}"]), "its own adapter is the common start"


@pytest.mark.parametrize(
    "strategy",
    [{"name": "feddpa_t", "combine": "instance"}, {"name": "feddpa_f", "combine": "instance", "local_epochs": 1.0},
     {"name": "hetlora", "ranks": {"alpine": 1}}],
    ids=["feddpa_t", "feddpa_f", "hetlora"],
)  # fmt: skip
def test_no_more_than_k_images_of_the_guest_are_used(tmp_path: Path, strategy: dict[str, Any]) -> None:
    """Nothing changes where the others are not there, also of a model that compares images with the site's own."""
    train = {**TABLE["train"], "rounds": 2}
    out = run.run(configure(strategy=strategy, train=train, unseen={"shots": [2], "draws": 1, "steps": 2}), tmp_path)
    settings = config.from_dict(checkpoint.read_json(out / "config.json")["config"])
    prepared = run.prepare(settings, lambda _: None)
    whole = prepared.held_out[GUEST]
    only = replace(whole, train=few(whole.train, 2, settings.seed, GUEST, 0))
    again = replace(prepared, held_out={GUEST: only})
    before = rows(out, "k-shot", 2)
    measure.measure(out, assemble(settings, prepared.classes), again, lambda _: None)
    pd.testing.assert_frame_equal(rows(out, "k-shot", 2), before, check_exact=True)


@pytest.mark.parametrize(("strategy", "models"), [("ensemble", {"zero-shot", "local k-shot"}),
                                                  ("pooled", {"zero-shot", "k-shot", "local k-shot"})])  # fmt: skip
def test_references_have_something_for_a_newcomer_too(runs: Runs, strategy: str, models: set[str]) -> None:
    assert set(pd.read_parquet(runs(strategy) / "unseen.parquet")["model"]) == models


# ------------------------------------------------------------------------------------------------ the verb
def test_the_verb_prints_curves_and_ends_with_true_codes(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(runs("fedavg"), tmp_path / "out")

    def code(*words: str) -> object:
        with pytest.raises(SystemExit) as ended:
            main(["unseen", *words])
        return ended.value.code

    assert code(str(out), "--shots", "2", "--draws", "1", "--steps", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["k"], sorted(row)) for row in found] == [
        (0, ["federation", "k", "site"]),
        (2, ["alone", "federation", "gain over alone", "k", "site"]),
    ]
    assert code(str(out), "--shots", "2", "--draws", "1", "--steps", "2") == 0
    assert "gain over alone" in capsys.readouterr().out
    assert (code(str(tmp_path / "none")), code(str(out), "--trains", "personal"), code(str(out), "--steps", "0")) == (
        1, 2, 2)  # fmt: skip
