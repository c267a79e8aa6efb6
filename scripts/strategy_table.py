"""The page docs/strategies.md: what every registered strategy sends and keeps, in bytes, and which tests pin it.

Nothing of it is typed twice: what travels is declared by the strategy and encoded by the wire's own codec, what is kept
is what a site and the coordinator are left with, and family and tests stand at the end of the header of the strategy's
file.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from consilium import check, config, experiment, keeping, payload, registry
from consilium.errors import ConfigError
from consilium.experiment import Experiment
from consilium.local.train import original
from consilium.protocols import Declaration, Spec

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "strategies.md"
FAMILIES = (
    "references",
    "optimisation",
    "partial sharing",
    "personal models",
    "federated LoRA",
    "dual LoRA",
    "robust sums",
    "one-shot",
)
PINS = ("Family", "Identity test", "Slow reference")
SITES, CLASSES = ("a", "b", "c", "d"), ("x", "y", "z")
TUNERS = (["lora"], ["lora", "norm"], ["linear"])  # the first that a strategy goes with
ROUNDS = (3, 4, 5, 6)  # of which bytes are shown: no start any more, and both of two kinds of rounds
SYMBOLS = {"lora_a": "A", "lora_b": "B", "head": "H", "norm": "N", "base": "W", "router": "R"}
OPENING = """# Strategies

Written by `make docs` from the strategies' declarations, what rounds of each leave behind, and the headers of their
files; do not edit. Keys stand in [configuration](configuration.md), tuners that go with each in [pairs](pairs.md), sums
of factors in [aggregation](aggregation.md). Robust sums and bounds on updates are keys of every strategy that sums by
choice: `aggregate = "median"` or `"trimmed_mean"`, `clip_updates`, `refuse_updates`.

*Single updates*: the coordinator looks at each site's update; where it does not, a secure sum of them would do.
"""
BYTES = """## What travels and what is kept

Numbers of scalars: **A**, **B** the factors of one adapter, **H** the head, **N** norms, **W** the weights that
adapters act on, **R** routers, **K** the number of sites. Bytes are those of one site's message in a round, as the
wire's own code writes it: 4 for each scalar, 9 for the head and a bit for each tensor that may travel. The example is
ViT-Tiny/16 at 224 px with LoRA of rank 8 on qkv, three classes, float32, a strategy's default options, all sites in
every round: {sizes}. (1): with plain SGD. (2): with `norm` beside LoRA. (3): with `linear`, the head alone.

These are rounds in which nothing starts: a first download brings what does not start alike at all sites, and what is
sent once. *Kept* is what outlives a round beside the images and what also travels; with `train.moments = "keep"` a site
keeps its optimiser's moments too, with a codec what it left unsaid.
"""
PINNED = """## What pins them

*Identity*: the test of the algebraic identity that the header of the strategy's file claims. *Slow reference*: the test
against the paper's algorithm written out in float64, without code of this package.
"""


# ------------------------------------------------------------------------------------------------ what a header says
def pinned(member: registry.Member) -> dict[str, str]:
    """Family, identity test and slow reference of a strategy: lines `Identity test: ...`, or, for one of several
    strategies of a file, `Identity test of fedamp: ...`, in its module's docstring."""
    lines = (inspect.getdoc(sys.modules[member.build.__module__]) or "").splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if match := re.fullmatch(rf"({'|'.join(PINS)})(?: of ([\w, ]+))?: (.+)", line):
            key, names, value = match.groups()
            if names is None:
                found.setdefault(key, value)
            elif member.name in names.split(", "):
                found[key] = value
    return found


def missing(member: registry.Member) -> list[str]:
    """Sentences on what the header of a strategy's file does not say, or says of a test that is not there."""
    found, file = pinned(member), f"{member.build.__module__.replace('.', '/')}.py"
    lines = {
        "Family": f"one of: {', '.join(FAMILIES)}",
        **dict.fromkeys(PINS[1:], "name of a test, or test_file::name"),
    }
    said = [
        f"{file}: its module docstring needs a line '{key}: ...' or '{key} of {member.name}: ...' ({value})"
        for key, value in lines.items()
        if key not in found
    ]
    if found.get("Family", FAMILIES[0]) not in FAMILIES:
        said.append(f"{file}: family {found['Family']!r} of {member.name} is none of: {', '.join(FAMILIES)}")
    tests = {found[key] for key in PINS[1:] if key in found}
    said += [
        f"{file}: {test} of {member.name} is in {place_of(test) or 'no file'}, not in one"
        for test in sorted(tests)
        if len(place_of(test)) != 1
    ]
    return said


def place_of(test: str) -> list[str]:
    """Files under tests/ that hold a test of this name, or `stem::name`; one where the name says enough."""
    stem, _, name = test.rpartition("::")
    files = sorted((ROOT / "tests").glob(f"*/{stem or '*'}.py"))
    return [str(file.relative_to(ROOT)) for file in files if f"def {name}(" in file.read_text(encoding="utf-8")]


# ------------------------------------------------------------------------------------------------ what is counted
def example(name: str) -> tuple[Experiment, str]:
    """The example's experiment, and the notes on what the strategy needs."""
    declares: Declaration = registry.build("strategies", name, {}).declares
    plain = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0, "clip_norm": 0, "learning_rate": 0.1}
    for at, tuners in enumerate(TUNERS):
        table = {
            "backbone": {"name": "vit_tiny_patch16_224", "weights": "random"},
            "tuner": tuners,
            "strategy": {"name": name},
            "train": {"rounds": max(ROUNDS), **(plain if declares.plain_sgd else {})},
        }
        try:
            found = experiment.assemble(config.from_dict(table), CLASSES)
        except ConfigError as error:
            refused = error
            continue
        return found, "".join(["(1)"] * declares.plain_sgd + [f"({at + 1})"] * (at > 0))
    raise refused


def messages(pieces: Experiment, way: check.Way) -> list[tuple[str, int]]:
    """(formula, bytes) of a site's message in each of the rounds."""
    if pieces.strategy.declares.once:
        return [sent_once(pieces, way)]
    found = []
    for number in ROUNDS:
        declared, names = pieces.wire(way, number), check.exchanged(pieces, SITES, number)[way]
        specs = {name: declared[name] for name in names}
        blank = {name: torch.zeros(shape(spec), dtype=spec.dtype) for name, spec in specs.items()}
        found.append((formula(pieces, count(specs)), sum(map(len, map(bytes, payload.chunks(blank, declared))))))
    return found


def sent_once(pieces: Experiment, way: check.Way) -> tuple[str, int]:
    """The same of the one exchange: up in the last round, down after it; of a free first dimension K rows."""
    number = max(ROUNDS) + (way == "down")
    declared, names = pieces.wire(way, number), check.exchanged(pieces, SITES, number)[way]
    one = {n: replace(declared[n], shape=tuple(1 if s is None else s for s in declared[n].shape)) for n in names}
    rows = {n: (len(SITES), *spec.shape[1:]) if None in declared[n].shape else shape(spec) for n, spec in one.items()}
    blank = {n: torch.zeros(rows[n], dtype=declared[n].dtype) for n in one}
    size = sum(map(len, map(bytes, payload.chunks(blank, declared))))
    text = formula(pieces, count(one))
    return f"once: {_times('K', text) if rows != {n: shape(spec) for n, spec in one.items()} else text}", size


def symbol_of(spec: Spec) -> str:
    """What a tensor of this role is counted as."""
    return SYMBOLS.get(spec.tag.role, spec.tag.role)


def shape(spec: Spec) -> tuple[int, ...]:
    """A free dimension is as none."""
    return tuple(size or 0 for size in spec.shape)


def count(specs: Mapping[str, Spec]) -> Counter[str]:
    """Scalars by symbol."""
    found: Counter[str] = Counter()
    for spec in specs.values():
        found[symbol_of(spec)] += torch.Size(shape(spec)).numel()
    return found


def sizes(pieces: Experiment) -> dict[str, int]:
    """Scalars of one adapter, the head and so on in the example's model."""
    parts: dict[tuple[str, str], Counter[str]] = {}
    specs = {**pieces.model.specs, **{n: s for n, s in pieces.down(1).items() if s.tag.role == "base"}}
    for name, spec in specs.items():
        symbol = symbol_of(spec)
        parts.setdefault((symbol, spec.tag.part), Counter())[symbol] += count({name: spec})[symbol]
    return {symbol: found[symbol] for (symbol, _), found in sorted(parts.items(), reverse=True)}


def formula(pieces: Experiment, counted: Mapping[str, int]) -> str:
    """Symbols by their number, and as a plain number what is no multiple of any."""
    known, times, rest = sizes(pieces), dict[int, list[str]](), 0
    for symbol, scalars in sorted(counted.items()):
        whole, over = divmod(scalars, known.get(symbol, sys.maxsize))
        rest += over
        if whole:
            times.setdefault(whole, []).append(symbol)
    terms = [_times(number, " + ".join(symbols)) for number, symbols in sorted(times.items())]
    return " + ".join(terms + [f"{rest:,}"] * (rest > 0)) or "nothing"


def _times(number: int | str, sum: str) -> str:
    if "1" in (sum, str(number)):
        return sum if number == 1 else str(number)
    return f"{number} ({sum})" if " + " in sum else f"{number} {sum}"


def kept_at_site(pieces: Experiment) -> str:
    """What stays from round to round, by kind."""
    kinds: dict[str, dict[str, Spec]] = {}
    for name, spec in keeping.kept(pieces, SITES).items():
        before, slash, after = name.partition("/")
        kinds.setdefault(f"{before or after}/" if slash else "", {})[name] = spec
    told = {keeping.SERVED: "after the last round", "": ""}
    words = {told.get(kind, kind.strip("/")): formula(pieces, count(specs)) for kind, specs in kinds.items()}
    return "; ".join(f"{kind}: {text}" if kind else text for kind, text in words.items()) or "nothing"


def kept_at_server(pieces: Experiment) -> str:
    """What the coordinator keeps beside what it sends, by kind: of each site, or once."""
    specs, kinds, each = pieces.model.specs, dict[str, Counter[str]](), set[str]()
    for name, value in keeping.at_server(pieces, SITES).items():
        if name in pieces.down(1):  # the frozen weights, until they change and travel
            continue
        kind, _, rest = name.partition("/")
        known = specs.get(original(name))
        kinds.setdefault(kind, Counter())[symbol_of(known) if known else kind] += value.numel()
        each |= {kind} if rest.partition("/")[0] in SITES or value.shape == (len(SITES),) else set()
    words = []
    for kind, counted in kinds.items():
        number = len(SITES) if kind in each else 1
        one = formula(pieces, {symbol: scalars // number for symbol, scalars in counted.items()})
        words.append(f"{kind}: {one if number == 1 else _times('K', one)}")
    return "; ".join(words) or "nothing"


# ------------------------------------------------------------------------------------------------ the page
def render() -> str:
    """The whole page."""
    own = [m for m in registry.members("strategies").values() if m.build.__module__.startswith("consilium.")]
    if lacking := [sentence for member in own for sentence in missing(member)]:
        raise SystemExit("\n".join(lacking))
    members = sorted(own, key=lambda member: (FAMILIES.index(pinned(member)["Family"]), member.name))
    pieces = {member.name: example(member.name) for member in members}
    known = sizes(pieces["fedavg"][0])
    told = ", ".join(f"{symbol} = {known[symbol]:,}" for symbol in ("A", "B", "H"))
    return "\n".join(
        [
            OPENING,
            *_table(
                ["strategy", "family", "leaves the site", "stays", "single updates", "needs", "source"],
                map(_says, members),
            ),
            BYTES.format(sizes=told),
            *_table(
                ["strategy", "up", "bytes", "down", "bytes", "kept at the site", "kept at the server"], _counted(pieces)
            ),
            PINNED,
            *_table(["strategy", "identity", "slow reference"], map(_pins, members)),
        ]
    )


def _says(member: registry.Member) -> list[str]:
    declares: Declaration = member.build(registry.parse_options(member, {})).declares
    needs = [*sorted(declares.required_roles), *["plain SGD"] * declares.plain_sgd]
    said = [pinned(member)["Family"], member.facts["leaves the site"], member.facts["stays"]]
    alone = "needed" if declares.needs_individual_updates else "no"
    return [f"`{member.name}`", *said, alone, ", ".join(needs), member.source]


def _counted(pieces: Mapping[str, tuple[Experiment, str]]) -> Iterator[list[str]]:
    for name, (each, notes) in pieces.items():
        cells = [cell for way in ("up", "down") for cell in _in_words(messages(each, way))]
        yield [f"`{name}` {notes}".strip(), *cells, kept_at_site(each), kept_at_server(each)]


def _in_words(rounds: Sequence[tuple[str, int]]) -> tuple[str, str]:
    """Formula and bytes, of odd and even rounds where these differ, of every kind of round where more do."""
    kinds = list(dict.fromkeys(rounds))
    texts = [(text, f"{size:,}") for text, size in kinds]
    if len(kinds) == 2 and rounds[0] == rounds[2] and rounds[1] == rounds[3]:
        texts = [(f"{when} rounds: {text}", size) for (text, size), when in zip(texts, ("odd", "even"), strict=True)]
        return "; ".join(text for text, _ in texts), "; ".join(size for _, size in texts)
    return " or ".join(text for text, _ in texts), " or ".join(size for _, size in texts)


def _pins(member: registry.Member) -> list[str]:
    found = pinned(member)
    return [f"`{member.name}`", *(_linked(found[key]) for key in PINS[1:])]


def _linked(test: str) -> str:
    words = test.rpartition("::")[2].removeprefix("test_").replace("_", " ")
    return f"[{words}](../{place_of(test)[0]})"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}"
    yield from ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    yield ""
