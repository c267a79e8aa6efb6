"""Composition: what stays at a site. In: an experiment. Out: names, shapes and tags of the tensors that a site keeps.

A strategy is not asked, it is tried: a site without images, at which nothing can be trained, goes through its rounds,
and what it is left with is what every site is left with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from consilium.continued import FROZEN
from consilium.data import Examples
from consilium.experiment import Experiment
from consilium.local.train import Trainer, original
from consilium.protocols import Spec, Specs, Tag, Update
from consilium.tensors import Tensors

SERVED = "served/"  # in front of tensors of the model that a last local phase leaves, and that never travels
_ROUNDS = 2  # the first and any other


def kept(experiment: Experiment, sites: Sequence[str]) -> dict[str, Spec]:
    """All that a site keeps beside its images and what also travels; nothing is trained.

    "x/variable" is as large as that variable: a model of the site's own, a control, a mixing weight of each number.
    """
    specs, declares = experiment.model.specs, experiment.strategy.declares
    found = {name: _spec(specs, name, value) for name, value in _personal(experiment, sites).items()}
    last = [name for name, spec in specs.items() if declares.finish_epochs > 0 and declares.finishes(spec.tag)]
    found |= {f"{FROZEN}/{name}": spec for name, spec in experiment.frozen.items()}
    return {**found, **{f"{SERVED}{name}": specs[name] for name in last if name not in found}}


def _personal(experiment: Experiment, sites: Sequence[str]) -> Tensors:
    strategy, specs, names = experiment.strategy, experiment.model.specs, sorted(sites)[:2]  # two are as good as many
    initial, counts = experiment.initial(0), [0] * len(experiment.task.classes)
    received = dict(strategy.send(strategy.init_server(initial, specs, names), names[0]))
    personal, found = strategy.init_site(initial, specs, names[0]), dict[str, Tensor]()
    for number in range(1, min(experiment.config.train.rounds, _ROUNDS) + 1):
        training = Trainer(experiment.setting, _no_images(), number, names[0], counts)
        personal = strategy.learn(received, personal, training).personal
        found |= personal.tensors
    return found


def at_server(experiment: Experiment, sites: Sequence[str]) -> Tensors:
    """All that the coordinator keeps beside what it sends, after two rounds of sites without images."""
    strategy, specs, names = experiment.strategy, experiment.model.specs, sorted(sites)
    initial, counts = experiment.initial(0), [0] * len(experiment.task.classes)
    server = strategy.init_server(initial, specs, names)
    received: dict[str, dict[str, Tensor]] = {site: {} for site in names}
    personal = {site: strategy.init_site(initial, specs, site) for site in names}
    for number in range(1, _ROUNDS + 1):
        updates = []
        for site in names:
            received[site] |= strategy.send(server, site)
            training = Trainer(experiment.setting, _no_images(), number, site, counts)
            learned = strategy.learn(received[site], personal[site], training)
            personal[site] = learned.personal
            updates.append(Update(site, {} if strategy.declares.once else learned.update, 1))
        server = replace(strategy.combine(server, updates, specs), round=number)
    return server.memory


def _no_images() -> Examples:
    none, text = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.str_)
    return Examples(np.zeros((0, 1, 1, 3), dtype=np.uint8), none, none, text, text, text)


def _spec(specs: Specs, name: str, value: Tensor) -> Spec:
    like = specs.get(original(name)) or Spec((), Tag("", name.strip("/")))
    alike = len(like.shape) == value.ndim  # a free dimension stays free
    return replace(like, shape=like.shape if alike else tuple(value.shape), dtype=value.dtype, factor=None)
