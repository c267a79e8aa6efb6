"""Awkward tuners and strategies, each in 60 lines at most, written to bend `protocols.py` before it settles.

They run through the real round loop in test_odd_members.py. Where one did not fit, the protocol changed and not the
member: docs/decisions/0007-protocols-after-odd-members.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from consilium import seeds
from consilium.data import Batch
from consilium.protocols import (
    Attached,
    Backbone,
    Combination,
    Declaration,
    Learned,
    LocalTraining,
    Part,
    Personal,
    Selector,
    ServerState,
    Slot,
    Spec,
    Specs,
    Tag,
    Update,
)
from consilium.strategies.fedavg import FedAvg
from consilium.tensors import Tensors, detach, map_tensors, select, under, weighted_mean, within
from consilium.tuners import base


def slotted(prefix: str, specs: Specs, slot: Slot) -> dict[str, Spec]:
    return {f"{prefix}/{n}": replace(spec, tag=replace(spec.tag, slot=slot)) for n, spec in specs.items()}


@dataclass(frozen=True)
class StochasticBlock:
    """The attention of one block per round (arXiv 2407.11573), each once before any comes again; or one per site."""

    per_site: bool = False

    def attach(self, backbone: Backbone, parts: Sequence[Part], combination: Combination) -> Attached:
        part = base.only_part("stochastic_block", parts, combination)
        own = {n: p for n, p in base.parameters(backbone.module).items() if ".attn." in n}
        specs = {n: Spec(tuple(p.shape), base.tag(backbone, n, part.name)) for n, p in own.items()}
        return Attached(specs, lambda _: detach(own), {"attention": 1e-3, "norm": 1e-3})

    def active(self, specs: Specs, round: int, site: str, seed: int) -> Selector:
        blocks = sorted({spec.tag.block for spec in specs.values() if spec.tag.block is not None})
        cycle, at = divmod(round - 1, len(blocks))
        draw = seeds.generator(seed, round=cycle, site=site if self.per_site else "", purpose="stochastic block")
        chosen = blocks[int(torch.randperm(len(blocks), generator=draw)[at])]
        return lambda tag: tag.block == chosen

    def merge(self, backbone: Backbone, variables: Tensors) -> None:
        base.replace(backbone.module, select(variables, variables.keys() & base.parameters(backbone.module).keys()))


@dataclass(frozen=True)
class Scaffold:
    """Karimireddy et al., ICML 2020, arXiv 1910.06378, option II, uniform. c_i -> personal, c -> shared "c/"."""

    declares: ClassVar[Declaration] = Declaration(plain_sgd=True)

    def up(self, specs: Specs, round: int) -> Specs:  # noqa: ARG002
        return {**specs, **slotted("change", specs, "control")}

    def down(self, specs: Specs, round: int) -> Specs:  # noqa: ARG002
        return {**specs, **slotted("c", specs, "control")}

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:  # noqa: ARG002
        return ServerState(0, tuple(sites), {**initial, **under("c", map_tensors(torch.zeros_like, initial))})

    def send(self, server: ServerState, site: str) -> Tensors:  # noqa: ARG002
        return server.shared

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:  # noqa: ARG002
        return Personal(map_tensors(torch.zeros_like, initial))

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        x, c, own = select(received, training.specs), within("c", received), personal.tensors
        drift = under("drift", map_tensors(torch.sub, c, own))

        def objective(variables: Tensors, batch: Batch, generator: Generator) -> Tensor:  # noqa: ARG001
            linear = [(variables[f"drift/{name}"] * variables[name]).sum() for name in x]
            return training.loss(select(variables, x), batch) + torch.stack(linear).sum()

        fitted = training.fit(x, objective=objective, fixed=drift)
        # c_i <- c_i - c + (x - y) / (K lr)
        way = {name: (x[name] - fitted.variables[name]) / fitted.step_lengths[name] for name in x}
        change = map_tensors(torch.sub, way, c)
        update = {**fitted.variables, **under("change", change)}
        kept = Personal(map_tensors(torch.add, own, change))
        return Learned(update, kept, fitted.loss, fitted.num_steps, fitted.image_passes)

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:  # noqa: ARG002
        terms = [(1, update.tensors) for update in updates]
        mean = weighted_mean(terms)
        share, change = len(terms) / len(server.sites), within("change", mean)
        c = map_tensors(lambda old, new: old + share * new, within("c", server.shared), change)
        return replace(server, shared={**select(mean, change), **under("c", c)})

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:  # noqa: ARG002
        model = {n: v for n, v in received.items() if not n.startswith(("c/", "change/"))}
        return {"personal": model, "global": model}


@dataclass(frozen=True)
class Flora:
    """Wang et al., NeurIPS 2024, arXiv 2409.05976: factors are stacked, not averaged, and folded into every base.

    W' = W + s sum_k p_k B_k A_k = W + B A, with A = [s p_k A_k] and B = [B_k] sent to every site; factors start anew.
    """

    declares: ClassVar[Declaration] = Declaration(changes_base=True, needs_individual_updates=True)

    def up(self, specs: Specs, round: int) -> Specs:  # noqa: ARG002
        return specs

    def down(self, specs: Specs, round: int) -> Specs:
        found = {name: spec for name, spec in specs.items() if spec.tag.role == "head"}
        for name, spec in specs.items() - found.items():
            shape = (None, spec.shape[1]) if spec.tag.role == "lora_a" else (spec.shape[0], None)
            stack = replace(spec, shape=shape, tag=replace(spec.tag, slot="base"))
            found |= {f"stack-{number:03d}/{name}": stack for number in range(1, round + 1)}
        return found

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:
        scales = {n: torch.tensor(spec.scale) for n, spec in specs.items() if spec.tag.role == "lora_a"}
        return ServerState(0, tuple(sites), select(initial, self.down(specs, 0)), scales)

    def send(self, server: ServerState, site: str) -> Tensors:  # noqa: ARG002
        return server.shared

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:  # noqa: ARG002
        factors = {name: spec.tag.module for name, spec in specs.items() if spec.tag.role in ("lora_a", "lora_b")}
        weights = select(initial, {f"{module}.weight" for module in factors.values()})
        return Personal({**under("weight", weights), **under("start", select(initial, factors))})

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        head = {n: v for n, v in received.items() if not n.startswith("stack-")}
        start = {**head, **within("start", personal.tensors)}
        fitted = training.fit(start, fixed=self.base(received, personal))
        return Learned(fitted.variables, personal, fitted.loss, fitted.num_steps, fitted.image_passes)

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:  # noqa: ARG002
        updates = list(updates)
        total = sum(update.num_examples for update in updates)
        stacks: dict[str, Tensor] = {}
        for a, scale in server.memory.items():
            b = a.removesuffix("a") + "b"
            stacks[a] = torch.cat([u.tensors[a] * (scale * u.num_examples / total) for u in updates], 0)
            stacks[b] = torch.cat([u.tensors[b] for u in updates], 1)
        heads = [(u.num_examples, {n: v for n, v in u.tensors.items() if n not in stacks}) for u in updates]
        news = {**weighted_mean(heads), **under(f"stack-{server.round + 1:03d}", stacks)}
        return replace(server, shared={**server.shared, **news})

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:
        own = {n: v for n, v in received.items() if not n.startswith("stack-")}
        return {"personal": {**own, **self.base(received, personal)}}

    def base(self, received: Tensors, personal: Personal) -> Tensors:
        total = {name: value.double() for name, value in within("weight", personal.tensors).items()}
        for name in sorted(n for n in received if n.startswith("stack-") and n.endswith(".a")):
            weight = name.split("/")[1].split(".lora.")[0] + ".weight"
            total[weight] += received[name.removesuffix("a") + "b"].double() @ received[name].double()
        return {name: value.float() for name, value in total.items()}


def routed_dual_adapter() -> FedAvg:
    """A shared and a personal adapter with a token router, as in FedALT and Med-DualLoRA; part and router stay."""
    parts = (Part("common"), Part("own", personal=True))
    return FedAvg(declares=Declaration(parts, combination="router", required_roles=frozenset({"router", "lora_a"})))


@dataclass(frozen=True)
class OneShotMixture:
    """Class-conditional Gaussians of the features, sent once; the head is the discriminant that they form.

    Sums add up over sites, so the server needs no single update: head = pooled data's linear discriminant.
    """

    ridge: float = 0.1
    declares: ClassVar[Declaration] = Declaration(required_roles=frozenset({"head"}))

    def up(self, specs: Specs, round: int) -> Specs:  # noqa: ARG002
        classes, width = specs["head.weight"].shape
        tag = Tag("head", "statistic", slot="statistic")
        shapes = {"count": (classes,), "sum": (classes, width), "square": (width, width)}
        return {name: Spec(shape, tag, torch.float64) for name, shape in shapes.items()}

    def down(self, specs: Specs, round: int) -> Specs:  # noqa: ARG002
        return {name: spec for name, spec in specs.items() if spec.tag.role == "head"}

    def init_server(self, initial: Tensors, specs: Specs, sites: Sequence[str]) -> ServerState:  # noqa: ARG002
        return ServerState(0, tuple(sites), dict(initial))

    def send(self, server: ServerState, site: str) -> Tensors:  # noqa: ARG002
        return server.shared

    def init_site(self, initial: Tensors, specs: Specs, site: str) -> Personal:  # noqa: ARG002
        return Personal()

    def learn(self, received: Tensors, personal: Personal, training: LocalTraining) -> Learned:
        if personal.tensors:
            return Learned({}, personal, math.nan, 0, 0)
        features, labels = training.features(received)
        one_hot = torch.nn.functional.one_hot(labels, len(training.class_counts)).double()
        x = features.double()
        sums = {"count": one_hot.sum(0), "sum": one_hot.T @ x, "square": x.T @ x}
        return Learned(sums, Personal({"sent": torch.ones(1)}), math.nan, 0, training.num_examples)

    def combine(self, server: ServerState, updates: Iterable[Update], specs: Specs) -> ServerState:  # noqa: ARG002
        known = [server.memory, *(update.tensors for update in updates)]
        total = {name: torch.stack([t[name] for t in known if t]).sum(0) for name in ("count", "sum", "square")}
        count, means = total["count"], total["sum"] / total["count"].clamp_min(1)[:, None]
        scatter = total["square"] - (means * count[:, None]).T @ means
        covariance = scatter / count.sum() + self.ridge * torch.eye(len(scatter), dtype=torch.float64)
        weight = torch.linalg.solve(covariance, means.T).T
        bias = ((count + 1) / (count.sum() + len(count))).log() - (weight * means).sum(1) / 2
        return replace(server, shared={"head.weight": weight.float(), "head.bias": bias.float()}, memory=total)

    def deploy(self, received: Tensors, personal: Personal) -> Mapping[str, Tensors]:  # noqa: ARG002
        model = {name: value for name, value in received.items() if name.startswith("head.")}
        return {"personal": model, "global": model}
