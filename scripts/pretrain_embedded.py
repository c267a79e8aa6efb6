"""Pre-trains the embedded backbone. In: a recipe. Out: `embedded.safetensors` and `card.json`.

    python scripts/pretrain_embedded.py consilium/backbones/embedded

A small ViT learns to name what it sees in drawn scenes (`pretraining_images.py`): figure, filling, ground, colours,
count, size, edge, direction, scale, contrast. The heads are thrown away. CPU only; every number comes from the recipe,
and equal recipes on equal machines give equal bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pretraining_images as images
import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

ARCHITECTURE = {"img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 0}
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights."""

    seed: int = 0
    num_steps: int = 3400
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    num_threads: int = 2


def _normalised(pixels: Any) -> Tensor:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def _batch(recipe: Recipe, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    pixels, labels = images.draw(recipe.seed, step, recipe.batch_size, ARCHITECTURE["img_size"])
    return _normalised(pixels), {task: torch.from_numpy(label) for task, label in labels.items()}


def _loss(outputs: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """Mean over the tasks of the cross entropy, each relative to guessing (so 1 is chance)."""
    pieces = outputs.split(list(images.TASKS.values()), dim=1)
    losses = [
        nn.functional.cross_entropy(piece, labels[task], ignore_index=images.UNKNOWN) / math.log(number)
        for piece, (task, number) in zip(pieces, images.TASKS.items(), strict=True)
    ]
    return torch.stack(losses).mean()


def _rate(recipe: Recipe, step: int) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    left = (step - recipe.warmup_steps) / max(1, recipe.num_steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * left))


def _optimiser(recipe: Recipe, model: nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def pretrain(recipe: Recipe, report: Callable[[int, float], None]) -> dict[str, Tensor]:
    """The backbone's weights after the recipe, without heads; `report(step, loss)` hears every step."""
    torch.set_num_threads(recipe.num_threads)
    torch.manual_seed(recipe.seed)
    backbone = VisionTransformer(**ARCHITECTURE)
    model = nn.Sequential(backbone, nn.Linear(ARCHITECTURE["embed_dim"], sum(images.TASKS.values())))
    optimiser = _optimiser(recipe, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(recipe, step))
    for step in range(recipe.num_steps):
        pixels, labels = _batch(recipe, step)
        loss = _loss(model(pixels), labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimiser.step()
        schedule.step()
        report(step, loss.item())
    return {name: tensor.half().contiguous() for name, tensor in sorted(backbone.state_dict().items())}


def card(recipe: Recipe, data: bytes, losses: list[float], seconds: float) -> dict[str, Any]:
    """What the file is, how it was made and how it wants its images."""
    return {
        "name": "embedded",
        "description": "A small ViT, pre-trained on drawn scenes, no photograph; for the quick start and for tests.",
        "architecture": ARCHITECTURE,
        "preprocessing": {
            "image_size": ARCHITECTURE["img_size"],
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "crop_fraction": 1.0,
            "crop_mode": "center",
        },
        "sha256": hashlib.sha256(data).hexdigest(),
        "num_bytes": len(data),
        "stored_dtype": "float16",
        "licence": "Apache-2.0",
        "recipe": {**asdict(recipe), "optimizer": "adamw", "betas": [0.9, 0.98], "schedule": "linear warm-up, cosine"},
        "tasks": images.TASKS,
        "script": "scripts/pretrain_embedded.py",
        "torch": torch.__version__,
        "loss": {"first": round(losses[0], 4), "last_100_steps": round(sum(losses[-100:]) / len(losses[-100:]), 4)},
        "seconds": round(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where embedded.safetensors and card.json are written")
    parser.add_argument("--num-steps", type=int, default=Recipe.num_steps)
    arguments = parser.parse_args()
    losses: list[float] = []

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if step % 100 == 0:
            print(f"step {step}  loss {loss:.4f}  {time.monotonic() - start:.0f} s", flush=True)

    start = time.monotonic()
    recipe = Recipe(num_steps=arguments.num_steps)
    data = save(pretrain(recipe, report), metadata={"licence": "Apache-2.0"})
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "embedded.safetensors").write_bytes(data)
    text = json.dumps(card(recipe, data, losses, time.monotonic() - start), indent=2)
    (arguments.folder / "card.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
