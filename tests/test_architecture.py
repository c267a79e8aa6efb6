"""The rules of the house that a program can check: imports, sizes, the reading path, what may not stand in a file.

Counting rule: a file is measured in all its lines; a function, a strategy and a tuner in lines of code, which are no
blank lines, comments or docstrings; the reading path in lines of code that are no imports, its README in lines that are
not blank.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "consilium"
STAGES = ("sites", "backbones", "tasks", "tuners", "local", "filters", "strategies", "engines", "report")
ENTRANCES = ("__init__", "__main__", "cli", "cli_data", "cli_deploy", "cli_merge", "cli_study", "cli_unseen")
COMPOSITION = ("experiment", "exchange", "coordinator", "keeping", "results", "run", "check", "predict", "export")
COMPOSITION += ("deployment", "mechanism", "merging", "references", "stage_results", "stages", "study", "unseen")
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "torchvision", "timm", "pandas", "numpy", "sklearn", "pyarrow", "pydantic", "PIL", "matplotlib"}
READING_PATH = ("protocols.py", "run.py", "tuners/lora.py", "strategies/fedavg.py")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _imported(path: Path) -> set[str]:
    """First-level names inside the package that a module imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("consilium.")}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert node.level == 0, f"{_name(path)}: imports are absolute"
            if module == "consilium":
                found |= {alias.name for alias in node.names}
            elif module.startswith("consilium."):
                found.add(module.split(".")[1])
    return found


def _home(path: Path) -> str:
    """The stage package or common module a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _code_lines(source: str) -> set[int]:
    """Line numbers that hold code: no blank line, no comment, no docstring."""
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    held = {n for token in tokens if token.type not in silent for n in range(token.start[0], token.end[0] + 1)}
    return held - docstrings


def _import_lines(source: str) -> set[int]:
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return {line for node in imports for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def _function_sizes(path: Path) -> Iterator[tuple[str, int]]:
    source = path.read_text()
    code = _code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            yield f"{_name(path)}:{node.lineno} {node.name}", len(code.intersection(lines))


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_stage_imports_another(path: Path) -> None:
    home = _home(path)
    if home in (*ENTRANCES, *COMPOSITION):
        return
    allowed = {home, *STAGES, *COMPOSITION} if home == "engines" else {home}
    foreign = _imported(path) & {*STAGES, *COMPOSITION, *ENTRANCES} - allowed
    assert not foreign, f"{_name(path)} belongs to {home} and imports {sorted(foreign)}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize(("folder", "limit"), [("strategies", 120), ("tuners", 150)])
def test_an_algorithm_is_a_page(folder: str, limit: int) -> None:
    sizes = {_name(path): len(_code_lines(path.read_text())) for path in (PACKAGE / folder).glob("*.py")}
    assert {name: size for name, size in sizes.items() if size > limit} == {}


def test_functions_stay_small() -> None:
    sizes = dict(size for path in SOURCES for size in _function_sizes(path))
    assert {name: size for name, size in sizes.items() if size > 60} == {}
    assert statistics.median(sizes.values()) < 10
    assert statistics.quantiles(sizes.values(), n=10)[-1] < 40


NUMBERS = {"sites": 1, "backbones": 2, "tuners": 3, "local": 4, "tasks": 5, "filters": 6, "strategies": 8, "report": 10}
MODULES = [path for path in SOURCES if not path.name.startswith("__")]


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_opens_with_its_stage(path: Path) -> None:
    """Strategies and tuners go on with the header of an algorithm instead of what comes in and goes out."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    stage = NUMBERS.get(path.parent.name)
    assert re.match(rf"Stage {stage}\b" if stage else r"(Stage 0|Common:|Composition:|Engine:)", docstring), docstring
    if path.parent.name not in ("strategies", "tuners") and path.name != "protocols.py":
        assert "In: " in docstring
        assert "Out: " in docstring


def test_the_reading_path_takes_fifteen_minutes() -> None:
    """Limits and their reason: docs/decisions/0001-house.md."""
    sources = [(PACKAGE / name).read_text() for name in READING_PATH]
    readme = [line for line in (ROOT / "README.md").read_text().splitlines() if line.strip()]
    assert sum(len(_code_lines(source) - _import_lines(source)) for source in sources) < 500
    assert len(readme) <= 80


def test_importing_the_package_and_asking_for_help_load_nothing_heavy() -> None:
    script = (
        "import sys, consilium\n"
        "from consilium.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print('loaded:', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert (
        loaded & {"torch", "torchvision", "timm", "pandas", "numpy", "sklearn", "pyarrow", "pydantic", "PIL"} == set()
    )


def test_one_module_imports_flower() -> None:
    importers = [_name(path) for path in SOURCES if re.search(r"^\s*(from|import) flwr\b", path.read_text(), re.M)]
    assert importers == ["consilium/engines/flower.py"]


def _third_party(folder: Path) -> set[str]:
    """Distributions that the Python files of a folder import, wherever the import stands."""
    nodes = (node for path in folder.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    names = {
        name.split(".")[0]
        for node in nodes
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)])
        if isinstance(node, (ast.Import, ast.ImportFrom)) and name
    }
    foreign = (
        names
        - set(sys.stdlib_module_names)
        - {"consilium", "benchmarks", "scripts", "tests", *(path.stem for path in folder.glob("*.py"))}
    )
    renamed = {"PIL": "pillow", "sklearn": "scikit-learn", "pydantic_core": "pydantic"}
    return {renamed.get(name, name).replace("_", "-") for name in foreign}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, extras = project["dependencies"], project["optional-dependencies"]
    names = {key: {re.split(r"[\[>]", line)[0] for line in lines} for key, lines in {"": needed, **extras}.items()}
    extra = names["peft"] | names["ray"] | names["flower"]
    assert _third_party(PACKAGE) - extra == names[""]
    with_timm = {"huggingface-hub"}
    around = _third_party(ROOT / "tests") | _third_party(ROOT / "scripts")
    assert around <= names[""] | names["test"] | extra | with_timm


def _texts() -> Iterator[Path]:
    folders = ("consilium", "tests", "docs", "scripts", "examples", "benchmarks", ".ci")
    inside = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    own = (path for path in ROOT.iterdir() if path.name != ".git")  # git's own; a file in a second working tree
    for path in (*own, *inside):
        if path.suffix in {".py", ".md", ".toml", ".sh", ".html", ".j2", ".css", ".json", ""} and path.is_file():
            yield path


# Written in pieces, so that this file does not name them either.
FORBIDDEN = (
    "py" + r"pi\.(org|python)",
    "python" + "hosted",
    "ana" + r"conda\.org",
    r"(?<![\w.])/(wo" + "rk|ho" + "me|ro" + r"ot|Users)/\w",
)


def test_no_file_names_a_registry_or_a_place_on_one_machine() -> None:
    forbidden = re.compile("|".join(FORBIDDEN))
    found = [f"{_name(p)}: {hit[0]}" for p in _texts() if (hit := forbidden.search(p.read_text(errors="replace")))]
    assert found == []
