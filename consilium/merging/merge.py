"""Composition: merging. In: signed adapters of several sites, or a merged folder and one to take away. Out: a folder.

    theta = theta_pre + lambda sum c_k tau_k

The folder holds a model that `predict`, `export` and `consilium.export.load` read; its values are float64, so that a
site can be taken away again to the last digit that its adapter has. Nothing needs a live federation.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from consilium import checkpoint, export, signing, vectors
from consilium.errors import ConfigError, StateError
from consilium.exchange import Display
from consilium.merging import adapters, candidates
from consilium.merging.adapters import Signed, products_of, start_of
from consilium.merging.target import Target, target
from consilium.predict import ADAPTER, Trained, load_exported
from consilium.vectors import Rule, Term, Vector

REPORT = "merge.json"


@dataclass(frozen=True)
class Options:
    """How to merge. ConfigError from `checked` for what would have no effect."""

    rule: Rule = "mean"
    scale: float | None = None  # lambda; None: chosen on validation images
    weigh: Literal["uniform", "examples"] = "uniform"  # of mean and dare: every site once, or by its training images
    density: float = 0.2  # of ties and dare: the share of entries that is kept; ours
    seed: int = 0  # of dare
    rank: int | None = None  # of products; None: exact
    validate: tuple[Path, ...] = ()  # configurations of sites, or what sites wrote
    select: str = "balanced_accuracy"  # the validation metric that chooses
    scales: tuple[float, ...] = ()  # candidates; none: candidates.DEFAULT
    weights: str | None = None  # file with the backbone's
    sign: Path | None = None  # private key for the merged model

    def checked(self) -> Options:
        """Itself."""
        changed = {name for name, value in vars(self).items() if value != getattr(Options, name)}
        idle = {
            "density": self.rule not in ("ties", "dare"),
            "seed": self.rule != "dare",
            "weigh": self.rule not in ("mean", "dare"),
            "scales": self.scale is not None,
            "select": not self.validate,
        }
        if found := sorted(name for name, useless in idle.items() if useless and name in changed):
            what = f"this has no effect here: {', '.join(f'--{name}' for name in found)}"
            raise ConfigError(what, received=f"--rule {self.rule}, --scale {self.scale or 'auto'}")
        if self.scale is None and not self.validate:
            remedy = "name the sites' validation images with --validate, or give a number"
            raise ConfigError("a scale is chosen on validation images", where="--scale auto", remedy=remedy)
        if not 0 < self.density <= 1:
            raise ConfigError("a density is a share", where="--density", allowed="0 < x <= 1", received=self.density)
        if self.scale is not None and not math.isfinite(self.scale):
            raise ConfigError("a scale is a number", where="--scale", received=self.scale)
        return self


@dataclass(frozen=True)
class _Sum:
    """What is to be written: the vector at scale 1, and of what it is made."""

    vector: Vector
    like: Trained  # any model of the common start
    terms: tuple[Mapping[str, Any], ...]
    alone: Mapping[str, Callable[[], Trained]]  # sites' own models, for comparison
    cosines: Mapping[str, float]


def merge(paths: Sequence[Path], trust: Sequence[str], out: Path, options: Options, show: Display) -> Path:
    """Verify, merge, choose the scale, write. ConfigError, StateError or DataError where that cannot be done."""
    options.checked()
    _check_empty(out)
    found = adapters.load(paths, signing.trusted(trust), options.weights)
    terms = [Term(each.site, each.vector, _weight(each, options.weigh)) for each in found]
    vector = vectors.merged(options.rule, terms, options.density, options.seed)
    alone = {f"{each.site} alone": partial(_itself, each.trained) for each in found}
    told = tuple(
        {"site": each.site, "adapter": each.digest, "key": each.key, "weight": term.weight}
        for each, term in zip(found, terms, strict=True)
    )
    cosines = {f"{a.site}, {b.site}": vectors.cosine(a.vector, b.vector) for a, b in combinations(terms, 2)}
    return _write(_Sum(vector, found[0].trained, told, alone, cosines), out, options, show)


def subtract(
    merged: Path, paths: Sequence[Path], trust: Sequence[str], out: Path, options: Options, show: Display
) -> Path:
    """Take sites out of a merged folder, exactly: what is left is the merge of the others by the same rule and scale.

    `options`: as for `merge`; rule, weigh, density and seed are those of the folder. ConfigError for a rule that is not
    linear, for a merge cut to a rank, and where nobody would be left; StateError for an adapter that is not in it.
    """
    _check_empty(out)
    values, manifest = checkpoint.load(merged / ADAPTER)
    told = manifest.get("merge")
    if told is None:
        raise StateError("this is no merged folder", where=str(merged), remedy="give what `consilium merge` wrote")
    if signing.KEY in manifest:
        signing.verify(values, manifest, str(merged))
    _check_linear(told, str(merged))
    removed = adapters.load(paths, signing.trusted(trust), options.weights)
    left = _others(told["terms"], removed, str(merged))
    trained = load_exported(merged / ADAPTER, options.weights, "cpu")
    vector = _without(trained, values, told, removed, left)
    scale = told["scale"] if options.scale is None and not options.validate else options.scale
    again = replace(options, rule=told["rule"], weigh=told["weigh"], scale=scale).checked()
    return _write(_Sum(vector, trained, left, {}, {}), out, again, show)


# ------------------------------------------------------------------------------------------------ subtraction
def _check_linear(told: Mapping[str, Any], where: str) -> None:
    remedy = "merge the others again, from their adapters"
    if told["rule"] not in vectors.LINEAR:
        what = f"{told['rule']} looks at all sites' entries together: nobody can be taken out of it afterwards"
        raise ConfigError(what, where=where, allowed=" or ".join(vectors.LINEAR), received=told["rule"], remedy=remedy)
    if told["rank"] is not None:
        what = "this merge was cut to a rank, so what a site brought is no longer whole in it"
        raise ConfigError(what, where=where, received=f"--rank {told['rank']}", remedy=remedy)
    if not told["scale"]:
        raise ConfigError("a merge of scale 0 holds nobody", where=where, remedy=remedy)


def _others(terms: Sequence[Mapping[str, Any]], removed: Sequence[Signed], where: str) -> tuple[Mapping[str, Any], ...]:
    there = {term["adapter"]: term["site"] for term in terms}
    for each in removed:
        if each.digest not in there:
            what = f"this adapter of {each.site!r} is not in the merged model"
            raise StateError(what, where=str(each.file), allowed=", ".join(there.values()), received=where)
    gone = {each.digest for each in removed}
    left = tuple(term for term in terms if term["adapter"] not in gone)
    if not left:
        raise ConfigError("nobody would be left", where=where, remedy="delete the folder instead")
    return left


def _without(
    trained: Trained,
    values: Mapping[str, Any],
    told: Mapping[str, Any],
    removed: Sequence[Signed],
    left: Sequence[Mapping[str, Any]],
) -> Vector:
    """sum over the others of c'_k tau_k = f (merged / lambda - sum over the removed of c_k tau_k)."""
    start, own = start_of(trained), () if told["folded"] else products_of(trained)
    whole = vectors.difference({name: values[name] for name in start}, start, own, own)
    weights = {term["adapter"]: term["weight"] for term in told["terms"]}
    total, rest = math.fsum(weights.values()), math.fsum(term["weight"] for term in left)
    factor, each = (1.0, 1.0) if told["rule"] == "sum" else (total / rest, 1 / total)
    pairs = [(factor / told["scale"], whole)]
    for signed in removed:
        coefficient = 1.0 if told["rule"] == "sum" else weights[signed.digest] * each
        pairs.append((-factor * coefficient, _alike(signed, told["folded"])))
    return vectors.combination(pairs)


def _alike(signed: Signed, folded: bool) -> Vector:
    """The site's vector as the merged folder holds it."""
    return target(signed.trained, signed.vector, None).vector if folded else signed.vector


# ------------------------------------------------------------------------------------------------ what is written
def _write(made: _Sum, out: Path, options: Options, show: Display) -> Path:
    goal = target(made.like, made.vector, options.rank)
    scale, validation = _chosen(made, goal, options, show)
    found, missed = goal.values(scale)
    values = {**goal.trained.model.head_start, **found}
    told = {
        "rule": options.rule,
        "scale": scale,
        "weigh": options.weigh,
        "density": options.density if options.rule in ("ties", "dare") else None,
        "seed": options.seed if options.rule == "dare" else None,
        "rank": options.rank,
        "cut_off": missed,
        "folded": bool(products_of(goal.trained)) and not goal.before,  # products lie in the frozen weights
        "terms": list(made.terms),
        "cosines": dict(made.cosines),
    }
    sites = [term["site"] for term in made.terms]
    result = replace(goal.trained, variables={name: value.float() for name, value in found.items()})
    manifest: dict[str, Any] = {**export.manifest_of(result, values, sites, 0), "merge": told}
    manifest = json.loads(json.dumps(manifest))
    if options.sign is not None:
        manifest = signing.sign(values, manifest, options.sign)
    checkpoint.save(out / ADAPTER, values, manifest)
    checkpoint.write_json(out / "config.json", export.card(result))
    checkpoint.write_json(out / REPORT, {**told, "validation": validation})
    return out


def _chosen(made: _Sum, goal: Target, options: Options, show: Display) -> tuple[float, dict[str, Any] | None]:
    if not options.validate:
        assert options.scale is not None
        return options.scale, None
    count = len(made.terms)
    tried = (options.scale,) if options.scale is not None else candidates.scales(options.scales, options.rule, count)
    models: dict[str, Callable[[], Trained]] = {candidates.START: partial(goal.model, 0.0), **made.alone}
    models |= {candidates.label(scale): partial(goal.model, scale) for scale in tried}
    same = [sorted(term["adapter"] for term in made.terms), options.rule, options.weigh, options.density]
    of = hashlib.sha256(json.dumps([*same, options.seed, options.rank]).encode()).hexdigest()[:16]
    table = candidates.ask(candidates.Question(of, models, goal.trained), options.validate, show)
    means = candidates.means(table, options.select)
    scale = candidates.best(means, tried, options.select)
    if scale in (tried[0], tried[-1]) and len(tried) > 1:
        text = f"{scale:.6g} is at the edge of the candidates: try others beyond it, with --scales"
        show({"event": "warning", "text": text})
    return scale, {"of": of, "select": options.select, "means": means, "sites": table}


def _weight(each: Signed, weigh: str) -> float:
    if weigh == "uniform":
        return 1.0
    if not each.num_examples:
        remedy = "export with --counts at that site, or merge with --weigh uniform"
        raise ConfigError(f"{each.site!r} does not tell how many images it has", where=str(each.file), remedy=remedy)
    return float(each.num_examples)


def _itself(trained: Trained) -> Trained:
    return trained


def _check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StateError("the folder to merge into is not empty", where=str(out), remedy="choose another --out")
