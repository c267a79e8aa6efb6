"""The limit of the machine: matrix products, memory bandwidth, and plain loops that train one model.

FLOPs are counted by `torch.utils.flop_counter` and by hand; a product of [m, k] and [k, n] is 2 m k n of them. The
share of the measured rate of matrix products that a training loop reaches is its MFU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import job, plain
from benchmarks.frame import Estimate, Result, Scale, alternate, ratio
from benchmarks.job import Job
from consilium.data import Examples

NAME, TITLE = "limit", "The machine, and one model without a federation"
TOKENS = (job.SIZE // 16) ** 2 + 1
WIDTH, BLOCKS = 192, 12


def run(scale: Scale) -> Result:
    """Rates of the machine, then plain loops against them."""
    result = Result()
    rates = {name: matrix_rates(threads, scale) for name, threads in (("1", 1), ("all", cores()))}
    for name, found in rates.items():
        threads = "1 thread" if name == "1" else f"{cores()} threads"
        result.add(f"matrix products of float32, {threads}, best size", found["best"], "GFLOP/s")
        result.add(f"the same in the shapes of the model at batch {job.BATCH}", found["model"], "GFLOP/s")
    for name, kind in (("copy", _copy), ("sum", summed)):
        for threads in (1, cores()):
            speed = bandwidth(kind, threads, scale)
            result.add(f"memory bandwidth, {name}, {threads} thread{'s' * (threads > 1)}", speed, "GB/s")
    _loops(result, rates["1"], scale)
    return result


def cores() -> int:
    """Cores this process may use, four at most, as the federations here use."""
    return min(4, len(os.sched_getaffinity(0)))


def _loops(result: Result, rates: dict[str, Estimate], scale: Scale) -> None:
    each = Job(8, 64, 9, 18) if not scale.quick else Job(4, 16, 2, 2)
    examples = pooled(each, scale.pick(256, 32))
    with threads(1):
        federation = each.prepare()
        loops = {"ours": plain.ours(each.config(), federation.classes)}
        if find_spec("peft") is not None:
            loops["peft"] = plain.with_peft(len(federation.classes), loops["ours"].preprocessing)
        turns: dict[str, Callable[[], float]] = {name: _seconds_of(loop, examples) for name, loop in loops.items()}
        samples = alternate(turns, scale.repeats(5), warm_up=1)
        flops = counted_flops(loops["ours"], examples)
    result.samples["seconds per epoch"] = samples
    result.facts |= {"images": len(examples), "flops per image": flops, "by formula": formula_flops()}
    for name, seconds in samples.items():
        speed = [len(examples) / each for each in seconds]
        result.add(f"plain loop, 1 thread, LoRA by {_library(name)}", Estimate.of(speed), "images/s")
    achieved = [flops * len(examples) / each / 1e9 for each in samples["ours"]]
    for shape, words in (("best", "of the best size"), ("model", "of the model's shapes")):
        share = [100 * each / rates[shape].value for each in achieved]
        result.add(f"MFU of the plain loop, share of the rate {words}", Estimate.of(share), "%")
    if "peft" in samples:
        result.add("plain loop with peft over the one with ours, time", ratio(samples["peft"], samples["ours"]))


def _library(name: str) -> str:
    return "our adapters" if name == "ours" else "the peft library"


def _seconds_of(loop: plain.Plain, examples: Examples) -> Callable[[], float]:
    return lambda: loop.epoch(examples)[0]


def pooled(each: Job, count: int) -> Examples:
    """The first training images of all sites as one split."""
    from consilium.sites.federation import pool

    train = pool(each.prepare()).train
    chosen = slice(0, min(count, len(train)))
    parts: dict[str, Any] = {key: getattr(train, key)[chosen] for key in ("rows", "labels", "ids", "groups", "origins")}
    return Examples(train.images, **parts)


# ------------------------------------------------------------------------------------------------ rates
@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matrix_rates(number: int, scale: Scale) -> dict[str, Estimate]:
    """GFLOP/s of float32 products: at the best of three sizes, and at the model's four shapes in turn."""
    square = [(side, side, side) for side in scale.pick((512, 1024, 2048), (256,))]
    rows = job.BATCH * TOKENS
    inner = [(rows, WIDTH, 3 * WIDTH), (rows, WIDTH, WIDTH), (rows, WIDTH, 4 * WIDTH), (rows, 4 * WIDTH, WIDTH)]
    repeats = scale.repeats(7, 2)
    with threads(number):
        best = max((_rate([shape], repeats) for shape in square), key=lambda found: found.value)
        return {"best": best, "model": _rate(inner, repeats)}


def _rate(shapes: list[tuple[int, int, int]], repeats: int) -> Estimate:
    pairs = [(torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)) for m, k, n in shapes]
    flops = sum(2 * m * k * n for m, k, n in shapes)
    count = max(1, int(2e9 / flops))

    def once() -> float:
        started = time.perf_counter()
        for _ in range(count):
            for left, right, out in pairs:
                torch.mm(left, right, out=out)
        return count * flops / (time.perf_counter() - started) / 1e9

    once()
    return Estimate.of([once() for _ in range(repeats)])


def _copy(source: torch.Tensor, target: torch.Tensor) -> int:
    target.copy_(source)
    return 2 * source.nbytes  # read and written


def summed(source: torch.Tensor, target: torch.Tensor) -> int:  # noqa: ARG001
    """Add all elements; bytes read."""
    source.sum()
    return source.nbytes


def bandwidth(kind: Callable[[torch.Tensor, torch.Tensor], int], number: int, scale: Scale) -> Estimate:
    """GB/s over a tensor far larger than any cache."""
    source = torch.ones(scale.pick(64, 8) * 2**20)
    target = torch.empty_like(source)

    def once() -> float:
        started = time.perf_counter()
        moved = kind(source, target)
        return moved / (time.perf_counter() - started) / 1e9

    with threads(number):
        once()
        return Estimate.of([once() for _ in range(scale.repeats(9, 2))])


# ------------------------------------------------------------------------------------------------ FLOPs
def counted_flops(loop: plain.Plain, examples: Examples) -> float:
    """Per image of one optimiser step, as torch counts them."""
    images, labels = next(plain.batches(examples, loop.preprocessing, 0))
    with FlopCounterMode(display=False) as counter:
        loop.step(images, labels)
    return float(counter.get_total_flops()) / len(images)


def formula_flops() -> float:
    """Per image: forward and the gradient of activations through every block, and the factors' own products.

    The gradient stops at the first block's qkv, where the first trained factor is; patches need none.
    """
    linear, attention = 2 * TOKENS * 12 * WIDTH**2, 4 * TOKENS**2 * WIDTH
    factors = 2 * TOKENS * job.RANK * (WIDTH + 3 * WIDTH)
    patches = 2 * (TOKENS - 1) * 16 * 16 * 3 * WIDTH
    below_first = 2 * TOKENS * 3 * WIDTH**2 + 2 * TOKENS * job.RANK * WIDTH  # the input of block 0 needs no gradient
    forward = BLOCKS * (linear + attention + factors)
    backward = BLOCKS * (linear + 2 * attention + 2 * factors) - below_first
    return float(patches + forward + backward)
