"""torch.compile: no tuner breaks the graph, nothing is compiled anew after the first round, no compiler is said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from consilium import config, registry
from consilium.backbones import compiled, recompute
from consilium.config import HeadConfig, config_hash
from consilium.errors import ConfigError
from consilium.protocols import Declaration
from consilium.tensors import Tensors
from consilium.tuners import compose
from tests import federation, small, variants

ON = {"device": "cpu", "compile": True}


@pytest.fixture(autouse=True)
def _no_compiler_needed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The graph is captured as always, and then run operation by operation."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def _model(variant: str, make: str = "vit", fast: bool = False, again: bool = False, **options: Any) -> Any:
    backbone = small.backbone(make)
    if fast:
        compiled.by_block(backbone.module, "cpu")
    if again:
        recompute.by_block(backbone.module)
    tables = [{**table, **options} for table in variants.table(variant)]
    tuners = [registry.build("tuners", str(table.pop("name")), table) for table in tables]
    return compose.attach(backbone, tuners, HeadConfig(), 4, Declaration(), 0)


def _step(model: Any, count: int, run: Any = None) -> Tensors:
    """Outputs, and the gradient of every variable that has one."""
    live = {name: value.requires_grad_() for name, value in small.moved(dict(model.initial(0))).items()}
    torch.manual_seed(5)  # dropout
    outputs = (run or model.forward)(live, small.images(count))
    outputs.square().sum().backward()
    return {"outputs": outputs.detach(), **{n: value.grad for n, value in live.items() if value.grad is not None}}


def _assert_close(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-5, msg=name)


PLACES = [("lora", make) for make in small.MAKES] + [(each, "vit") for each in ("prompts deep", "norm + adapter + ia3")]


@pytest.mark.parametrize(("variant", "make"), PLACES)
def test_compiled_blocks_compute_the_same(variant: str, make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")  # with the gradient's graph
    plain, fast = _model(variant, make), _model(variant, make, fast=True)
    before = _graphs()
    _assert_close(_step(plain, 3), _step(fast, 3))
    assert _graphs() > before, "nothing was compiled"


@pytest.mark.parametrize("variant", [*variants.TUNERS, *variants.HYBRIDS])
def test_the_whole_forward_has_no_graph_break(variant: str) -> None:
    model = _model(variant)
    whole = torch.compile(model.forward, fullgraph=True, backend="eager")
    before = _graphs()
    _assert_close(_step(model, 3), _step(model, 3, whole))
    assert _graphs() == before + 1


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"dropout": 0.0}])
def test_compiled_blocks_may_be_recomputed(options: Mapping[str, float]) -> None:
    plain, both = _model("lora", **options), _model("lora", fast=True, again=True, **options)
    _assert_close(_step(plain, 3), _step(both, 3))


def test_blocks_share_what_was_compiled() -> None:
    model, before = _model("lora", fast=True), _graphs()
    _step(model, 4)
    first = _graphs() - before
    assert first <= 2, "one graph for the first block, whose input needs no gradient, one for all others"
    _step(_model("lora", fast=True), 4)
    assert _graphs() == before + first, "another module tree needs no other graph"
    _step(model, 3)
    _step(model, 2)
    assert _graphs() == before + first, "nor does a batch of another size"
    _step(model, 1)
    assert _graphs() <= before + 2 * first, "but for one of a single image"


@pytest.mark.parametrize("tuner", [{"name": "lora", "rank": 4}, {"name": "stochastic_block"}])
def test_no_later_round_and_no_other_site_compiles_anything(tmp_path: Path, tuner: dict[str, Any]) -> None:
    after: dict[int, int] = {}

    def show(event: Mapping[str, Any]) -> None:
        if event["event"] == "round":
            after[event["round"]] = _graphs()

    table = {"tuner": [tuner], "train": {"rounds": 6}}
    sites, start = federation.hospitals(14, 20), _graphs()
    fast = federation.run(tmp_path / "fast", federation.configure(**table, engine=ON), sites, display=show)
    plain = federation.run(tmp_path / "plain", federation.configure(**table), sites)
    _assert_close(plain.shared, fast.shared)
    assert after[1] > start
    settled = 1 if tuner["name"] == "lora" else 4  # a block that is trained for the first time is compiled once
    assert after[6] == after[settled]
    assert after[6] - start <= 16


def test_a_missing_compiler_is_said_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    with pytest.raises(ConfigError, match=r"(?s)engine\.compile.*no compiler was found"):
        federation.assemble(federation.configure(engine=ON))


def test_the_key_counts_in_the_hash_but_not_in_the_agreement() -> None:
    plain, fast = (federation.assemble(federation.configure(engine=each)) for each in ({}, ON))
    assert plain.handshake == fast.handshake
    hashes = {config_hash(each.config, each.backbone.digest, each.backbone.preprocessing) for each in (plain, fast)}
    assert len(hashes) == 2


def test_the_key_is_a_yes_or_no() -> None:
    with pytest.raises(ConfigError, match="compile"):
        config.from_dict({"engine": {"compile": "maybe"}})
