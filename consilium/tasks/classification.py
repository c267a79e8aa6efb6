"""Stage 5, task. In: head outputs and labels. Out: loss, probabilities and metrics of one of C classes per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from consilium import metrics, registry
from consilium.data import IntArray
from consilium.errors import ConfigError
from consilium.tasks.losses import ClassWeight, class_weights_on, weighted_loss


class ClassificationOptions(registry.Options):
    """Keys of `[task]` with name = "classification", beside `classes`."""

    class_weight: ClassWeight = "none"
    class_counts: Literal["site", "federation"] = "site"  # whose training counts the weights are made of
    beta: float = Field(default=0.999, ge=0, lt=1)  # effective_number only
    focal_gamma: float = Field(default=0.0, ge=0)  # 0: cross-entropy
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _effective(self) -> ClassificationOptions:
        if self.class_weight != "effective_number" and self.beta != 0.999:
            raise ValueError("beta has an effect with class_weight = 'effective_number' only")
        if self.class_weight == "none" and self.class_counts != "site":
            raise ValueError("class_counts has no effect with class_weight = 'none'")
        return self


@registry.register(
    "tasks",
    "classification",
    options=ClassificationOptions,
    summary="one of C classes per image; weighted cross-entropy or focal loss",
    source="Lin et al., ICCV 2017 (focal loss); Cui et al., CVPR 2019 (effective number)",
)
def _build(options: ClassificationOptions) -> Classification:
    return Classification(options)


@dataclass(frozen=True)
class Classification:
    """One of C classes per image. `classes` is empty until the data are known: see `with_classes`."""

    options: ClassificationOptions
    classes: tuple[str, ...] = ()

    def with_classes(self, classes: Sequence[str]) -> Classification:
        """The same task with its class names, in the order of the labels; ConfigError unless two or more, distinct."""
        names = tuple(classes)
        if len(names) < 2 or len(set(names)) < len(names) or not all(names):
            allowed = "two or more distinct, non-empty names"
            raise ConfigError("these class names cannot be used", where="task.classes", allowed=allowed, received=names)
        return Classification(self.options, names)

    @property
    def num_outputs(self) -> int:
        """Outputs of the head: one per class."""
        return len(self.classes)

    @property
    def class_counts(self) -> Literal["site", "federation"]:
        """Whose training counts `loss` should be given."""
        return self.options.class_counts

    def loss(self, outputs: Tensor, labels: Tensor, class_counts: Sequence[int]) -> Tensor:
        """Mean loss of a batch; outputs [B, C], labels int64 [B], class_counts [C]."""
        options = self.options
        weights = class_weights_on(outputs.device, options.class_weight, tuple(class_counts), options.beta)
        gamma, smoothing = options.focal_gamma, options.label_smoothing
        return weighted_loss(outputs, labels, weights, focal_gamma=gamma, label_smoothing=smoothing)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Softmax of outputs [n, C], float32."""
        return torch.softmax(outputs.to(torch.float32), dim=1)

    def validation(self, probabilities: npt.ArrayLike, labels: IntArray) -> Mapping[str, float]:
        """Metrics without intervals of probabilities [n, C] and labels [n]; NaN where undefined."""
        return metrics.quick_metrics(np.asarray(probabilities, dtype=np.float64), labels)

    def metrics(
        self, predictions: Any, bootstrap: int = 1000, seed: int = 0, sites: Sequence[str] = ()
    ) -> metrics.MetricTree:
        """The metric tree of one split and model; `bootstrap` replicates of the sites' groups, drawn from `seed`."""
        return metrics.metric_tree(predictions, self.classes, bootstrap=bootstrap, seed=seed, sites=sites)
