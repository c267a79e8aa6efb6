"""What a GPU needs of a step, seen on a CPU: the program never waits for the device, attention and optimiser are fused.

The `meta` device stands for a GPU: like one it holds no tensor that the program could read. A dispatch mode sees every
read of a number and every copy, and whether it waits.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from consilium import config, registry
from consilium.experiment import own_copy
from consilium.local import predict, train
from consilium.local.augment import PRESETS
from consilium.local.train import Trainer
from consilium.protocols import Personal
from consilium.tasks.losses import class_weights, class_weights_on
from consilium.tensors import onto
from tests import federation, variants

EXAMPLES = federation.examples("a", 24, 0)


class Waits(TorchDispatchMode):
    """Counts what makes a program wait for the device `meta`, and the attention kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        name, kwargs = func.__name__.split(".")[0], dict(kwargs or {})
        self.seen["operation"] += 1
        self.seen["fused attention"] += "scaled_dot_product" in name
        device = args[0].device.type if args and isinstance(args[0], Tensor) else "cpu"
        if name == "_local_scalar_dense" and device == "meta":
            self.seen["read"] += 1
            return 0.0
        if name == "is_nonzero" and device == "meta":
            self.seen["read"] += 1
            return True
        target = torch.device(kwargs.get("device") or device).type
        if name in ("_to_copy", "to") and device != target:
            self.seen["copy"] += not kwargs.get("non_blocking")
            if device == "meta":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and {device, args[1].device.type} == {"cpu", "meta"}:
            self.seen["copy"] += not (len(args) > 2 and args[2])
        return func(*args, **kwargs)


class Numbers(TorchFunctionMode):
    """Counts tensors that are made of Python's numbers, which is a copy that waits, on another device than the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self.made += func is torch.tensor and str((kwargs or {}).get("device", "cpu")) != "cpu"
        return func(*args, **(kwargs or {}))


def _setting(monkeypatch: pytest.MonkeyPatch, strategy: str, **keys: Any) -> Any:
    """A run's pieces on the device `meta`, made the way a GPU's are."""
    pieces = federation.assemble(variants.settings(strategy, **keys))
    elsewhere = own_copy(pieces.backbone)
    module = copy.deepcopy(elsewhere.module).to("meta")
    model = replace(pieces.model, backbone=replace(elsewhere, module=module))
    model = replace(model, head_start={name: value.to("meta") for name, value in pieces.model.head_start.items()})
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know `meta`
    return replace(pieces, model=model, setting=replace(pieces.setting, model=model, device="meta"))


def _waits(pieces: Any, steps: int) -> Counter[str]:
    """What one site's round waits for."""
    settings = pieces.config.train.model_copy(update={"local_steps": steps, "local_epochs": None})
    trainer = Trainer(replace(pieces.setting, config=settings), EXAMPLES, 1, "a", [8, 8, 8], {})
    initial, strategy = pieces.initial(3), pieces.strategy
    personal = strategy.init_site(initial, pieces.model.specs, "a")
    received = strategy.send(strategy.init_server(initial, pieces.model.specs, ["a", "b"]), "a")
    with Waits() as waits, Numbers() as numbers:
        learned = strategy.learn(received, personal, trainer)
    assert isinstance(learned.personal, Personal)
    assert learned.num_steps >= steps
    return waits.seen + Counter({"copy": numbers.made})


OPTIONS = [
    {"train": {"augmentation": "dermoscopy"}},
    {"train": {"augmentation": "radiograph", "accumulate": 2}},
    {"task": {"class_weight": "sqrt_inverse"}, "train": {"optimizer": "sgd", "learning_rate": 0.1}},
    {"tuner": [{"name": "lora", "rank": 2, "dora": True}, {"name": "prompts"}]},
]


TRAINING = [name for name in variants.FEDERATED if registry.build("strategies", name, {}).declares.passes(1)]
CASES = [*((name, OPTIONS[0]) for name in TRAINING), *(("fedavg", keys) for keys in OPTIONS[1:])]


@pytest.mark.parametrize(("name", "keys"), CASES)
def test_no_step_waits_for_the_device(name: str, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = _setting(monkeypatch, name, **keys)
    few, many = _waits(pieces, 2), _waits(pieces, 5)
    assert few["operation"] < many["operation"]
    assert many["read"] <= few["read"]
    assert many["copy"] <= few["copy"]


def test_the_spy_sees_what_waits() -> None:
    with Waits() as waits:
        far = torch.ones(2, device="meta")
        float(far.sum())
        torch.ones(2).to("meta")
        onto("meta", torch.ones(2))
        far.copy_(torch.ones(2))
    assert (waits.seen["read"], waits.seen["copy"]) == (1, 2)


def test_a_split_is_evaluated_with_one_wait_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = _setting(monkeypatch, "fedavg")
    counts = []
    for size in (24, 6):
        monkeypatch.setattr(predict, "BATCH_SIZE", size)
        with Waits() as waits:
            found = predict.outputs(
                pieces.model, pieces.model.initial(0), EXAMPLES, pieces.setting.preprocessing, "meta", "float32"
            )
        assert found.shape == (24, 3)
        counts.append(waits.seen["read"] + waits.seen["copy"])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("variant", [*variants.TUNERS, *variants.HYBRIDS])
def test_no_tuner_takes_a_block_off_the_fused_attention(variant: str) -> None:
    model = federation.assemble(federation.configure(tuner=variants.table(variant))).model
    with Waits() as waits:
        model.forward(model.initial(0), torch.zeros(2, 3, federation.SIZE, federation.SIZE))
    assert waits.seen["fused attention"] == model.backbone.num_blocks


# ------------------------------------------------------------------------------------------------ the fused optimiser
@pytest.mark.parametrize(
    "keys", [{}, {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1}, {"clip_norm": 0.05, "weight_decay": 0.2}]
)
def test_the_fused_optimiser_is_the_other_up_to_rounding(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = federation.assemble(federation.configure(train={**keys, "moments": "keep", "learning_rate": 0.01}))
    results = []
    for fused in (False, True):
        monkeypatch.setattr(train, "_fuses", lambda _, fused=fused: fused)
        moments: dict[str, Tensor] = {}
        variables = pieces.model.initial(3)
        for number in (1, 2):  # the second goes on with the moments of the first
            trainer = Trainer(pieces.setting, EXAMPLES, number, "a", [8, 8, 8], moments)
            variables = trainer.fit(variables).variables
        assert all(value.device.type == "cpu" for value in moments.values())
        results.append({**variables, **moments})
    first, second = results
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_cpu_keeps_its_bits() -> None:
    assert not train._fuses(torch.device("cpu"))
    assert train._fuses(torch.device("cuda:1"))


# ------------------------------------------------------------------------------------------------ constants, copies
def test_constants_made_while_evaluating_serve_training() -> None:
    pieces = federation.assemble(federation.configure(train={"learning_rate": 0.01}))
    with torch.inference_mode():
        class_weights_on(torch.device("cpu"), "inverse", (3, 4, 5), 0.5)
        PRESETS["none"](torch.zeros(1, 3, 8, 8), torch.Generator())
    weights = class_weights_on(torch.device("cpu"), "inverse", (3, 4, 5), 0.5)
    assert not weights.is_inference()
    assert torch.equal(weights, class_weights("inverse", (3, 4, 5), 0.5))
    assert pieces.setting.device == "cpu"


def test_rows_are_read_in_the_order_asked_for() -> None:
    some = replace(EXAMPLES, rows=EXAMPLES.rows[::-1].copy())
    rows = some.rows[[3, 3, 0]]
    assert (predict.read(some, rows, "cpu").numpy() == EXAMPLES.images[rows]).all()
    assert predict.read(some, rows[:0], "cpu").shape == (0, *EXAMPLES.images.shape[1:])


def test_a_device_of_its_own_number_is_understood() -> None:
    assert config.from_dict({"engine": {"device": "cuda:1"}}).engine.device == "cuda:1"
