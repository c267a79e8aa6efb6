from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from consilium.report.sections import Figure
from consilium.report.tables import Cell, Table
from consilium.study import drawing, export, figures, page
from tests.synthetic_study import METHODS, write_study

FAILED = {"natural-full-2": "TrainingError: the loss of <b>site</b> is not finite"}


class Page(HTMLParser):
    """Text, tags and attributes; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def show(folder: Path) -> tuple[str, Page]:
    text = page.write(folder).read_text(encoding="utf-8")
    assert "nan" not in re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.S).lower()
    return text, Page(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_study(
        tmp_path_factory.mktemp("study"), failed=FAILED, missing=["dirichlet-lora-1"], warnings=["a rare class"]
    )
    page.write(made)
    return made


@pytest.fixture(scope="module")
def shown(folder: Path) -> tuple[str, Page]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


# ------------------------------------------------------------------------------------------------ the page
def test_the_page_stands_alone(shown: tuple[str, Page]) -> None:
    text, parsed = shown
    assert not {"link", "img", "iframe", "object", "b"} & set(parsed.tags)
    links = [value for name, value in parsed.attributes if name in ("href", "src", "data", "action")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\(|@import|https?://|fetch\(|import\(", text)
    assert {link[1:] for link in links} <= {value for name, value in parsed.attributes if name == "id"}


def test_every_figure_and_table_says_what_it_shows(shown: tuple[str, Page]) -> None:
    text, parsed = shown
    drawings = re.findall(r"<svg (?!class=\"key\")[^>]*>", text)
    assert len(drawings) > 8
    assert all('role="img"' in found and 'aria-label="' in found for found in drawings)
    assert parsed.tags.count("caption") == parsed.tags.count("table")
    assert parsed.tags.count("figcaption") == parsed.tags.count("figure")


def test_what_must_be_known_stands_on_top(shown: tuple[str, Page]) -> None:
    text, parsed = shown
    top = text[: text.index("<nav")]
    assert "reduced grid: 64 px, 1,200 lesions, 3 seeds" in top
    assert "Unfinished: 1 of 24 runs are missing" in top
    assert "1 of 24 runs failed or were refused" in top
    assert "a rare class" in top
    assert "22 of 24" in parsed.words


def test_failed_runs_are_listed_with_their_reasons(shown: tuple[str, Page]) -> None:
    assert FAILED["natural-full-2"] in shown[1].words
    assert "natural-full-2" in shown[1].words


def test_the_numbers_on_the_page_are_those_of_the_file(folder: Path, shown: tuple[str, Page]) -> None:
    numbers = json.loads((folder / "statistics.json").read_text())
    words = set(shown[1].words)
    for found in numbers["groups"].values():
        for name in METHODS:
            value = found["estimates"][name]["mean"]
            assert f"{value['value']:.3f}" in words
            assert f"{value['low']:.3f} to {value['high']:.3f}" in words
        for slope in found["slopes"]:
            assert f"{100 * slope['change']['value']:+.2f}" in words
    results = pd.read_parquet(folder / "results.parquet")
    rows = results[(results["run"].str.startswith("natural-lora")) & (results["metric"] == "balanced_accuracy")]
    mean = rows.loc[rows["level"] == "mean", "value"].mean()
    assert numbers["groups"]["natural"]["estimates"]["lora"]["mean"]["value"] == pytest.approx(mean)


def test_seeds_too_few_for_a_test_are_called_so(shown: tuple[str, Page]) -> None:
    words = " ".join(shown[1].words)
    assert (
        "With 3 seeds a Wilcoxon test over seeds could not go below p = 0.25, so it could never be significant" in words
    )


def test_the_line_and_the_front_are_drawn(shown: tuple[str, Page]) -> None:
    text, _ = shown
    panels = text.split('<p class="title">natural</p>')
    assert '<line class="diagonal"' in panels[1]
    assert 'class="steps"' in text
    assert text.count("mark faint") >= 2 * 22 - 2  # every finished run, over bytes and over parameters


# ------------------------------------------------------------------------------------------------ sorting
SORTED = """
<script>
const heads = [...document.querySelector("table").tHead.rows[0].cells];
const rows = () => [...document.querySelector("table").tBodies[0].rows];
const first = () => rows().map((row) => row.cells[0].firstChild.textContent.trim());
const at = heads.findIndex((head) => head.textContent.includes("exchanged"));
const seen = [first()];
for (const click of [at, at, 0]) { heads[click].querySelector("button").click(); seen.push(first()); }
document.body.innerHTML = ""; document.body.append(JSON.stringify(seen));
</script></body>"""


def test_cells_hold_the_numbers_to_sort_by(shown: tuple[str, Page]) -> None:
    text, _ = shown
    table = text[text.index("<table>") : text.index("</table>")]
    kept = [float(value) for value in re.findall(r'data-sort="([^"]*)"', table)]
    assert {float(size) for size in METHODS.values()} <= set(kept)
    assert "<script>" in text
    assert "aria-sort" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_tables_sort(shown: tuple[str, Page], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(shown[0].replace("</body>", SORTED))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    seen = json.loads(re.search(r"<body[^>]*>(\[\[.*\]\])", done.stdout, flags=re.S)[1])  # type: ignore[index]
    planned = list(METHODS)
    assert seen == [planned, planned[::-1], planned, sorted(planned)]


# ------------------------------------------------------------------------------------------------ files
def test_tables_are_written_as_markdown_and_latex(folder: Path) -> None:
    names = {path.stem for path in (folder / "tables").iterdir()}
    assert {path.name for path in (folder / "tables").iterdir()} == {
        f"{n}.{kind}" for n in names for kind in ("md", "tex")
    }
    text = (folder / "tables/balanced-accuracy-by-method-mean-over-seeds.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(METHODS)
    assert len({line.count("|") for line in lines}) == 1
    assert "reduced grid: 64 px" in text
    text = (folder / "tables/balanced-accuracy-by-method-mean-over-seeds.tex").read_text()
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert text.count(r"\\") == 1 + len(METHODS)


def test_what_latex_and_markdown_would_take_for_commands_is_escaped() -> None:
    table = Table("50 % of a_b", ["a & b", "c"], [[Cell("x|y", "{1}\n2"), Cell("\u2013 $^~\\<")]])
    assert r"| x\|y ({1}, 2) |" in export.markdown(table)
    made = export.latex(table)
    assert r"50 \% of a\_b" in made
    assert r"a \& b" in made
    assert r"x|y (\{1\}, 2)" in made
    assert r"-- \$\textasciicircum{}\textasciitilde{}\textbackslash{}\textless{}" in made


def test_figures_are_written_as_svg_and_png_of_the_same_size(folder: Path) -> None:
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert len(names) >= 5
    for name in names:
        root = ElementTree.parse(folder / "figures" / f"{name}.svg").getroot()
        assert not [element for element in root.iter() if element.get("class")]
        width, height = (float(root.get(side, 0)) for side in ("width", "height"))
        with Image.open(folder / "figures" / f"{name}.png") as image:
            assert image.size == (round(width * drawing.SCALE), round(height * drawing.SCALE))
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 5


def test_a_mark_is_drawn_where_it_stands() -> None:
    point = figures.Point(0.5, 0.4, 0.6)
    figure = Figure(
        "", [("", figures.svg(200, 100, "t", [figures.labelled(0, "a", 60, figures.Axis(0, 1, 90, 10), point)]))]
    )
    sheet = drawing.sheet(figure)
    image = np.asarray(Image.open(io.BytesIO(drawing.png(sheet))).convert("RGB")).astype(int)
    colour = np.array([int(drawing.colours()["c0"][k : k + 2], 16) for k in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(image - colour).sum(axis=2) < 12)
    top = 24 + drawing.LINE + 4 + 12  # caption, then the panel
    assert columns.mean() / drawing.SCALE == pytest.approx(drawing.GAP + 60, abs=0.5)
    assert rows.mean() / drawing.SCALE == pytest.approx(top + 50, abs=0.5)
    assert np.ptp(rows) / drawing.SCALE == pytest.approx(16, abs=1)


# ------------------------------------------------------------------------------------------------ thin studies
def test_one_method_one_seed_one_group(tmp_path: Path) -> None:
    _, parsed = show(write_study(tmp_path, methods={"lora": 5000}, groups={"natural": ("a", "b")}, seeds=(3,), n=60))
    words = " ".join(parsed.words)
    assert "single seed" in words
    assert "No ranks" in words


def test_a_study_in_which_nothing_has_finished(tmp_path: Path) -> None:
    every = [f"natural-{name}-0" for name in METHODS]
    _, parsed = show(write_study(tmp_path, groups={"natural": ("a", "b")}, seeds=(0,), missing=every))
    assert "0 of 4" in parsed.words


def test_nothing_is_exchanged_by_anybody(tmp_path: Path) -> None:
    _, parsed = show(write_study(tmp_path, n=60, seeds=(0,), silent=list(METHODS)))
    assert any("linear has no bytes or no value" in word for word in parsed.words)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script> & {{ 7 * 7 }} $_%' + "long" * 20
    write_study(tmp_path, methods={"a": 4000, "b": 9000}, n=60, seeds=(0,), notes=[evil], name=evil)
    table = pd.read_parquet(tmp_path / "runs.parquet")
    table.assign(tuner=table["tuner"].replace("a", evil)).to_parquet(tmp_path / "runs.parquet")
    text, parsed = show(tmp_path)
    assert parsed.tags.count("script") == 1
    assert {evil, "b"} <= set(parsed.words)
    assert "7 * 7" in text


# ------------------------------------------------------------------------------------------------ selection
def selecting(folder: Path) -> Path:
    """A study over learning rates: `lora` is best in the middle, `linear` at the upper end; `full` lacks one."""
    write_study(folder, methods={}, groups={})
    runs, results = [], []
    for name, peak in (("lora", -2.0), ("linear", -1.0), ("full", -3.0)):
        for rate in (0.0001, 0.001, 0.01, 0.1):
            for seed in (0, 1):
                run = f"{name}-{rate}-{seed}"
                done = name != "full" or rate < 0.1
                runs.append({"run": run, "folder": f"runs/{run}", "status": "done" if done else "waiting", "error": "",
                             "tuner": name, "train.learning_rate": rate, "seed": seed})  # fmt: skip
                value = 0.8 - 0.1 * abs(np.log10(rate) - peak) + 0.01 * seed
                for split, given in (("val", value), ("test", 0.123456)):
                    row = {"run": run, "seed": seed, "split": split, "model": "global", "site": "", "value": given}
                    row |= {"metric": "balanced_accuracy", "level": "pooled", "low": None, "high": None, "n": 9}
                    results += [row] if done else []
    pd.DataFrame(runs).to_parquet(folder / "runs.parquet", index=False)
    pd.DataFrame(results).to_parquet(folder / "results.parquet", index=False)
    about = json.loads((folder / "study.json").read_text())
    compare = {"method": "tuner", "within": [], "split": "val", "level": "pooled"}
    axes = [{"name": "tuner"}, {"name": "train.learning_rate"}]
    select = {"over": ["train.learning_rate"]}
    (folder / "study.json").write_text(json.dumps({**about, "compare": compare, "axes": axes, "select": select}))
    return folder


def test_a_selecting_study_shows_curves_and_choices_of_the_validation_split(tmp_path: Path) -> None:
    text, parsed = show(selecting(tmp_path))
    words = parsed.words
    assert "0.123" not in text
    assert text.count('class="ring"') == 3
    assert "linear: the best train.learning_rate lies at an end of the range; search wider" in words
    assert not [word for word in words if word.startswith("lora: the best")]
    assert "1 of 12 points lack runs and were not considered" in words
    assert "0.805" in words
    numbers = json.loads((tmp_path / "statistics.json").read_text())
    chosen = {row["method"]: row["values"]["train.learning_rate"] for row in numbers["points"] if row["chosen"]}
    assert chosen == {"lora": 0.01, "linear": 0.1, "full": 0.001}
    assert numbers["at_edge"] == {"linear": ["train.learning_rate"]}
    assert "Accuracy against what is exchanged" not in words


def test_curves_over_several_numbers_have_a_line_for_each_of_the_others(tmp_path: Path) -> None:
    folder = selecting(tmp_path)
    runs, results = (pd.read_parquet(folder / f"{name}.parquet") for name in ("runs", "results"))
    doubled = [runs.assign(rank=4), runs.assign(rank=8, run=runs["run"] + "b")]
    pd.concat(doubled).to_parquet(folder / "runs.parquet", index=False)
    pd.concat([results, results.assign(run=results["run"] + "b", value=results["value"] + 0.05)]).to_parquet(
        folder / "results.parquet", index=False
    )
    about = json.loads((folder / "study.json").read_text())
    axes = [*about["axes"], {"name": "rank"}]
    select = {"over": ["train.learning_rate", "rank"]}
    (folder / "study.json").write_text(json.dumps({**about, "axes": axes, "select": select}))
    text, parsed = show(folder)
    assert text.count('class="s0 line"') == text.count('class="s1 line"') == 6  # 3 methods over 2 searched numbers
    assert text.count('class="s3 line"') == 2  # over the rank, a line per learning rate; full lacks one
    assert "rank 8" in parsed.words
    assert text.count('class="ring"') == 6
