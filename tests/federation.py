"""A federation small enough for a test: a tiny ViT at random, a few drawn images, the real round loop and engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilium import checkpoint, config, experiment, registry
from consilium.coordinator import Coordinator
from consilium.data import Examples, SiteData
from consilium.engines.simulate import Federation, Simulation, secrets_of
from consilium.exchange import Transport
from consilium.experiment import Experiment
from consilium.messages import decode_reply, decode_request, envelope_of
from consilium.protocols import Failure, Strategy, Tuner
from consilium.rounds import Progress
from consilium.tensors import Tensors

torch.set_num_threads(1)

CLASSES = ("dark", "green", "bright")
SIZE = 32
Wire = list[tuple[str, str, bytes]]  # direction, site, message
TABLE: Mapping[str, Any] = {
    "seed": 3,
    "backbone": {"name": "test_vit", "weights": "random", "image_size": SIZE},
    "tuner": [{"name": "lora", "rank": 4}],
    "train": {"rounds": 3, "batch_size": 6, "learning_rate": 0.01, "schedule": {"name": "constant", "warmup": 0}},
    "evaluation": {"bootstrap": 0},
    "engine": {"device": "cpu"},
}
SGD = {"optimizer": "sgd", "momentum": 0, "weight_decay": 0, "clip_norm": 0, "learning_rate": 0.05}


def configure(**tables: Any) -> config.Config:
    """The small configuration with some keys of its tables replaced."""
    merged = dict(TABLE)
    for name, value in tables.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    return config.from_dict(merged)


def examples(site: str, count: int, seed: int) -> Examples:
    """Noise with the class in its colour; labels in turn."""
    draw = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    images = draw.integers(0, 120, (count, SIZE, SIZE, 3))
    images[labels == 1, :, :, 1] += 100
    images[labels == 2] += 120
    text = np.array([f"{site}{seed}-{number}" for number in range(count)], dtype=np.str_)
    origins = np.full(count, site)
    return Examples(images.astype(np.uint8), np.arange(count), labels, text, text, origins)


def hospital(name: str, train: int = 14, seed: int = 0) -> SiteData:
    """A site with `train` training images and six in each of the other splits."""
    return SiteData(name, examples(name, train, seed), examples(name, 6, seed + 1), examples(name, 6, seed + 2))


def hospitals(*sizes: int) -> dict[str, SiteData]:
    """Sites a, b, c ... of these numbers of training images."""
    return {
        name: hospital(name, count, 10 * at) for at, (name, count) in enumerate(zip("abcdefgh", sizes, strict=False))
    }


def pooled(sites: Mapping[str, SiteData]) -> SiteData:
    """All sites' training images at one site."""
    parts = [site.train for site in sites.values()]
    joined = {key: np.concatenate([getattr(p, key) for p in parts]) for key in ("labels", "ids", "groups", "origins")}
    images = np.concatenate([part.images for part in parts])
    first = next(iter(sites.values()))
    return SiteData("pooled", Examples(images, np.arange(len(images)), **joined), first.val, first.test)


@dataclass
class Outcome:
    """A finished federation."""

    progress: Progress
    experiment: Experiment
    folder: Path
    wire: Wire
    events: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def shared(self) -> Tensors:
        return self.progress.server.shared

    def served(self, site: str) -> Tensors:
        """The model this site would use."""
        return checkpoint.load(self.folder / "sites" / site / "served.safetensors")[0]

    def sent(self, *ways: str) -> list[tuple[int, str, Tensors]]:
        """(round, site, tensors) of the messages that held tensors, in order; ways: up, down, finish, evaluate."""
        found = []
        for way, site, data in self.wire:
            message = self.decode(way, data)
            kind = message.kind if way == "down" and message.kind in ("finish", "evaluate") else way
            if kind in ways and message.tensors:
                found.append((message.round, site, message.tensors))
        return found

    def decode(self, way: str, data: bytes) -> Any:
        decode = decode_request if way == "down" else decode_reply
        fields = envelope_of(data)
        return decode(data, getattr(self.experiment, way)(fields["round"], fields["site"]))


Wrap = Callable[[Transport], Transport]


def run(
    folder: Path,
    settings: config.Config,
    sites: Mapping[str, SiteData],
    *,
    strategy: Strategy | None = None,
    tuners: Sequence[Tuner] | None = None,
    secrets: Mapping[str, int] | None = None,
    wrap: Wrap = lambda transport: transport,
    watch: Callable[[str, str, bytes], None] = lambda *_: None,
    display: Callable[[Mapping[str, Any]], None] = lambda _: None,
    expect: Callable[[Collection[str]], None] | None = None,
) -> Outcome:
    """Run a federation in this process; members in hand take the place of those the configuration names."""
    pieces = assemble(settings, strategy, tuners)
    here = Federation(settings, CLASSES, sites, folder, secrets or secrets_of(settings.seed, sites))
    wire: Wire = []
    events: list[Mapping[str, Any]] = []

    def record(direction: str, site: str, data: bytes) -> None:
        wire.append((direction, site, data))
        watch(direction, site, data)

    def show(event: Mapping[str, Any]) -> None:
        events.append(event)
        display(event)

    with Simulation({"run": here}, 1, record) as simulation:
        simulation.answering.experiments["run"] = pieces
        wired = wrap(simulation.transport("run"))
        progress = Coordinator(pieces, wired, folder, show, simulation.explain("run"), expect=expect).run()
    return Outcome(progress, pieces, folder, by_question(wire), events)


def by_question(wire: Wire) -> Wire:
    """The same messages with all requests of a question before its replies, as if every site were asked at once."""
    questions: list[tuple[str, int]] = []
    asked: dict[str, int] = {}
    places = []
    for way, site, data in wire:
        if way == "down":
            fields = envelope_of(data)
            question = (fields["kind"], fields["round"])
            if question not in questions[-1:]:
                questions.append(question)
            asked[site] = len(questions)
        places.append((asked[site], way == "up"))
    return [wire[at] for at in sorted(range(len(wire)), key=places.__getitem__)]


def assemble(
    settings: config.Config, strategy: Strategy | None = None, tuners: Sequence[Tuner] | None = None
) -> Experiment:
    """The experiment of a configuration, with members in hand where given."""
    tables = settings.tuner
    return experiment.join(
        settings,
        CLASSES,
        tuners or [registry.build("tuners", table.name, table.options()) for table in tables],
        strategy or registry.build("strategies", settings.strategy.name, settings.strategy.options()),
    )


@dataclass
class Backwards:
    """A wire on which the last reply comes first."""

    inner: Transport

    def sites(self) -> tuple[str, ...]:
        return self.inner.sites()

    def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        yield from reversed(list(self.inner.round(requests)))


@dataclass
class Lossy:
    """A wire that loses some (site, number of the request): before the site worked, or its reply after."""

    inner: Transport
    losses: set[tuple[str, int]]
    before_work: bool = True
    number: int = 0

    def sites(self) -> tuple[str, ...]:
        return self.inner.sites()

    def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        self.number += 1
        lost = {site for site in requests if (site, self.number) in self.losses}
        asked = {site: data for site, data in requests.items() if not (self.before_work and site in lost)}
        replies = dict(self.inner.round(asked))
        for site in requests:
            yield site, Failure(site, "lost", "the wire broke") if site in lost else replies[site]


@dataclass
class Belated:
    """A wire on which some (site, round) reply when the next round is open, and are not asked that one."""

    inner: Transport
    belated: Collection[tuple[str, int]]
    held: dict[str, bytes | Failure] = field(default_factory=dict)

    def sites(self) -> tuple[str, ...]:
        return self.inner.sites()

    def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        came, self.held = {site: each for site, each in self.held.items() if site in requests}, {}
        for site in requests:
            if site in came:
                yield site, came[site]
                continue
            data = requests[site]
            fields = envelope_of(data)
            ((_, reply),) = self.inner.round({site: data})
            if fields["kind"] == "round" and (site, fields["round"]) in self.belated:
                self.held[site] = reply
                yield site, Failure(site, "late", "its reply is under way")
            else:
                yield site, reply


def bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The raw bytes of every tensor."""
    return {name: value.detach().cpu().contiguous().numpy().tobytes() for name, value in tensors.items()}


def traces(tensors: Mapping[str, Tensor]) -> dict[bytes, str]:
    """What would give a tensor away: its bytes and those of every row of 16 bytes or more, unless all alike."""
    found = {}
    for name, value in tensors.items():
        rows = [value.flatten(), *(value.flatten(1) if value.ndim > 1 else ())]
        for row in rows:
            raw = row.detach().cpu().contiguous().numpy().tobytes()
            if len(raw) >= 16 and (row != row[0]).any():
                found[raw] = name
    return found


def assert_absent(tensors: Mapping[str, Tensor], wire: Wire) -> None:
    """Fail where any value of these tensors crossed the wire, in a tensor of whatever name or in an envelope."""
    marks = traces(tensors)
    assert marks
    everything = b"".join(data for _, _, data in wire)
    found = sorted({name for raw, name in marks.items() if raw in everything})
    assert not found, f"crossed the wire: {found}"
