"""Composition: signed adapters. In: a trained model and a private key; or files and trusted keys. Out: a file; vectors.

A site signs what it trained, together with everything that says what it is a difference from: the digests of the frozen
backbone and of the common start. Whoever merges checks that all of it is alike before one number is added up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from consilium import checkpoint, signing
from consilium.errors import ConfigError, StateError
from consilium.predict import ADAPTER, Trained, load_exported
from consilium.products import Product, products
from consilium.run_folder import CONFIG
from consilium.tensors import Tensors, digest_all, non_finite
from consilium.tuners import base
from consilium.vectors import Vector, difference

OWN = ("rank", "ranks", "alpha", "rank_stabilised", "dropout", "start")  # options in which sites may differ


@dataclass(frozen=True)
class Signed:
    """One site's adapter, verified."""

    site: str
    file: Path
    key: str
    manifest: Mapping[str, Any]
    trained: Trained

    @property
    def digest(self) -> str:
        """Of tensors and manifest: which adapter this is."""
        return str(self.manifest[signing.KEY]["signature"])[:32]

    @property
    def num_examples(self) -> int | None:
        """Training images, if the site tells."""
        found = self.manifest["vector"]["num_examples"]
        return None if found is None else int(found)

    @cached_property
    def vector(self) -> Vector:
        """What the site's training added to the common start."""
        start, own = start_of(self.trained), products_of(self.trained)
        values = {name: value for name, value in self.trained.variables.items() if name in start}
        return difference(values, start, own, own)


def start_of(trained: Trained) -> dict[str, torch.Tensor]:
    """theta_pre of everything in the model's variables that can change, frozen weights that a strategy changed too."""
    initial = dict(trained.model.initial(trained.experiment.config.seed))
    changed = trained.variables.keys() - initial.keys() - trained.model.head_start.keys()
    module = trained.experiment.backbone.module
    return {**initial, **{name: module.get_parameter(name).detach() for name in sorted(changed)}}


def products_of(trained: Trained) -> tuple[Product, ...]:
    """The products in the model."""
    return products(trained.model.specs)


# ------------------------------------------------------------------------------------------------ at the site
def signed(
    trained: Trained,
    values: Tensors,
    manifest: Mapping[str, object],
    run: Path,
    key: Path | None,
    counts: bool,
) -> dict[str, Any]:
    """The manifest with what a merge must know, signed. ConfigError for a model that has no site, several adapters on a
    layer, or tensors whose start nobody else knows."""
    if key is None:
        raise ConfigError("numbers of images go with a signed adapter only", where="--counts", remedy="give --sign too")
    if trained.name == "global":
        remedy = "name the site, with --site"
        raise ConfigError("a signed adapter is of one site", where="--site", received="none", remedy=remedy)
    began = checkpoint.read_json(run / CONFIG)["config"]
    if began.get("start") or len(began.get("stages", ())) > 1:
        what = "a data vector is a difference from the drawn start; this run began with what another left"
        raise ConfigError(what, where="start, stages", remedy="merge what the run before left")
    _check_start(trained)
    train = checkpoint.read_json(run / "result.json")["sites"][trained.name]["train"] if counts else {}
    about = {
        "start": _start_digest(trained),
        "num_examples": train.get("n"),
        "class_counts": train.get("classes"),
    }
    return signing.sign(values, {**json.loads(json.dumps(manifest)), "vector": about}, key)


def _check_start(trained: Trained) -> None:
    pieces, specs = trained.experiment, trained.model.specs
    if parts := sorted({spec.tag.part for spec in specs.values()} - {"shared"}):
        remedy = "train with strategy = 'merge' or 'fedavg', where everything is shared"
        what = "a data vector is of one adapter whose start all sites share"
        raise ConfigError(what, where="strategy", received=f"parts: shared, {', '.join(parts)}", remedy=remedy)
    seed, common = pieces.config.seed, pieces.down(1)
    first, other = trained.model.initial(seed), trained.model.initial(seed + 1)
    idle = {name for p in products(specs) if not any(first[n].any() for n in p.left) for name in (*p.left, p.right)}
    own = [n for n in specs if n not in common and n not in idle and not torch.equal(first[n], other[n])]
    if own:
        remedy = "train with strategy = 'merge' or 'fedavg', which start alike at all sites"
        what = "these tensors started from a secret of the site, so what training added to them is not known"
        raise ConfigError(what, where="strategy", received=", ".join(sorted(own)[:3]), remedy=remedy)


def _start_digest(trained: Trained) -> str:
    """Of all that the vector is a difference from, and of a frozen head; not of factors whose product is nothing."""
    start, own = trained.model.initial(trained.experiment.config.seed), products_of(trained)
    factors = {name for p in own for name in (*p.left, p.right)}
    moved = {name for p in own if any(start[n].any() for n in p.left) for name in (*p.left, p.right)}
    told = {name: value for name, value in start.items() if name not in factors or name in moved}
    return digest_all({**trained.model.head_start, **told})


# ------------------------------------------------------------------------------------------------ where it is merged
def load(paths: Sequence[Path], keys: Sequence[signing.Trusted], weights: str | None = None) -> tuple[Signed, ...]:
    """Verified adapters that can be added up, sorted by site. Paths are files or folders that hold one.

    StateError, with the file, for one that is unsigned, changed, of a key that is not trusted, not finite, of a site
    that is there already, or of another backbone, start, set of classes, head or tuner than the first.
    """
    read = [_verified(path / ADAPTER if path.is_dir() else path, keys) for path in paths]
    for at, (file, meta, _) in enumerate(read):
        _agree(read[0], file, meta)
        if meta["model"] in [other["model"] for _, other, _ in read[:at]]:
            raise StateError("a site can be added once", where=str(file), received=meta["model"])
    found = [_opened(file, meta, key, weights) for file, meta, key in read]
    for adapter in found[1:]:
        _same_tensors(found[0], adapter)
    return tuple(sorted(found, key=lambda adapter: adapter.site))


def _verified(file: Path, keys: Sequence[signing.Trusted]) -> tuple[Path, Mapping[str, Any], str]:
    if not file.is_file():
        raise StateError("there is no adapter", where=str(file), remedy="give what `consilium export --sign` wrote")
    try:
        tensors, meta = checkpoint.load(file)
    except StateError as error:
        remedy = "fetch it again from the site that signed it"
        what = f"this adapter cannot be used: {error.what}"
        raise StateError(what, where=str(file), received=error.received, remedy=remedy) from error
    key = signing.verify(tensors, meta, str(file))
    if "vector" not in meta:
        raise StateError("this is no site's adapter", where=str(file), remedy="merge what `export --sign` wrote")
    signing.accept(key, meta["model"], keys, str(file))
    if broken := non_finite(tensors):
        raise StateError(
            f"the adapter of {meta['model']!r} holds NaN or infinity", where=str(file), received=broken[:3]
        )
    return file, meta, key


def _agree(first: tuple[Path, Mapping[str, Any], str], file: Path, meta: Mapping[str, Any]) -> None:
    """StateError where two sites fine-tuned different things."""
    ours, theirs = _facts(first[1]), _facts(meta)
    for what in ours:
        if ours[what] != theirs[what]:
            raise StateError(
                f"adapters of {first[1]['model']!r} and {meta['model']!r} do not go together: {what}",
                where=str(file),
                allowed=ours[what],
                received=theirs[what],
                remedy="sites must fine-tune the same thing: the same [backbone], [task], [[tuner]], [head] and seed",
            )


def _facts(meta: Mapping[str, Any]) -> dict[str, Any]:
    tuners = meta["settings"]["tuner"]
    return {
        "the frozen backbone": meta["backbone_digest"],
        "preprocessing": meta["preprocessing"],
        "classes": meta["classes"],
        "head": {key: value for key, value in meta["settings"]["head"].items() if key != "share"},
        "tuner": [{key: value for key, value in table.items() if key not in OWN} for table in tuners],
        "the start of training": meta["vector"]["start"],
    }


def _opened(file: Path, meta: Mapping[str, Any], key: str, weights: str | None) -> Signed:
    trained = load_exported(file, weights, "cpu")
    specs = trained.model.specs
    known = specs.keys() | trained.model.head_start.keys() | base.parameters(trained.experiment.backbone.module).keys()
    if more := sorted(trained.variables.keys() - known):
        what = f"the adapter of {meta['model']!r} has tensors that this model has not"
        raise StateError(what, where=str(file), received=more[:3])
    odd = [n for n, v in trained.variables.items() if n in specs and tuple(v.shape) != tuple(specs[n].shape)]
    if odd:
        what = f"the adapter of {meta['model']!r} has tensors of another shape than its tuner"
        raise StateError(what, where=str(file), allowed=specs[odd[0]].shape, received=odd[:3])
    if meta["vector"]["start"] != _start_digest(trained):
        what = f"the start that {meta['model']!r} trained from is not the one of this backbone, seed and version"
        raise StateError(what, where=str(file), remedy="export and merge with the same version of the package")
    return Signed(meta["model"], file, key, meta, trained)


def _same_tensors(first: Signed, other: Signed) -> None:
    """StateError for layers that one of the two has not."""
    ours, theirs = first.trained.variables.keys(), other.trained.variables.keys()
    if ours != theirs:
        what = f"adapters of {first.site!r} and {other.site!r} are of different layers"
        received = f"only {first.site}: {sorted(ours - theirs)[:3]}, only {other.site}: {sorted(theirs - ours)[:3]}"
        raise StateError(what, where=str(other.file), received=received)
