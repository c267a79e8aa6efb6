"""Composition: a run before it runs. In: a configuration. Out: what would be trained, sent and needed.

The bytes are those of the serialised tensors, computed from the declared shapes and the same draws of sites that the
run will make, so they equal what the run then measures. A tensor that training or a sum leaves as it was to the last
bit (the base under `residual`, where one site replied or a factor is frozen) is not sent again: then they are a bound.
Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from consilium import payload, results, run
from consilium.config import Config
from consilium.coordinator import drawn_sites, predicted_passes
from consilium.experiment import Experiment, assemble
from consilium.sites import audit
from consilium.tuners.tokens import num_inserted

Table = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """What `consilium check` prints. Bytes are of serialised tensors; memory is an estimate in bytes."""

    name: str
    parameters: Mapping[str, int]
    bytes_per_round: Mapping[str, Table]  # sent in round 1; received by a site that lacks everything: total, per_site
    bytes: Mapping[str, Table]  # of the whole run, as result.json will say
    image_passes: Mapping[str, int]
    memory_bytes: Mapping[str, int]
    wire: Mapping[str, list[Table]]
    kept_at_site: list[Table]
    numbers: list[Table]  # what leaves a site beside the tensors
    individual_updates: bool  # the strategy looks at each site's update; False: a secure sum of them would do
    sites: Mapping[str, Table]
    split_hash: str
    leakage: Mapping[str, Any]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def check(config: Config) -> Check:
    """Everything a run does before training, and nothing after; raises what `run` would raise."""
    prepared = run.prepare(config, lambda _: None)
    run.check_serving(config, prepared)
    experiment = assemble(config, prepared.classes)
    specs = experiment.model.specs
    names = sorted(prepared.sites)
    up = {site: payload.num_bytes(experiment.up(1), experiment.sent(1, site)) for site in names}
    down = payload.num_bytes(experiment.down(1), experiment.down(1))
    sent, received = results.both_ways(experiment)
    passes = predicted_passes(config, {name: len(data.train) for name, data in prepared.sites.items()})
    return Check(
        name=config.name,
        parameters=results.parameters(experiment),
        bytes_per_round={"up": _full(up), "down": _full(dict.fromkeys(names, down))},
        bytes=predicted_bytes(experiment, names),
        image_passes=passes,
        memory_bytes=memory(experiment),
        wire={"up": results.wire(sent), "down": results.wire(received)},
        kept_at_site=results.wire({n: spec for n, spec in specs.items() if n not in sent and n not in received}),
        numbers=results.numbers(experiment),
        individual_updates=experiment.strategy.declares.needs_individual_updates,
        sites={name: results.site_table(data, prepared.classes) for name, data in prepared.sites.items()},
        split_hash=prepared.split_hash,
        leakage=audit.audit(prepared.split, prepared.hashes, prepared.corrupt).to_dict(),
        warnings=(*results.warnings(experiment, prepared), *results.never_drawn(passes)),
    )


def _full(per_site: Mapping[str, int]) -> Table:
    return {"total": sum(per_site.values()), "per_site": dict(per_site)}


def predicted_bytes(experiment: Experiment, sites: Iterable[str]) -> dict[str, Table]:
    """Play the rounds with versions instead of tensors: who is drawn, what each lacks, what each sends."""
    config, names = experiment.config, sorted(sites)
    specs, strategy = experiment.model.specs, experiment.strategy
    down = strategy.down(specs, 1)
    bases = {name for name, spec in down.items() if spec.tag.slot == "base"}  # the sites' own, until they change
    version, own = dict.fromkeys(down, 0), {*experiment.common, *(bases - specs.keys())}
    have: dict[str, dict[str, int]] = {site: dict.fromkeys(own, 0) for site in names}
    totals = {"up": dict.fromkeys(names, 0), "down": dict.fromkeys(names, 0)}

    def send(site: str, number: int) -> None:
        down = strategy.down(specs, number)
        news = [name for name in down if have[site].get(name) != version[name]]
        totals["down"][site] += payload.num_bytes(down, news)
        have[site] |= {name: version[name] for name in news}

    for number in range(1, config.train.rounds + 1):
        drawn = drawn_sites(config.train.participation, names, config.seed, number)
        for site in drawn:
            send(site, number)
        for site in drawn:
            sent = experiment.sent(number, site)
            totals["up"][site] += payload.num_bytes(experiment.up(number), sent)
            changed = bases - specs.keys() | (sent.keys() & version.keys()) - bases if sent else ()
            version |= dict.fromkeys(changed, number)
    down = strategy.down(specs, config.train.rounds)
    last = [name for name in down if version[name] == config.train.rounds]
    for site in names:
        send(site, config.train.rounds)
        if config.evaluation.serve == "best":  # the chosen round's tensors go out once more
            totals["down"][site] += payload.num_bytes(down, last)
    return {way: {"total": sum(rows.values()), "per_site": rows} for way, rows in totals.items()}


def memory(experiment: Experiment) -> dict[str, int]:
    """An estimate: weights once per process, trained tensors with gradient and moments, activations of a batch."""
    backbone, config = experiment.backbone, experiment.config
    module: Any = backbone.module
    tokens = module.patch_embed.num_patches + getattr(module, "num_prefix_tokens", 1) + num_inserted(backbone)
    kept = _KEPT_PER_TOKEN * backbone.num_blocks
    if config.engine.gradient_checkpointing:  # every block's input, and one block in full while it is computed again
        kept = backbone.num_blocks + _KEPT_PER_TOKEN
    size = 4 if config.train.precision == "float32" else 2
    parts = {
        "weights": backbone.num_parameters * 4,
        "trained": results.parameters(experiment)["trainable"] * 4 * _COPIES,
        "activations": config.train.batch_size * tokens * backbone.num_features * kept * size,
    }
    return {**parts, "total": sum(parts.values())}


_COPIES = 4  # value, gradient, two moments
_KEPT_PER_TOKEN = (
    20  # numbers per channel that a block keeps for its gradient: norms, qkv, attention, an MLP of 4 x width
)
