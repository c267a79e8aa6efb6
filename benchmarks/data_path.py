"""From the disk to a batch: the store of decoded images against decoding the files in every epoch; who waits for data.

Files of drawn images at 450 pixels, a usual size of dermoscopy pictures. Both paths end with the same batch: 96 pixels,
augmented, normalised. Pages of files and store are in memory, so that the disk is not measured.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from benchmarks import inside, job, plain
from benchmarks.clock import watching
from benchmarks.frame import Estimate, Result, Scale, alternate, check, ratio
from benchmarks.job import Job
from benchmarks.limit import pooled, threads
from consilium.data import Preprocessing
from consilium.local.augment import PRESETS, normalise, to_float
from consilium.sites.images import decode
from consilium.sites.store import transform_pixels

NAME, TITLE = "data", "From the disk to a batch"
SIDE = 450
LOADING = {
    "fit": (("consilium.local.train:Trainer", "fit"),),
    "load": (("consilium.local.train", "make_batch"),),
}


def run(scale: Scale) -> Result:
    """The store against files; then the trainer's own waiting."""
    each = scale.pick(Job(8, 64, 9, 18), Job(4, 16, 2, 2))
    count = scale.pick(64, 8)
    examples = pooled(each, count)
    preprocessing = plain.ours(each.config(), each.prepare().classes).preprocessing
    contestants: dict[str, Callable[[], float]] = {"store": lambda: _through_store(examples, preprocessing)}
    files = encoded(count)
    for kind in files:
        contestants[kind] = lambda kind=kind: _through_files(files[kind], preprocessing)
    result = Result()
    with threads(1):
        seconds = alternate(contestants, scale.repeats(7), warm_up=1)
        for kind in files:
            over = ratio(seconds[kind], seconds["store"])
            result.add(f"an epoch's batches from {kind} files over those from the store, time", over, "x", (">=", 3.0))
        waiting, images = idle(each, scale)
    result.add(
        "share of a fit in which the trainer waits for its batch", waiting, "%", ("<=", 3), note="augmentation included"
    )
    result.samples = {"seconds": seconds, "images": count}
    result.facts = {"images trained": images, "bytes": {kind: sum(map(len, found)) for kind, found in files.items()}}
    return result


def encoded(count: int) -> dict[str, list[bytes]]:
    """Drawn pictures as files of two kinds, in memory."""
    pictures = [image for _, image in job.drawn(count, SIDE)]
    return {"JPEG": [_file(each, "JPEG") for each in pictures], "PNG": [_file(each, "PNG") for each in pictures]}


def _file(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


def _through_store(examples: plain.Examples, preprocessing: Preprocessing) -> float:
    started = time.perf_counter()
    count = sum(len(labels) for _, labels in plain.batches(examples, preprocessing, 0))
    check(count == len(examples), "images")
    return time.perf_counter() - started


def _through_files(files: list[bytes], preprocessing: Preprocessing) -> float:
    started = time.perf_counter()
    drawing = torch.Generator().manual_seed(0)
    for chosen in torch.randperm(len(files), generator=drawing).split(job.BATCH):
        pixels = np.stack([transform_pixels(decode(files[at], 16), preprocessing) for at in chosen.tolist()])
        normalise(PRESETS["dermoscopy"](to_float(torch.from_numpy(pixels)), drawing), preprocessing)
    return time.perf_counter() - started


def idle(each: Job, scale: Scale) -> tuple[Estimate, int]:
    """Per cent of the time of a fit that passes until batches are there, round by round."""
    rounds = scale.repeats(4, 2)
    settings = each.config(train={"rounds": rounds}, engine=job.engine(stacked_sites=1))
    shares = []
    with watching(LOADING) as clock:

        def listen(event: object) -> None:
            if isinstance(event, dict) and event["event"] == "round":
                spent = clock.take()
                shares.append(100 * spent["load"] / (spent["load"] + spent["fit"]))

        sites = inside.made_sites(each, 2, 64 if not scale.quick else 16)
        found = inside.federate(settings, sites, each.prepare().classes, listen=listen)
    check(not clock.missing, f"these functions are gone: {clock.missing}")
    return Estimate.of(shares[1:]), sum(found.images)
