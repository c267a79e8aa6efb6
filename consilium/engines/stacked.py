"""Engine: sites that train as one batch. In: an experiment, requests for rounds. Out: how many go together; replies.

A group is answered by one worker. Which sites make a group depends on their names and on the configuration alone, never
on workers, because a sum over more rows may have other last bits. docs/decisions/0015-stacked-sites.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from consilium.config import Config
from consilium.coordinator import drawn_sites
from consilium.engines.site import Site
from consilium.errors import ConfigError, WireError
from consilium.experiment import Experiment
from consilium.local.seats import Seat, Table, together
from consilium.messages import open_message
from consilium.protocols import Backbone
from consilium.tuners.tokens import num_inserted

# What "auto" goes by, on a processor: measured in the record above.
MOST_IMAGES, MOST_ROWS = 4, 160  # of one site's batch (rows: images times tokens); more is as fast by itself
SMALLEST, LARGEST = 4, 8  # sites: fewer gain nothing, and a group holds the activations of all its sites
GROUPS = 4  # that are left at least, so that as many workers have something to do


def resolved(experiment: Experiment, num_sites: int) -> Experiment:
    """The same experiment with a number in `engine.stacked_sites`, which the configuration's hash covers; never more
    than a round draws.

    ConfigError for a number that a tuner or the strategy does not allow.
    """
    config = experiment.config
    wanted, reason = config.engine.stacked_sites, experiment.never_stacked
    if wanted not in ("auto", 1) and reason:
        remedy = "leave engine.stacked_sites out"
        raise ConfigError(reason, where="engine.stacked_sites", allowed=1, received=wanted, remedy=remedy)
    drawn = len(drawn_sites(config.train.participation, [str(number) for number in range(num_sites)], 0, 1))
    number = _worthwhile(experiment, num_sites) if wanted == "auto" else min(wanted, max(drawn, 1))
    engine = config.engine.model_copy(update={"stacked_sites": number})
    return replace(experiment, config=config.model_copy(update={"engine": engine}))


def _worthwhile(experiment: Experiment, num_sites: int) -> int:
    """How many sites train together faster than one after another, from sizes alone."""
    train, engine = experiment.config.train, experiment.config.engine
    measured = experiment.setting.device == "cpu" and not engine.compile and not experiment.never_stacked
    cached = engine.prefix_cache and train.augmentation == "none" and _head_alone(experiment)  # no pass is left over
    small = train.batch_size <= MOST_IMAGES and train.batch_size * tokens(experiment.backbone) <= MOST_ROWS
    number = min(LARGEST, int(num_sites * train.participation) // GROUPS)
    return number if measured and small and not cached and number >= SMALLEST else 1


def _head_alone(experiment: Experiment) -> bool:
    return all(spec.tag.role == "head" for spec in experiment.model.specs.values())


def tokens(backbone: Backbone) -> int:
    """Length of the sequence of one image, with what tuners put into it."""
    module: Any = backbone.module
    return int(module.patch_embed.num_patches + getattr(module, "num_prefix_tokens", 1) + num_inserted(backbone))


def size(config: Config) -> int:
    """Sites in a group; 1 where nobody has resolved "auto"."""
    return 1 if config.engine.stacked_sites == "auto" else config.engine.stacked_sites


def groups(requests: Mapping[str, bytes], config: Config) -> list[tuple[str, ...]]:
    """Sites that are to train, in the order of their names and as many at a time as the configuration says; those that
    are asked for something else, all alike, alone."""
    names, number = sorted(requests), size(config)
    number = number if number > 1 and names and _trains(requests[names[0]]) else 1
    return [tuple(names[at : at + number]) for at in range(0, len(names), number)]


def _trains(request: bytes) -> bool:
    try:
        return bool(open_message(request).fields["kind"] == "round")
    except WireError:
        return False


def answers(
    experiment: Experiment, requests: Mapping[str, bytes], site: Callable[[str, Seat | None], Site]
) -> dict[str, bytes]:
    """Replies of the sites of one group. `site` gives a hospital its seat."""
    if len(requests) == 1:
        return {name: site(name, None).handle(data) for name, data in requests.items()}

    def work(name: str) -> Callable[[Seat], bytes]:
        return lambda seat: site(name, seat).handle(requests[name])

    setting = experiment.setting
    table = Table(setting.model, setting.device, setting.config.precision)
    return together({name: work(name) for name in requests}, table)
