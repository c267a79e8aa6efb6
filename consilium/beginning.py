"""Common: a run that begins with what another one left. In: an exported or merged folder. Out: start values by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from consilium import checkpoint
from consilium.config_file import START, digest_of_start
from consilium.errors import ConfigError
from consilium.protocols import Specs


def values(folder: Path, specs: Specs, backbone: str, classes: Sequence[str]) -> dict[str, Tensor]:
    """Start values of all shared tensors; personal ones begin as ever.

    ConfigError for a model of another backbone or other classes, of other tensors or other sizes.
    """
    digest_of_start(folder)
    found, manifest = checkpoint.load(folder / START)
    facts = {"backbone": (backbone, manifest.get("backbone_digest")), "classes": ([*classes], manifest.get("classes"))}
    for what, (ours, theirs) in facts.items():
        if ours != theirs:
            raise ConfigError(f"the start has another {what}", where="start", allowed=ours, received=theirs)
    wanted = {name: spec for name, spec in specs.items() if spec.tag.part == "shared"}
    head = {name for name in found if name.startswith("head.")} - specs.keys()  # frozen here
    missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - specs.keys() - head)
    if missing or more:
        remedy = "use the tuners of the start; a merge that lies in the frozen weights becomes an adapter with --rank"
        what, received = "the start holds other tensors than this run", f"lacks {missing[:3]}, has {more[:3]} beside"
        raise ConfigError(what, where="start", received=received, remedy=remedy)
    for name, spec in wanted.items():
        scale = manifest["tensors"][name]["scale"]
        if tuple(found[name].shape) != tuple(spec.shape) or scale != spec.scale:
            remedy = "take the tuner's rank, ranks and alpha from the start (its manifest), or merge with --rank"
            allowed = f"{tuple(spec.shape)}, scale {spec.scale}"
            received = f"{name} {tuple(found[name].shape)}, scale {scale}"
            what = "the start has tensors of another size or scale"
            raise ConfigError(what, where="start", allowed=allowed, received=received, remedy=remedy)
    return {name: found[name].to(spec.dtype) for name, spec in wanted.items()}
