"""What a Flower user writes for this job: the model, its data, one epoch, one evaluation. Both apps use it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from consilium.local.augment import PRESETS, to_float


@dataclass(frozen=True)
class Split:
    """Rows of the decoded images, and their labels."""

    images: Any
    rows: np.ndarray
    labels: np.ndarray


def read_job(path: str) -> dict[str, Any]:
    """What both contestants agree on: backbone, image size, batch, rate, where the decoded images lie."""
    return dict(json.loads(Path(path).read_text()))


def build(job: dict[str, Any]) -> nn.Module:
    """A timm model with LoRA on qkv and a head of its own, everything else frozen; the same weights in every call."""
    torch.manual_seed(0)
    model = timm.create_model(job["backbone"], img_size=job["image_size"], num_classes=job["num_classes"])
    lora = LoraConfig(r=job["rank"], lora_alpha=job["rank"], target_modules=["qkv"], modules_to_save=["head"])
    return get_peft_model(model, lora)


def load_split(job: dict[str, Any], site: int, split: str) -> Split:
    """One split of a partition, from the same decoded images as the other contestant."""
    part = job["sites"][site][split]
    return Split(np.load(job["store"], mmap_mode="r"), np.array(part["rows"]), np.array(part["labels"]))


def batches(split: Split, order: Tensor, job: dict[str, Any], augmenting: torch.Generator | None) -> Iterator[Any]:
    """Batches of normalised images and labels, augmented where a generator is given."""
    mean, std = (torch.tensor(job[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for chosen in order.split(job["batch_size"] if augmenting else 128):
        images = to_float(torch.from_numpy(np.ascontiguousarray(split.images[split.rows[chosen.numpy()]])))
        if augmenting is not None:
            images = PRESETS[job["augmentation"]](images, augmenting)
        yield (images - mean) / std, torch.from_numpy(split.labels[chosen.numpy()])


def train_epoch(model: nn.Module, split: Split, job: dict[str, Any], seed: int) -> tuple[float, int, int]:
    """One local epoch with AdamW; mean loss, steps and images."""
    drawing = torch.Generator().manual_seed(seed)
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=job["learning_rate"], weight_decay=0.01)
    model.train()
    losses, images = [], 0
    for pixels, labels in batches(split, torch.randperm(len(split.rows), generator=drawing), job, drawing):
        loss = nn.functional.cross_entropy(model(pixels), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        losses.append(loss.item())
        images += len(labels)
    return sum(losses) / len(losses), len(losses), images


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, job: dict[str, Any]) -> tuple[float, float]:
    """Mean loss and accuracy."""
    model.eval()
    loss = right = 0.0
    for pixels, labels in batches(split, torch.arange(len(split.rows)), job, None):
        outputs = model(pixels)
        loss += nn.functional.cross_entropy(outputs, labels, reduction="sum").item()
        right += (outputs.argmax(1) == labels).sum().item()
    return loss / max(len(split.rows), 1), right / max(len(split.rows), 1)
