"""The limit: plain loops that train one model, with no federation around them. In: a job. Out: seconds per epoch.

No hidden help: a module with parameters, a batch, a loss, AdamW with clipping. Two variants of the same job: our
adapters hung into a timm model and called as any module is, and timm with the `peft` library.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import job
from consilium.data import Examples, Preprocessing, SiteData
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


class Copies:
    """As the common research libraries do: every client holds a deep copy of the whole model for the whole run."""

    def __init__(self, sites: Mapping[str, SiteData], num_classes: int, preprocessing: Preprocessing) -> None:
        self.sites, self.preprocessing = sites, preprocessing
        self.server: Any = with_peft(num_classes, preprocessing).forward
        self.clients: dict[str, Any] = {name: copy.deepcopy(self.server) for name in sites}
        self.parameters = sum(each.numel() for each in self.server.parameters() if each.requires_grad)
        self.images: list[int] = []
        self.losses: list[float] = []

    def round(self) -> float:
        """Seconds of a round: copy to every client, validate, train, validate, average all weights."""
        started = time.perf_counter()
        losses = []
        for name, site in self.sites.items():
            model = self.clients[name]
            for mine, theirs in zip(model.parameters(), self.server.parameters(), strict=True):
                mine.data = theirs.data.clone()
            self._validate(model, site.val)
            trained = [each for each in model.parameters() if each.requires_grad]
            losses.append(Plain(model, trained, self.preprocessing).epoch(site.train)[1])
            self._validate(model, site.val)
        self._average()
        self.images.append(sum(len(site.train) for site in self.sites.values()))
        self.losses.append(sum(losses) / len(losses))
        return time.perf_counter() - started

    @torch.inference_mode()
    def _validate(self, model: Any, examples: Examples) -> None:
        if len(examples):
            pixels = torch.from_numpy(np.ascontiguousarray(examples.images[examples.rows]))
            mean, std = (
                torch.tensor(each).view(1, 3, 1, 1) for each in (self.preprocessing.mean, self.preprocessing.std)
            )
            model((to_float(pixels) - mean) / std)

    def _average(self) -> None:
        for target in self.server.parameters():
            target.data = torch.zeros_like(target.data)
        for client in self.clients.values():
            for target, value in zip(self.server.parameters(), client.parameters(), strict=True):
                target.data += value.data.clone() / len(self.clients)
