from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

from consilium import metrics, registry
from consilium.errors import ConfigError
from consilium.protocols import Task
from consilium.tasks.classification import Classification


def task(**options: object) -> Classification:
    built: Classification = registry.build("tasks", "classification", options)
    return built.with_classes(["mel", "nv", "bcc"])


def test_it_is_a_task() -> None:
    found: Task = task()
    assert (found.classes, found.num_outputs) == (("mel", "nv", "bcc"), 3)


@pytest.mark.parametrize(
    "options",
    [
        {"class_weight": "cubic"},
        {"class_counts": "hospital"},
        {"beta": 1.0},
        {"focal_gamma": -1},
        {"label_smoothing": 1.0},
        {"gamma": 2},
        {"beta": 0.9, "class_weight": "inverse"},
        {"class_counts": "federation"},
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        task(**options)


@pytest.mark.parametrize("classes", [[], ["one"], ["a", "a"], ["a", ""]])
def test_class_names_that_cannot_be_used_are_refused(classes: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"task\.classes"):
        registry.build("tasks", "classification", {}).with_classes(classes)


@pytest.mark.parametrize(
    "options",
    [
        {"class_weight": "inverse"},
        {"class_weight": "sqrt_inverse"},
        {"class_weight": "effective_number", "beta": 0.9},
        {"class_weight": "effective_number", "beta": 0.99},
        {"focal_gamma": 2.0},
        {"label_smoothing": 0.1},
    ],
)
def test_every_option_changes_the_loss(options: dict[str, object]) -> None:
    outputs, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 2, 1, 0])
    counts = [20, 200, 4]
    plain = task().loss(outputs, labels, counts)
    torch.testing.assert_close(plain, cross_entropy(outputs, labels))
    assert abs(task(**options).loss(outputs, labels, counts) - plain) > 1e-3
    known = [{"class_weight": "effective_number", "beta": 0.9}, {"class_weight": "effective_number", "beta": 0.99}]
    losses = [task(**entry).loss(outputs, labels, counts).item() for entry in known]
    assert losses[0] != losses[1]


def test_the_option_names_whose_counts_are_used() -> None:
    assert task().class_counts == "site"
    assert task(class_weight="inverse", class_counts="federation").class_counts == "federation"


def test_probabilities_are_rows_that_add_up_to_one() -> None:
    found = task().probabilities(torch.tensor([[1000.0, 0.0, -1000.0], [0.0, 0.0, 0.0]], dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3]]))


def test_it_is_measured_as_the_metrics_say() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 40)
    p = rng.dirichlet([1, 1, 1], 40)
    quick = task().validation(p, labels)
    assert quick == metrics.quick_metrics(p, labels)
    assert {"balanced_accuracy", "balanced_accuracy_declared", "macro_auroc", "accuracy", "loss"} <= quick.keys()
    columns = {f"p.{name}": p[:, i] for i, name in enumerate(task().classes)}
    frame = pd.DataFrame({"site": "a", "id": [str(i) for i in range(40)], "group": rng.integers(0, 9, 40), **columns})
    frame["label"] = labels
    tree = task().metrics(frame, bootstrap=10, seed=4, sites=["a", "b"])
    assert tree == metrics.metric_tree(frame, task().classes, bootstrap=10, seed=4, sites=["b"])
    assert tree["accuracy"]["pooled"]["value"] == quick["accuracy"]
