"""What is saved where blocks below the trained ones are frozen: engine.prefix_cache on against off, same bits.

Tuners that leave a prefix frozen: the head alone, LoRA in the last blocks, a stochastic block. What could be avoided is
measured beside: the time of the forward pass through the frozen part, times the passes that show an image again. The
cache starts empty in every repeat. No augmentation: an augmented image is another image each time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import inside, job
from benchmarks.clock import watching
from benchmarks.frame import Estimate, Result, Scale, Skipped, alternate, check, ratio
from benchmarks.inside import Outcome
from benchmarks.job import Job
from benchmarks.limit import threads
from consilium.data import Examples, SiteData
from consilium.experiment import assemble
from consilium.local.augment import normalise, to_float

NAME, TITLE = "prefix", "The frozen prefix: cached against computed again"
LAST = 4  # blocks that the tuner at the end trains


@dataclass
class Case:
    """One tuner with the cache on and off."""

    tables: Mapping[str, Any]
    sites: Mapping[str, SiteData]
    classes: tuple[str, ...]
    each: Job
    outcomes: dict[str, list[Outcome]] = field(default_factory=lambda: {"on": [], "off": []})
    fits: list[dict[str, float]] = field(default_factory=list)

    def turn(self, name: str) -> float:
        """Seconds of all rounds, from an empty cache."""
        with tempfile.TemporaryDirectory() as scratch, watching() as clock:
            engine = {"prefix_cache": name == "on", "cache": scratch}
            settings = self.each.config(**{**self.tables, "engine": engine})

            def listen(event: Mapping[str, Any]) -> None:
                if event["event"] == "round" and name == "on":
                    self.fits.append(clock.take())

            found = inside.federate(settings, self.sites, self.classes, listen=listen)
        self.outcomes[name].append(found)
        return sum(found.seconds)

    def contest(self, repeats: int, frozen: Callable[[Case], float]) -> dict[str, list[float]]:
        """Both in turn, and beside them what the frozen part costs; the bits of what they trained must agree."""
        turns = {"off": lambda: self.turn("off"), "on": lambda: self.turn("on"), "frozen": lambda: frozen(self)}
        found = alternate(turns, repeats)
        pairs = zip(self.outcomes["on"], self.outcomes["off"], strict=True)
        check(all(inside.same_bits(on.shared, off.shared) for on, off in pairs), "the cache changed bits")
        check(self.outcomes["on"][0].images == self.outcomes["off"][0].images, "other images")
        return found


def run(scale: Scale) -> Result:
    """The head alone for many rounds; then what the other tuners save of what could be saved."""
    if not job.known("prefix_cache"):
        raise Skipped("engine.prefix_cache is not there yet")
    each = scale.pick(Job(8, 64, 9, 18), Job(4, 16, 2, 2))
    classes = each.prepare().classes
    result = Result()
    with threads(1):
        _linear(result, each, classes, scale)
        for name, tables in tuners(scale).items():
            sites = inside.made_sites(each, scale.pick(2, 1), scale.pick(64, 8), scale.pick(16, 2))
            _share(result, name, Case(tables, sites, classes, each), scale)
    return result


def _linear(result: Result, each: Job, classes: tuple[str, ...], scale: Scale) -> None:
    rounds = scale.pick(20, 3)
    sites = inside.made_sites(each, 2, scale.pick(128, 8), scale.pick(18, 2))
    case = Case({"tuner": [{"name": "linear"}], "train": {"rounds": rounds, **PLAIN}}, sites, classes, each)
    whole = Whole(each, sites)
    seconds = case.contest(scale.repeats(3), lambda _: whole.seconds())
    what = f"linear, {rounds} rounds, time without over with the cache, empty at the start"
    result.add(what, ratio(seconds["off"], seconds["on"]), target=(">=", 15), note="same bits")
    first = [fit["fit"] for fit in case.fits[::rounds]]
    over = ratio(first, seconds["frozen"])
    result.add("the first epoch with the cache over one forward pass, time", over, target=("<=", 1.1))
    result.samples["linear"] = {**seconds, "first epoch": first}
    result.facts["linear"] = {"images": case.outcomes["on"][0].images[0], "loss": case.outcomes["on"][0].losses[-1]}


PLAIN = {"augmentation": "none", "batch_size": 16}


def tuners(scale: Scale) -> dict[str, dict[str, Any]]:
    """Tuners whose prefix is a part of the backbone: kept from round to round, or within a round of several epochs."""
    last = list(range(12 - LAST, 12))
    drawn = {"draw": "cycle", "blocks": [1, 4, 7, 10]}  # each depth once
    train = {**PLAIN, "rounds": scale.pick(3, 2), "local_epochs": scale.pick(3, 2)}
    return {
        f"LoRA in the last {LAST} blocks": {"tuner": [{"name": "lora", "rank": 8, "blocks": last}], "train": train},
        "a stochastic block": {"tuner": [{"name": "stochastic_block", **drawn}], "train": {**train, "rounds": 4}},
    }


def _share(result: Result, name: str, case: Case, scale: Scale) -> None:
    seconds = case.contest(scale.repeats(2), Whole(case.each, case.sites).avoidable)
    avoidable = seconds["frozen"]
    saved = [off - on for off, on in zip(seconds["off"], seconds["on"], strict=True)]
    share = [100 * one / other for one, other in zip(saved, avoidable, strict=True)]
    portion = [100 * one / other for one, other in zip(avoidable, seconds["off"], strict=True)]
    result.add(f"{name}: share of a round that the frozen prefix makes avoidable", Estimate.of(portion), "%")
    result.add(f"{name}: of that, saved by the cache", Estimate.of(share), "%", (">=", 85), note="same bits")
    result.samples[name] = seconds


class Whole:
    """The frozen backbone alone, up to any depth: what a pass over all training images costs."""

    def __init__(self, each: Job, sites: Mapping[str, SiteData]) -> None:
        self.experiment = assemble(each.config(tuner=[{"name": "linear"}]), each.prepare().classes)
        self.sites = sites
        self.per_image: dict[int, float] = {}

    def seconds(self, depth: int | None = None, batch: int = 128) -> float:
        """One pass over the training images of all sites; `depth` blocks, or all and the pooled features."""
        started = time.perf_counter()
        with torch.inference_mode():
            for site in self.sites.values():
                for start in range(0, len(site.train), batch):
                    self._forward(self._images(site.train, start, batch), depth)
        return time.perf_counter() - started

    def _images(self, examples: Examples, start: int, batch: int) -> Tensor:
        pixels = torch.from_numpy(examples.images[examples.rows[start : start + batch]])
        return normalise(to_float(pixels), self.experiment.backbone.preprocessing)

    def _forward(self, images: Tensor, depth: int | None) -> None:
        module: Any = self.experiment.backbone.module
        if depth is None:
            module(images)
            return
        tokens = module.norm_pre(module.patch_drop(module._pos_embed(module.patch_embed(images))))
        for block in module.blocks[:depth]:
            tokens = block(tokens)

    def avoidable(self, case: Case) -> float:
        """Seconds of forward passes through the frozen prefix that show an image of a fit or a request again.

        Where no round trains anything below a block, one pass in all is needed; else one in every request.
        """
        found, train, seen = case.outcomes["off"][-1], _count(case.sites, "train"), set[int]()
        self.per_image.clear()
        seconds = 0.0
        for number, passes in enumerate(found.images, 1):
            depth, lasting = _depths(found, number)
            shown = passes + 2 * _count(case.sites, "val")
            needed = 0 if lasting in seen else train + _count(case.sites, "val")
            seen |= {lasting} if lasting else set()
            seconds += self._cost(depth) * (shown - needed)
        return seconds

    def _cost(self, depth: int) -> float:
        if depth not in self.per_image:
            self.per_image[depth] = self.seconds(depth, job.BATCH) / _count(self.sites, "train")
        return self.per_image[depth]


def _depths(found: Outcome, number: int) -> tuple[int, int]:
    """Blocks below all that this round trains, and below all that any round trains."""
    specs, active = found.experiment.model.specs, found.experiment.active(number, "site-00000")
    blocks = [spec.tag.block for spec in specs.values() if spec.tag.block is not None]
    now = [spec.tag.block for spec in specs.values() if spec.tag.block is not None and active(spec.tag)]
    return min(now), min(blocks)


def _count(sites: Mapping[str, SiteData], split: str) -> int:
    return sum(len(getattr(site, split)) for site in sites.values())
