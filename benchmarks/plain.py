"""The limit: plain loops that train one model, with no federation around them. In: a job. Out: seconds per epoch.

No hidden help: a module with parameters, a batch, a loss, AdamW with clipping. Two variants of the same job: our
adapters hung into a timm model and called as any module is, and timm with the `peft` library.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import job
from consilium.data import Examples, Preprocessing
from consilium.experiment import assemble
from consilium.local.augment import PRESETS, to_float

Forward = Callable[[Tensor], Tensor]


@dataclass
class Plain:
    """A model, what of it is trained, and the optimiser."""

    forward: Forward
    trained: list[Tensor]
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.trained, lr=job.RATE, weight_decay=0.01)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step; the loss."""
        loss = nn.functional.cross_entropy(self.forward(images), labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.detach()

    def epoch(self, examples: Examples, seed: int = 0) -> tuple[float, float, int]:
        """Seconds, mean loss and images of one pass with augmentation."""
        started = time.perf_counter()
        losses = [self.step(*batch) for batch in batches(examples, self.preprocessing, seed)]
        loss = float(torch.stack(losses).mean())
        return time.perf_counter() - started, loss, len(examples)


def batches(examples: Examples, preprocessing: Preprocessing, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented and normalised batches of one epoch, from the decoded images."""
    drawing = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    for chosen in torch.randperm(len(examples), generator=drawing).split(job.BATCH):
        rows = examples.rows[chosen.numpy()]
        images = PRESETS["dermoscopy"](to_float(torch.from_numpy(np.ascontiguousarray(examples.images[rows]))), drawing)
        yield (images - mean) / std, torch.from_numpy(examples.labels[chosen.numpy()])


def ours(settings: Any, classes: tuple[str, ...]) -> Plain:
    """timm with our adapters: their values are parameters of the module itself, no function is made of it."""
    experiment = assemble(settings, classes)
    module, initial = experiment.backbone.module, experiment.model.initial(0)
    trained: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if name in initial:
            parameter.data = initial[name].clone()
            trained.append(parameter.requires_grad_())
    head = nn.Linear(experiment.backbone.num_features, len(classes))
    return Plain(nn.Sequential(module, head), [*trained, *head.parameters()], experiment.backbone.preprocessing)


def with_peft(num_classes: int, preprocessing: Preprocessing) -> Plain:
    """timm with the `peft` library."""
    import timm
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=job.RANK, lora_alpha=job.RANK, target_modules=["qkv"], modules_to_save=["head"])
    model = get_peft_model(timm.create_model(job.BACKBONE, img_size=job.SIZE, num_classes=num_classes), lora)
    return Plain(model, [each for each in model.parameters() if each.requires_grad], preprocessing)


def deep_copies(sites: dict[str, Examples], num_classes: int, preprocessing: Preprocessing) -> Callable[[], float]:
    """As the common research libraries do: every client holds a deep copy of the whole model for the whole run."""
    import copy

    server = with_peft(num_classes, preprocessing)
    clients = {name: copy.deepcopy(server.forward) for name in sites}

    def one_round() -> float:
        started = time.perf_counter()
        for name, examples in sites.items():
            model: Any = clients[name]
            for mine, theirs in zip(model.parameters(), server.forward.parameters(), strict=True):  # type: ignore[attr-defined]
                mine.data = theirs.data.clone()
            Plain(model, [each for each in model.parameters() if each.requires_grad], preprocessing).epoch(examples)
        _average(server.forward, list(clients.values()))
        return time.perf_counter() - started

    return one_round


def _average(server: Any, clients: list[Any]) -> None:
    for target in server.parameters():
        target.data = torch.zeros_like(target.data)
    for client in clients:
        for target, value in zip(server.parameters(), client.parameters(), strict=True):
            target.data += value.data.clone() / len(clients)
