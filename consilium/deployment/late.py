"""Composition: replies that come after their round. In: an agreement. Out: whether they may count in the next one.

A late reply holds tensors that were trained from what the round before began with. It may enter the sum of the next
round where that sum is a mean of tensors and nothing else: no term of it is a step from what was sent in that very
round, none is looked at beside the others, and every round sums the same tensors. The reply weighs what it would have
weighed in time, and only the round directly before counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from consilium.config import Config
from consilium.config_engine import EngineConfig
from consilium.coordinator import drawn_sites
from consilium.errors import ConfigError
from consilium.experiment import Experiment, assemble
from consilium.strategies.fedavg import Averaging

NEXT_ROUND = "next_round"


def check(config: Config, sites: tuple[str, ...], path: Path) -> None:
    """ConfigError where late replies cannot count in the next round. Weights are not looked at: only shapes matter."""
    where, train = f"deployment.late in {path}", config.train
    asked = len(drawn_sites(train.participation, sites, config.draws, 1))
    if train.rounds < 2 or math.ceil(train.quorum * asked - 1e-9) >= asked:
        remedy = 'late = "drop", or several rounds and a train.quorum below 1'
        received = f"{train.rounds} rounds, a quorum of {train.quorum:g} of {asked}"
        raise ConfigError("no round is closed without a late site", where=where, received=received, remedy=remedy)
    backbone = config.backbone.model_copy(update={"weights": "random"})
    like = config.model_copy(update={"backbone": backbone, "engine": EngineConfig(device="cpu")})
    why = next(reasons(assemble(like, config.task.classes or ()), sites), None)
    if why is not None:
        remedy = 'late = "drop", or a method whose rounds are plain means of the same tensors, such as fedavg or fedper'
        received = f"strategy {config.strategy.name}, tuner {', '.join(table.name for table in config.tuner)}"
        what = f"a late reply cannot count in the next round: {why}"
        raise ConfigError(what, where=where, received=received, remedy=remedy)


def reasons(pieces: Experiment, sites: tuple[str, ...]) -> Iterator[str]:
    """Why the sum of a round is not one into which a reply to the round before may enter; nothing where it is."""
    strategy, declares, rounds = pieces.strategy, pieces.strategy.declares, range(1, pieces.config.train.rounds + 1)
    if declares.once:
        yield "sites send once, in the last round"
    if declares.changes_base:
        yield "the frozen base changes from round to round"
    if declares.restarts_factors or declares.prunes:
        yield "factors come back in another basis or at another rank"
    if declares.needs_individual_updates or declares.largest_update is not None:
        yield "the coordinator looks at each update beside what was sent in its round"
    if any(spec.tag.slot != "parameter" for spec in pieces.up(1).values()):
        yield "more than trained parameters is sent, which speaks of one round alone"
    if not _is_mean(strategy):
        yield "the coordinator does more than form the mean of what sites send"
    if pieces.codec.width is not None:
        yield "a codec sends steps from what the site was sent in its round"
    sent = {site: pieces.sent(1, site).keys() for site in sites}
    if not any(sent.values()):
        yield "nothing is sent"
    if any(pieces.sent(number, site).keys() != sent[site] for number in rounds for site in sites):
        yield "other tensors are sent in other rounds"


def _is_mean(strategy: object) -> bool:
    """Whether the next shared tensors are the weighted mean, tensor by tensor, by the one function that forms it."""
    if not isinstance(strategy, Averaging) or type(strategy).combine is not Averaging.combine:
        return False
    return strategy.server is None and strategy.aggregate.kind == "mean"
