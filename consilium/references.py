"""Composition: training without a federation. In: a configuration, the sites' data. Out: both, for all images in one
place or for every site alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

from consilium import registry
from consilium.config import Config, EvaluationConfig, StrategyConfig, WireConfig
from consilium.coordinator import predicted_passes
from consilium.data import SiteData
from consilium.errors import ConfigError
from consilium.sites import federation as sites


def gathered(config: Config, prepared: sites.Federation) -> dict[str, SiteData]:
    """The data as the strategy wants them: of each site, or all in one place."""
    strategy = registry.build("strategies", config.strategy.name, config.strategy.options())
    return {"pooled": sites.pool(prepared)} if strategy.declares.pools_images else dict(prepared.sites)


def reference(config: Config, name: str, prepared: sites.Federation) -> tuple[Config, dict[str, SiteData]]:
    """A reference's configuration and data."""
    images = {site: len(data.train) for site, data in prepared.sites.items()}
    data = {"pooled": sites.pool(prepared)} if name == "pooled" else dict(prepared.sites)
    return reference_config(config, name, images), data


def reference_config(config: Config, name: str, images: Mapping[str, int]) -> Config:
    """The same training without a federation, on as many images: a site alone trains in the rounds it is drawn in, as
    much longer as the strategy's phases are, the pool in every round on its share of what the run's sites see in all
    (`images`: of each site). With stages, in each of them."""
    if not config.stages:
        return _reference_config(config, name, images)
    each = [_reference_config(config.at(number), name, images) for number in range(len(config.stages))]
    tables = [{key: getattr(one, key) for key in ("head", "strategy", "train", "wire")} for one in each]
    stages = tuple(stage.model_copy(update=own) for stage, own in zip(config.stages, tables, strict=True))
    return each[-1].model_copy(update={"stages": stages})


def _reference_config(config: Config, name: str, images: Mapping[str, int]) -> Config:
    in_all = sum(predicted_passes(config, images).values())
    changed: dict[str, object] = {"quorum": 1.0}
    if name == "pooled":
        epochs = _epochs(round(in_all / config.train.rounds), sum(images.values()))
        changed |= {"participation": 1.0, "local_steps": None, "local_epochs": epochs}
    else:
        alone = config.model_copy(update={"strategy": StrategyConfig(name="local"), "unseen": None})
        changed |= _longer(config, in_all / max(1, sum(predicted_passes(alone, images).values())))
    train = config.train.model_copy(update=changed)
    evaluation = EvaluationConfig.model_validate({**config.evaluation.model_dump(), "references": ()})
    changes: dict[str, object] = {"name": f"{name} reference", "strategy": StrategyConfig(name="local"), "unseen": None}
    if config.head.share == "shared":  # "local" shares nothing; a head named so trains and starts alike
        changes["head"] = config.head.model_copy(update={"share": None})
    if config.task.options().get("class_counts") == "federation":  # a reference has none whose counts it could use
        plain = {**config.task.model_dump(), "class_counts": "site"}
        changes["task"] = type(config.task).model_validate(plain)
    return config.model_copy(update={**changes, "train": train, "evaluation": evaluation, "wire": WireConfig()})


def _longer(config: Config, times: float) -> dict[str, object]:
    """The length of a round as many times over; a strategy that does less than train says makes it no shorter."""
    if times <= 1:
        return {}
    if config.train.local_steps is not None:
        return {"local_steps": round(config.train.local_steps * times)}
    return {"local_epochs": (config.train.local_epochs or 1.0) * times}


def _epochs(wanted: int, images: int) -> float:
    """The share of `images` that gives so many, in spite of rounding."""
    share = wanted / images
    return share if math.ceil(share * images) == wanted else (wanted - 0.5) / images


def check_votes(config: Config) -> None:
    """ConfigError where serve = "best" would be decided by other sites in one round than in the next."""
    if config.evaluation.serve == "best" and min(config.train.participation, config.train.quorum) < 1:
        remedy = "use serve = 'last', or participation = 1 and quorum = 1"
        what = "serve = 'best' needs every site's validation in every round"
        raise ConfigError(what, remedy=remedy, where="evaluation.serve")


def check_serving(config: Config, prepared: sites.Federation) -> None:
    """ConfigError where serve = "best" could not be decided."""
    check_votes(config)
    if config.evaluation.serve == "best" and not any(len(data.val) for data in prepared.sites.values()):
        raise ConfigError("serve = 'best' needs validation images", where="evaluation.serve")
