"""Composition: what a person at a hospital approves. In: the site's folder. Out: the terms, and plain words for them.

The words are for whoever answers for the patients' data and need not know how models are trained. What they say of who
sees what follows from the strategy's declaration and from the number of sites, not from what anybody wrote of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from consilium import keeping, registry, results
from consilium.config import TrainConfig
from consilium.deployment import files
from consilium.deployment.files import SiteFile
from consilium.errors import ConfigError
from consilium.experiment import Experiment, assemble

Terms = dict[str, Any]
_BLOCK = re.compile(r"\.\d+\.")
STAYS = "images, their labels, names of files and patients, what the model says of single images, texts of errors"
TELLS = (
    "What leaves was learnt from images of this hospital and may tell something of them, most where they are few; "
    "no differential privacy is used."
)


def terms(folder: Path, digest: str | None = None) -> Terms:
    """Who learns what, how, and what leaves. ConfigError where the digest is another agreement's."""
    own = files.read_site(folder)
    files.check_digest(digest)
    pieces = assemble(own.config, own.config.task.classes or ())
    found = pieces.handshake.agreement
    if digest is not None and not found.startswith(digest):
        remedy = "ask the coordinator for the agreement that it means, and compare the files"
        raise ConfigError("another agreement lies in this folder", allowed=found, received=digest, remedy=remedy)
    return {"agreement": found, **_parties(own, files.deployment(folder)), **_work(pieces), **_traffic(own, pieces)}


def _parties(own: SiteFile, meeting: files.Deployment) -> Terms:
    rules = own.gate.model_dump(include={"min_images", "min_patients", "max_bytes", "min_seconds"})
    return {"site": own.name, "sites": list(meeting.sites), "coordinator": meeting.address, "rules": rules}


def _work(pieces: Experiment) -> Terms:
    config, train = pieces.config, pieces.config.train
    tuners, strategy = [table.name for table in config.tuner], config.strategy.name
    about = {strategy: registry.get("strategies", strategy).summary}
    return {
        "backbone": {"name": pieces.backbone.name, "digest": pieces.handshake.backbone},
        "task": {"name": config.task.name, "classes": list(pieces.task.classes)},
        "method": {"tuner": tuners, "strategy": strategy},
        "about": about | {name: registry.get("tuners", name).summary for name in tuners},
        "rounds": train.rounds,
        "participation": train.participation,
        "each_round": _learning(train),
        "looks_at_single_updates": pieces.strategy.declares.needs_individual_updates,
    }


def _learning(train: TrainConfig) -> str:
    """How much is learnt before something is sent: of few images an update tells most."""
    passes = train.local_epochs or 1
    over = f"{passes:g} {'pass' if passes == 1 else 'passes'} over its training images, {train.batch_size} at a time"
    work = over if train.local_steps is None else f"{train.local_steps} steps of {train.batch_size} images each"
    return f"{work}; a strategy may have its own"


def _traffic(own: SiteFile, pieces: Experiment) -> Terms:
    numbers = range(1, pieces.config.train.rounds + 1)
    ups, downs = ([way(number, own.name) for number in numbers] for way in (pieces.up, pieces.down))
    up, down = ({name: spec for specs in each for name, spec in specs.items()} for each in (ups, downs))
    return {
        "leaves": results.wire(up, pieces.codec),
        "bytes_by_round": [_total(results.wire(specs, pieces.codec)) for specs in ups],
        "arrives": results.wire(down, pieces.codec),
        "stays": results.wire(keeping.kept(pieces, files.deployment(own.folder).sites)),
        "numbers": results.numbers(pieces, remote=True),
    }


def _total(rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(int(row["bytes"]) for row in rows)


# ------------------------------------------------------------------------------------------------ in plain words
def words(terms: Mapping[str, Any]) -> RenderableType:
    """All of it for people, on a terminal of 80 columns too; the digest comes last."""
    facts = Table.grid("", _whole(""), padding=(0, 2))
    for label, text in _facts(terms):
        facts.add_row(Text(label, "bold"), Text(text))
    title = Text(f"What {terms['site']} is asked to agree to", "bold")
    digest = Text.assemble(("Digest of this agreement, the same at all who take part\n", "bold"), terms["agreement"])
    weights = [_weights(terms["leaves"])] if terms["leaves"] else []
    parts: list[RenderableType] = [title, facts, *weights, _numbers(terms["numbers"])]
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in parts), digest)


def _facts(terms: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    own, share, rounds = terms["site"], terms["participation"], terms["rounds"]
    others = ", ".join(name for name in terms["sites"] if name != own) or "no other"
    drawn = "" if share == 1 else f", for each of which {share:.0%} of the hospitals are drawn"
    arrives, work = terms["arrives"], f"{terms['each_round']}. At the end: a test of the model"
    method = [*(f"{name}: {about}" for name, about in terms["about"].items()), terms["backbone"]["name"]]
    yield "take part", f"{own} (this hospital); {others}; a coordinator at {terms['coordinator']}"
    yield "purpose", f"a model that tells images apart: {', '.join(terms['task']['classes'])}"
    yield "method", "; ".join(method)
    yield "how often", f"{_many(rounds, 'round')}{drawn}. In each: {work}"
    yield "leaves", f"{_sent(terms['bytes_by_round'], terms['leaves'])}, and the numbers below. {TELLS}"
    yield "stays", f"{STAYS}{_kept(terms['stays'])}"
    yield "comes in", f"up to {decimal(_total(arrives))} of weights of the model in a round{_free(arrives)}"
    yield "who sees it", _seen(terms["looks_at_single_updates"], len(terms["sites"]))
    yield "own rules", _rules(terms["rules"])


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _sent(by_round: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "no weights of the model"
    sizes = [size for size in by_round if size] or [0]
    upto, total = "" if min(sizes) == max(sizes) else "up to ", f", {decimal(sum(sizes))} in all" if sizes[1:] else ""
    when = "in each round" if len(sizes) == len(by_round) else f"in {len(sizes)} of {_many(len(by_round), 'round')}"
    return f"trained weights of the model, {upto}{decimal(max(sizes))} {when}{total}{_free(rows)}"


def _free(rows: Sequence[Mapping[str, Any]]) -> str:
    count = sum(None in row["shape"] for row in rows)
    return f", and {_many(count, 'tensor')} as large as each round makes them" if count else ""


def _kept(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "; no part of the model is this hospital's alone"
    return f"; and {decimal(_total(rows))} of weights that are this hospital's alone"


def _seen(looks: bool, sites: int) -> str:
    said = "The coordinator gets what this hospital sends by itself: it is not summed in secret before. "
    if looks:
        return said + (
            "The method works on what each hospital sent by itself, and what the other hospitals get may hold what a "
            "single one sent."
        )
    said += "The method needs no more than sums over hospitals, and the other hospitals get what comes of these."
    return said + (" As you are two, the other one can subtract its own and has yours." if sites == 2 else "")


def _rules(rules: Mapping[str, Any]) -> str:
    images, patients = _many(rules["min_images"], "image"), _many(rules["min_patients"], "patient")
    seconds = rules["min_seconds"]
    pace = f" A new question of a kind is answered every {seconds:g} s at most." if seconds else ""
    return (
        f"No metric of fewer than {images} or {patients} leaves, and no reply of more than "
        f"{decimal(rules['max_bytes'])}.{pace} These rules, [gate] in site.toml, are this hospital's: nobody else can "
        "change them."
    )


def _weights(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tensors that differ by their block alone stand in one line."""
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        alike.setdefault(_BLOCK.sub(".*.", row["name"]), []).append(row)
    table = _titled("Trained weights that leave", "name in the model", "how many", "bytes")
    for name, those in alike.items():
        free = any(None in row["shape"] for row in those)
        table.add_row(name, f"{len(those):,}", "as trained" if free else f"{_total(those):,}")
    return table


def _numbers(rows: Sequence[Mapping[str, str]]) -> Table:
    table = _titled("Other numbers that leave", "when", "what (its name)")
    for when in dict.fromkeys(row["sent"] for row in rows):
        lines = [f"{row['what']} ({row['name']})" for row in rows if row["sent"] == when]
        table.add_row(when, "\n".join(f"- {line}" for line in lines))
    return table


def _whole(title: str) -> Column:
    """In which no name ends in dots, however long it is."""
    return Column(title, overflow="fold")


def _titled(title: str, *columns: str) -> Table:
    return Table(*map(_whole, columns), title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
