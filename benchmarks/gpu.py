"""One GPU: ViT-B/16 at 224 px, LoRA r = 8, bfloat16. In: a CUDA device. Out: images/s, share of its FLOP/s, memory.

    python benchmarks/gpu.py [--json gpu.json]

Three federations go through the engine that every run goes through, requests and replies as bytes: one site with
batches of 256, as written and compiled; sixteen sites with batches of 16, stacked into one. What is timed are whole
rounds after the first, which compiles: augmentation, copies, optimiser, messages and checkpoints included.

FLOPs of an image are those that one step needs (forward, gradient of what is trained), counted by
`torch.utils.flop_counter` on the model as written: what a compiler or checkpointing computes again does not count. The
share is given of the product of two large matrices measured in the same run, and of the data sheet's number.

Needs a CUDA device, PyTorch, timm and the other dependencies of consilium (pydantic, pandas, pyarrow, filelock, rich),
and no network: weights are drawn, since speed does not depend on them. `--try` goes through the same on a CPU with a
tiny model, to see that it works; it prints no numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from consilium import config, surroundings
from consilium.coordinator import Coordinator
from consilium.data import Examples, SiteData
from consilium.engines.simulate import Federation, Simulation, secrets_of
from consilium.experiment import assemble
from consilium.local.predict import autocast

CLASSES = ("a", "b", "c", "d")
DATA_SHEET = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, FLOP/s
BATCH, SITES, ROUNDS = 256, 16, 6
FULL = {"backbone": "vit_base_patch16_224", "size": 224, "batch": BATCH, "steps": 16}
TINY = {"backbone": "test_vit", "size": 32, "batch": 16, "steps": 2}


def main(arguments: list[str]) -> int:
    """Print a table; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write every number to this file")
    parser.add_argument("--try", dest="attempt", action="store_true", help="on a CPU, a tiny model, without numbers")
    chosen = parser.parse_args(arguments)
    if not chosen.attempt and not torch.cuda.is_available():
        print("this benchmark measures a GPU and found none: run it on a machine with CUDA", file=sys.stderr)
        return 2
    device, job = ("cpu", TINY) if chosen.attempt else ("cuda", FULL)
    found = measure(device, job)
    if chosen.attempt:
        print("it works; numbers need a GPU")
        return 0
    print(table(found))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=2))
    return 0


def measure(device: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """Every number of the table."""
    compiled = device != "cpu"  # a trial must do without a compiler
    kinds: dict[str, dict[str, Any]] = {
        "one site": {"sites": 1, "engine": {}},
        "one site, compiled": {"sites": 1, "engine": {"compile": compiled}},
        "sites in turns, compiled": {"sites": SITES, "engine": {"compile": compiled, "stacked_sites": 1}},
        "sites stacked": {"sites": SITES, "engine": {"stacked_sites": SITES}},
        "sites stacked, compiled": {"sites": SITES, "engine": {"compile": compiled, "stacked_sites": SITES}},
    }
    product = matrix_rate(device, 8192 if compiled else 64)
    flops = flops_of_an_image(device, job)
    found: dict[str, Any] = {"versions": surroundings.versions(), "matrix product, FLOP/s": product, "FLOPs": flops}
    if compiled:
        found |= {
            "device": torch.cuda.get_device_name(),
            "data sheet, FLOP/s": data_sheet(torch.cuda.get_device_name()),
        }
    for name, kind in kinds.items():
        settings = configuration(device, job, kind["sites"], kind["engine"])
        rounds, peak = federate(settings, kind["sites"], job)
        images = job["batch"] * job["steps"]
        speed = images / statistics.median(rounds)
        found[name] = {"images/s": speed, "seconds": rounds, "FLOP/s": speed * flops, "peak bytes": peak}
    return found


def configuration(device: str, job: Mapping[str, Any], sites: int, engine: Mapping[str, Any]) -> config.Config:
    """A federation whose sites together take one batch of `job` per step."""
    train = {
        "rounds": ROUNDS,
        "batch_size": job["batch"] // sites,
        "local_steps": job["steps"],
        "precision": "bfloat16",
        "augmentation": "dermoscopy",
        "schedule": {"name": "constant", "warmup": 0},
    }
    table = {
        "seed": 1,
        "backbone": {"name": job["backbone"], "weights": "random", "image_size": job["size"]},
        "tuner": [{"name": "lora", "rank": 8}],
        "train": train,
        "evaluation": {"bootstrap": 0, "every": ROUNDS + 1},
        "engine": {"device": device, "workers": 1, "threads": 1, **engine},
    }
    return config.from_dict(table)


def federate(settings: config.Config, sites: int, job: Mapping[str, Any]) -> tuple[list[float], int]:
    """Seconds of every round but the first, and the most bytes held on the GPU."""
    data = {f"site{number:02d}": hospital(f"site{number:02d}", job, sites) for number in range(sites)}
    seconds: dict[int, float] = {}

    def show(event: Mapping[str, Any]) -> None:
        if event["event"] == "round":
            seconds[event["round"]] = event["seconds"]

    if settings.engine.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(settings, CLASSES, data, Path(folder), secrets_of(settings.seed, data))
        with Simulation({"run": federation}, 1) as simulation:
            pieces = assemble(settings, CLASSES)
            Coordinator(pieces, simulation.transport("run"), Path(folder), show, simulation.explain("run")).run()
    peak = torch.cuda.max_memory_allocated() if settings.engine.device == "cuda" else 0
    return [seconds[number] for number in range(2, settings.train.rounds + 1)], peak


def hospital(name: str, job: Mapping[str, Any], sites: int) -> SiteData:
    """Noise for as many steps as a round has, nothing to validate or test on."""
    count, size = job["batch"] // sites * job["steps"], job["size"]
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    texts = np.array([f"{name}-{number}" for number in range(count)])
    rows = np.arange(count)
    train = Examples(images, rows, rows % len(CLASSES), texts, texts, np.full(count, name))
    none = Examples(images, rows[:0], rows[:0], texts[:0], texts[:0], texts[:0])
    return SiteData(name, train, none, none)


def flops_of_an_image(device: str, job: Mapping[str, Any]) -> float:
    """Of the forward pass and of the gradients of what is trained."""
    model = assemble(configuration(device, job, 1, {}), CLASSES).model
    live = {name: value.to(device).requires_grad_() for name, value in model.initial(0).items()}
    images = torch.zeros(2, 3, job["size"], job["size"], device=device)
    with FlopCounterMode(display=False) as counter, autocast(device, "bfloat16"):
        model.forward(live, images).sum().backward()
    return counter.get_total_flops() / len(images)


def matrix_rate(device: str, size: int) -> float:
    """FLOP/s of the product of two bfloat16 matrices, the best of several."""
    first, second = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    rates = []
    for _ in range(8):
        wait()
        started = time.perf_counter()
        for _ in range(10):
            first @ second
        wait()
        rates.append(10 * 2 * size**3 / (time.perf_counter() - started))
    return max(rates)


def data_sheet(name: str) -> float | None:
    """Dense bfloat16 FLOP/s that the maker states, where it is known here."""
    return next((rate for known, rate in DATA_SHEET.items() if all(word in name for word in known.split())), None)


def table(found: Mapping[str, Any]) -> str:
    """Plain text."""
    lines = [
        f"{found['device']}, torch {found['versions']['torch']}, {found['FLOPs'] / 1e9:.1f} GFLOP per image",
        f"matrix product: {found['matrix product, FLOP/s'] / 1e12:.0f} TFLOP/s measured",
        f"{'':28}{'images/s':>10}{'of product':>12}{'of sheet':>10}{'peak GiB':>10}",
    ]
    for name, row in found.items():
        if isinstance(row, Mapping) and "images/s" in row:
            shares = [row["FLOP/s"] / found["matrix product, FLOP/s"]]
            shares += [row["FLOP/s"] / found["data sheet, FLOP/s"]] if found["data sheet, FLOP/s"] else []
            texts = [f"{100 * share:.1f} %" for share in shares] + ["unknown"] * (2 - len(shares))
            lines.append(
                f"{name:28}{row['images/s']:10.0f}{texts[0]:>12}{texts[1]:>10}{row['peak bytes'] / 2**30:10.1f}"
            )
    ratio = found["sites stacked, compiled"]["images/s"] / found["one site, compiled"]["images/s"]
    lines.append(f"sixteen stacked sites over one site, compiled: {ratio:.2f} of its images/s (target: at least 0.8)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
