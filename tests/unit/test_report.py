from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from consilium import metrics
from consilium.errors import ConfigError, StateError
from consilium.report import figures, marks, sections
from consilium.report.html import render
from consilium.report.load import load_run
from consilium.report.text import UNDEFINED

CLASSES = ("akiec", "bcc", "mel", "nv")
SITES = {"aarhus": 160, "bern": 110, "coimbra": 60, "delft": 24}
ROUNDS = 6


# ------------------------------------------------------------------------------------------------ a run folder
def predictions(sites: dict[str, int], classes: Sequence[str], skill: float, model: str, split: str) -> pd.DataFrame:
    rng = np.random.default_rng(7)
    n, num_classes = sum(sites.values()), len(classes)
    labels = rng.choice(num_classes, n, p=np.arange(1, num_classes + 1) / np.arange(1, num_classes + 1).sum())
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += skill
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    site = np.repeat(list(sites), list(sites.values()))
    group = [f"{split}/{s}/{g}" for s, g in zip(site, rng.integers(0, max(2, n // 3), n), strict=True)]
    head = {"split": split, "model": model, "site": site, "id": [f"{split}{i:04d}" for i in range(n)], "group": group}
    return pd.DataFrame({**head, "label": labels, **{f"p.{name}": p[:, i] for i, name in enumerate(classes)}})


def sizes(sites: dict[str, int], classes: Sequence[str]) -> dict[str, Any]:
    def one(n: int) -> dict[str, Any]:
        return {"n": n, "groups": n // 2, "classes": dict.fromkeys(classes, n // len(classes))}

    return {site: {"train": one(4 * n), "val": one(n // 2), "test": one(n)} for site, n in sites.items()}


def events(sites: dict[str, int]) -> list[dict[str, Any]]:
    def site_event(number: int, at: int) -> dict[str, Any]:
        if (number + at) % 5 == 0:
            return {"status": "not_drawn"}
        level = 0.25 + 0.4 * (1 - 0.6**number) - 0.03 * at
        val = {key: {"balanced_accuracy": level + gain} for key, gain in (("incoming", 0), ("outgoing", 0.04))}
        return {"status": "ok", "loss": 1.4 - level, "num_steps": 5, "learning_rate": 1e-3, "val": val}

    exchanged = {way: dict.fromkeys(sites, 148_000) for way in ("up", "down")}
    return [
        {
            "round": number,
            "seconds": 1.5,
            "bytes": exchanged,
            "sites": {site: site_event(number, at) for at, site in enumerate(sites)},
            "val_mean": {},
        }
        for number in range(1, ROUNDS + 1)
    ]


def tensors(count: int) -> list[dict[str, Any]]:
    return [
        {"name": f"blocks.{k}.attn.qkv.lora_{x}", "role": f"lora_{x}", "shape": [8, 192],
         "dtype": "float32", "bytes": 6144}
        for k in range(count)
        for x in "ab"
    ]  # fmt: skip


def write_run(
    folder: Path,
    *,
    sites: dict[str, int] | None = None,
    classes: Sequence[str] = CLASSES,
    name: str = "skin-lora",
    skill: float = 1.4,
    sent: int = 3_552_000,
    **changes: Any,
) -> Path:
    sites = SITES if sites is None else sites
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        (split, model): predictions(sites, classes, skill + gain, model, split)
        for split in ("val", "test")
        for model, gain in (("personal", 0.0), ("global", -0.1), ("before_aggregation", -0.4))
    }
    local, pooled = (predictions(sites, classes, skill + gain, "personal", "test") for gain in (-0.6, 0.2))

    def tree(table: pd.DataFrame) -> Any:
        return metrics.metric_tree(table, classes, bootstrap=60)

    trees = {split: {model: tree(t) for (s, model), t in made.items() if s == split} for split in ("val", "test")}
    counts = {site: [9 - k for k in range(len(classes))] for site in sites}
    way = {"total": sent // 2, "per_site": {site: sent // 2 // len(sites) for site in sites}} if sites else {}
    result = {
        "schema_version": 1,
        "name": name,
        "consilium_version": "0.1.0",
        "versions": {"python": "3.11.9", "torch": "2.11.0"},
        "hardware": {"cpu": "8 cores"},
        "seed": 3,
        "config_hash": "c" * 64,
        "agreement_hash": "a" * 64,
        "split_hash": "5" * 64,
        "backbone": {"name": "vit_tiny_patch16_224", "digest": "d" * 64, "licence": "apache-2.0",
                     "preprocessing": {"image_size": 96}},
        "classes": list(classes),
        "parameters": {"backbone": 5_524_416, "trainable": 74_500, "exchanged": 74_500},
        "bytes": {"up": way, "down": way, "control": {"up": 9000, "down": 8000}},
        "wire": {"up": tensors(12), "down": tensors(12)},
        "kept_at_site": [{"name": "head.weight", "role": "head", "shape": [None, 192], "dtype": "float32",
                          "bytes": None}],
        "seconds": 754.2,
        "image_passes": {"total": 14_160, "per_site": {}},
        "peak_memory_bytes": 1_234_567_890,
        "rounds": ROUNDS,
        "served_round": ROUNDS,
        "sites": sizes(sites, classes),
        "warnings": ["site delft has 24 test images only"],
        "metrics": trees,
        "references": {
            "local": {"metrics": {"test": {"personal": tree(local)}}, "image_passes": {"bern": 9}, "seconds": 700.0},
            "pooled": {"metrics": {"test": {"personal": tree(pooled)}}, "image_passes": {"all": 9}, "seconds": 650.0},
        },
        "sites_harmed": metrics.sites_harmed(made["test", "personal"], local, classes, bootstrap=60),
        "majority": {"test": metrics.majority_baseline(counts, made["test", "personal"], classes, bootstrap=60)},
    }  # fmt: skip
    config = {"command": f"consilium run {name}.toml", "config": {
        "name": name, "tuner": [{"name": "lora", "rank": 8}], "strategy": {"name": "fedavg"},
        "evaluation": {"select": "balanced_accuracy"}}}  # fmt: skip
    split = pd.concat(made.values()).drop_duplicates("id")[["id", "site", "group", "label", "split"]]
    (folder / "result.json").write_text(json.dumps({**result, **changes}, allow_nan=False))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events(sites)))
    pd.concat(made.values()).to_parquet(folder / "predictions.parquet")
    split.to_parquet(folder / "split.parquet")
    return folder


def changed(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a run folder with other values in its result; `...` takes a key out."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    result = json.loads((folder / "result.json").read_text())
    kept = {key: value for key, value in {**result, **changes}.items() if value is not ...}
    (target / "result.json").write_text(json.dumps(kept))
    return target


class Page(HTMLParser):
    """Text, tags and attributes of a page; every tag must be closed in order."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def show(*folders: Path, out: Path | None = None) -> tuple[str, Page]:
    text = render(folders, out).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "one")


# ------------------------------------------------------------------------------------------------ one run
def test_the_page_stands_alone(folder: Path) -> None:
    text, page = show(folder)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("href", "src", "data", "action")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\(|@import|https?://", text)
    targets = {value for name, value in page.attributes if name == "id"}
    assert {link.removeprefix("#") for link in links} <= targets


def test_every_number_of_the_result_is_on_the_page(folder: Path) -> None:
    _, page = show(folder)
    result = json.loads((folder / "result.json").read_text())
    for metric in ("balanced_accuracy", "macro_auroc", "accuracy", "expected_calibration_error"):
        for model in ("personal", "global", "before_aggregation"):
            entry = result["metrics"]["test"][model][metric]
            for v in [entry["pooled"], entry["mean"], entry["worst"], *entry["per_site"].values()]:
                assert f"{v['value']:.3f}" in page.words
                assert any(word.startswith(f"{v['low']:.3f} to {v['high']:.3f}") for word in page.words)
    known = [*SITES, *CLASSES, *(result[key] for key in ("config_hash", "agreement_hash", "split_hash")), "d" * 64]
    assert all(word in page.words for word in known)
    assert all(t["name"] in page.words for t in [*result["wire"]["up"], *result["kept_at_site"]])
    assert {"3.55 MB", "12 min 34 s", "74\u202f500", "8 \u00d7 192", "any \u00d7 192"} <= set(page.words)
    assert "site delft has 24 test images only" in page.words
    assert any("consilium run skin-lora.toml" in word for word in page.words)


def test_confusion_matrices_are_those_of_the_served_model(folder: Path) -> None:
    run = load_run(folder)
    assert run.predictions is not None
    rows = run.predictions
    rows = rows[(rows["split"] == "test") & (rows["model"] == "personal")]
    text, page = show(folder)
    assert "Confusion over all sites" in page.words
    assert all(f"Confusion at {site}" in page.words for site in SITES)
    table = text[text.index("Confusion over all sites</caption>") :].split("</table>")[0]
    cells = [int(k) for k in re.findall(r'--share:[\d.]+">(\d+)', table)]
    assert cells == metrics.confusion_matrix(rows, CLASSES).ravel().tolist()


def test_curves_put_what_came_in_at_the_round_before(folder: Path) -> None:
    text, _ = show(folder)
    told = re.search(r"Balanced accuracy at aarhus: ([^\"]*)", text)
    assert told is not None
    assert re.fullmatch(
        r"after aggregation, as it came in 0\.410 in round 0, 0\.\d+ in round 6; "
        r"before aggregation, after local training 0\.450 in round 1, 0\.\d+ in round 6",
        told[1],
    )


def test_every_figure_and_table_says_what_it_shows(folder: Path) -> None:
    text, page = show(folder)
    drawings = re.findall(r"<svg (?!class=\"key\")[^>]*>", text)
    assert len(drawings) > 10
    assert all('role="img"' in drawing and 'aria-label="' in drawing for drawing in drawings)
    assert page.tags.count("caption") == page.tags.count("table")
    assert page.tags.count("figcaption") == page.tags.count("figure")
    assert "nan" not in re.sub(r"<style>.*</style>", "", text, flags=re.S).lower().replace("finance", "")


def test_harmed_sites_are_marked(folder: Path, tmp_path: Path) -> None:
    harmed = {
        "metric": "balanced_accuracy",
        "count": 1,
        "sites": ["bern"],
        "negative": ["bern", "delft"],
        "difference": {},
    }
    text, page = show(changed(folder, tmp_path, sites_harmed=harmed))
    assert [word for word in page.words if word in ("harmed", "below local")] == ["harmed", "below local"]
    assert re.search(r"bern</th>.*?badge harmed.*?</tr>", text, flags=re.S)
    assert "1 of 4" in page.words


def test_harm_that_nothing_can_show_is_not_called_none(folder: Path, tmp_path: Path) -> None:
    harmed = {"count": None, "sites": [], "negative": ["bern"], "undetermined": list(SITES), "difference": {}}
    run = load_run(changed(folder, tmp_path, sites_harmed=harmed))
    (tile,) = [tile for tile in sections.tiles(run) if tile.label == "Sites harmed"]
    assert (tile.value, tile.detail.split("\n")[1]) == (UNDEFINED, "4 without an interval, unknown")
    words = " ".join(show(run.folder)[1].words)
    assert f"It is unknown, for want of an interval, at {', '.join(SITES)}." in words


def test_a_group_on_both_sides_of_a_split_is_called_a_leak(folder: Path, tmp_path: Path) -> None:
    assert "none" in show(folder)[1].words
    leaking = changed(folder, tmp_path)
    split = pd.read_parquet(leaking / "split.parquet").assign(group="one patient")
    split.to_parquet(leaking / "split.parquet")
    assert "1, a leak" in show(leaking)[1].words


def test_numbers_that_left_are_listed_where_the_run_declares_them(folder: Path, tmp_path: Path) -> None:
    row = {"name": "class_counts", "sent": "once, before round 1", "what": "number of training images of each class"}
    words = show(changed(folder, tmp_path, numbers=[row]))[1].words
    assert set(row.values()) <= set(words)
    assert "Numbers that left each site beside the tensors" in words
    assert "Numbers that left each site beside the tensors" not in show(folder)[1].words  # an older run


def test_what_the_bytes_and_the_run_folder_hold_is_said(folder: Path) -> None:
    words = " ".join(show(folder)[1].words)
    assert "Payload is the tensors behind a head of a few bytes" in words
    assert "The bars leave out the last message to each site" in words
    assert re.search(
        r"predictions\.parquet .* because this is a simulation; in a deployment it stays at the sites", words
    )


def test_that_nothing_stayed_is_said(folder: Path, tmp_path: Path) -> None:
    text, _ = show(changed(folder, tmp_path, kept_at_site=[]))
    assert re.search(r"stayed</th>\s*<td class=\"text\">none", text)


def test_sites_that_failed_are_listed_with_their_rounds(folder: Path, tmp_path: Path) -> None:
    path = changed(folder, tmp_path) / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["sites"]["bern"] = {"status": "lost"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "3 (lost)" in show(tmp_path)[1].words


# ------------------------------------------------------------------------------------------------ what may be missing
@pytest.mark.parametrize(
    "missing",
    ["references", "sites_harmed", "majority", "wire", "kept_at_site", "warnings", "parameters", "bytes", "hardware",
     "image_passes", "seconds", "peak_memory_bytes", "served_round", "backbone", "split_hash"],
)  # fmt: skip
def test_optional_parts_of_the_result(folder: Path, tmp_path: Path, missing: str) -> None:
    show(changed(folder, tmp_path, **{missing: ...}))


@pytest.mark.parametrize("missing", ["events.jsonl", "config.json", "predictions.parquet", "split.parquet"])
def test_optional_files(folder: Path, tmp_path: Path, missing: str) -> None:
    (changed(folder, tmp_path) / missing).unlink()
    show(tmp_path)


def test_without_a_global_model_and_without_any_test(folder: Path, tmp_path: Path) -> None:
    trees = json.loads((folder / "result.json").read_text())["metrics"]
    personal = {split: {"personal": models["personal"]} for split, models in trees.items()}
    assert "Global" not in show(changed(folder, tmp_path / "a", metrics=personal))[1].words
    show(
        changed(folder, tmp_path / "b", metrics={"val": {}, "test": {}}, references=..., majority=..., sites_harmed=...)
    )


def test_equal_models_are_shown_once(folder: Path, tmp_path: Path) -> None:
    trees = json.loads((folder / "result.json").read_text())["metrics"]
    same = {split: {"personal": models["personal"], "global": models["personal"]} for split, models in trees.items()}
    words = show(changed(folder, tmp_path, metrics=same))[1].words
    assert "Served (the global model)" in words
    assert "Global" not in words


def test_held_out_sites(folder: Path, tmp_path: Path) -> None:
    tree = json.loads((folder / "result.json").read_text())["metrics"]["test"]["global"]
    renamed = {name: {**entry, "per_site": {"unseen": entry["per_site"]["bern"]}} for name, entry in tree.items()}
    assert "unseen" in show(changed(folder, tmp_path / "a", held_out={"metrics": {"global": renamed}}))[1].words
    text, _ = show(changed(folder, tmp_path / "b", held_out={"metrics": None, "reason": "no global model"}))
    assert "were not measured: no global model" in text


def test_one_small_site_and_undefined_numbers(tmp_path: Path) -> None:
    text, page = show(write_run(tmp_path / "a", sites={"only": 2}))
    assert "\u2013" in page.words
    show(write_run(tmp_path / "b", classes=("yes", "no"), sites={"x": 1, "y": 3}))
    assert text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script> & "quotes" \'single\' {{ 7 * 7 }}' + "long" * 20
    classes = ("<b>bold</b>", 'a" onload="x')
    text, page = show(write_run(tmp_path, sites={evil: 30, "b": 20}, classes=classes, name=evil, warnings=[evil]))
    assert not {"script", "b"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert evil in page.words
    assert ("aria-label", f"Reliability at {evil}") in page.attributes
    assert all(name in page.words for name in classes)
    assert "49" not in re.findall(r"single' (\S+) ", text)


# ------------------------------------------------------------------------------------------------ broken folders
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("result.json", "{"),
        ("result.json", "[]"),
        ("result.json", '{"schema_version": 2, "name": "x", "classes": [], "sites": {}, "metrics": {}}'),
        ("result.json", '{"schema_version": 1, "name": "x", "classes": [], "sites": {}, "metrics": 5}'),
        ("result.json", '{"schema_version": 1}'),
        ("events.jsonl", '{"round": 1}\n{"rou'),
        ("events.jsonl", '{"round": "first"}\n'),
        ("config.json", "no json"),
        ("config.json", '{"config": {"tuner": 5}}'),
        ("predictions.parquet", "no parquet"),
        ("split.parquet", "no parquet"),
    ],
)
def test_a_broken_file_is_named(folder: Path, tmp_path: Path, file: str, content: str) -> None:
    (changed(folder, tmp_path) / file).write_text(content)
    with pytest.raises(StateError, match=re.escape(str(tmp_path / file))):
        render([tmp_path])


def test_a_table_without_its_columns_is_named(folder: Path, tmp_path: Path) -> None:
    path = changed(folder, tmp_path) / "predictions.parquet"
    pd.read_parquet(path).drop(columns="p.mel").to_parquet(path)
    with pytest.raises(StateError, match=r"predictions\.parquet[\s\S]*p\.mel"):
        render([tmp_path])


def test_a_folder_without_a_result_is_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no finished run"):
        render([tmp_path])
    with pytest.raises(ConfigError, match="needs a run folder"):
        render([])


# ------------------------------------------------------------------------------------------------ several runs
def test_several_runs_side_by_side(folder: Path, tmp_path: Path) -> None:
    others = [write_run(tmp_path / "a", name="other", skill=0.5), write_run(tmp_path / "b", name="alone", sent=0)]
    text, page = show(folder, *others, out=tmp_path / "deep" / "page.html")
    assert "3 runs side by side" in page.words
    assert {"1. skin-lora", "2. other", "3. alone"} <= set(page.words)
    assert "none" in page.words
    assert len(re.findall(r'id="s3-\d', text)) == 6
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for path in (folder, *others):
        tree = json.loads((path / "result.json").read_text())["metrics"]["test"]["personal"]["balanced_accuracy"]
        assert all(f"{tree[part]['value']:.3f}" in page.words for part in ("mean", "worst", "pooled"))


def test_the_page_lies_where_it_is_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert render([folder]) == folder / "report.html"
    assert render([folder], tmp_path / "x.html") == tmp_path / "x.html"
    monkeypatch.chdir(tmp_path)
    assert render([folder, folder]) == Path("report.html")
    assert (tmp_path / "report.html").is_file()


# ------------------------------------------------------------------------------------------------ figures
def test_a_place_that_cannot_be_written_to_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StateError, match=r"could not be written[\s\S]*page\.html[\s\S]*choose another --out"):
        render([folder], tmp_path / "file" / "page.html")


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.13, 0.14), (-5, 1200.0), (1e-9, 3e-9)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = marks.ticks(low, high)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)


def test_a_figure_without_any_number_is_still_one() -> None:
    nothing = marks.Point(None)
    assert "<svg" in figures.forest("t", {"a": [nothing]}, "u", 720)
    assert "<svg" in figures.scatter("t", [("a", 0, nothing)], "x", "y", 360)
    assert "<svg" in figures.bars("t", [], {"up": []}, 720)
    assert "<svg" in figures.learning_curves("t", {"a": [(0, None)]}, 0, marks.padded([]))
    assert "<svg" in figures.reliability("t", [0.0], [0.0], [0])


def test_an_axis_maps_its_ends() -> None:
    for axis in (marks.Axis(2, 4, 10, 90), marks.Axis(0.01, 100, 10, 90, log=True)):
        assert (axis(axis.low), axis(axis.high)) == pytest.approx((10, 90))
    assert marks.Axis(0.01, 100, 10, 90, log=True)(1.0) == pytest.approx(50)


def test_a_model_before_the_last_aggregation_that_is_the_served_one_is_said_to_be(folder: Path, tmp_path: Path) -> None:
    tested = json.loads((folder / "result.json").read_text())["metrics"]
    alike = {split: {**models, "before_aggregation": models["personal"]} for split, models in tested.items()}
    said = "where sites serve what they trained themselves"
    assert said in show(changed(folder, tmp_path, metrics=alike))[0]
    assert said not in show(folder)[0]
