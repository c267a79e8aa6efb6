"""Every registered tuner, with the options that make another method of it; what a strategy needs to run at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilium import config, registry
from tests import federation

Options = Mapping[str, object]
_MORE: Mapping[str, tuple[str, Options]] = {
    "prompts deep": ("prompts", {"length": 3, "depth": "deep"}),
    "prompts projected": ("prompts", {"length": 3, "project": 5}),
    "low_rank_prompts deep": ("low_rank_prompts", {"length": 12, "rank": 2, "depth": "deep"}),
    "low_rank_prompts shared basis": (
        "low_rank_prompts",
        {"length": 12, "rank": 2, "depth": "deep", "share_basis": True},
    ),
    "lora everywhere": ("lora", {"rank": 2, "targets": ["qkv", "proj", "fc1", "fc2"]}),
    "lora dora": ("lora", {"rank": 2, "dora": True}),
    "lora orthonormal": ("lora", {"rank": 2, "start": "orthonormal"}),
    "lora frozen a": ("lora", {"rank": 2, "freeze_a": True}),
    "adapter houlsby": ("adapter", {"width": 4, "kind": "houlsby"}),
    "adapter parallel": ("adapter", {"width": 4, "kind": "parallel"}),
    "stochastic_block site": ("stochastic_block", {"scope": "site"}),
}
_DEFAULTS: Mapping[str, Options] = {"low_rank_prompts": {"length": 12, "rank": 2}}  # a test's backbone is narrow
TUNERS: Mapping[str, tuple[str, Options]] = {
    **{name: (name, _DEFAULTS.get(name, {})) for name in registry.members("tuners")},
    **{key: pair for key, pair in _MORE.items() if pair[0] in registry.members("tuners")},
}
HYBRIDS = {
    "lora + prompts": ("lora", "prompts"),
    "prompts + lora": ("prompts", "lora"),
    "norm + adapter + ia3": ("norm", "adapter", "ia3"),
    "bitfit + lora + low_rank_prompts": ("bitfit", "lora", "low_rank_prompts"),
}


def table(variant: str) -> list[dict[str, object]]:
    """The [[tuner]] tables of a variant or hybrid."""
    names = HYBRIDS.get(variant, (variant,))
    return [{"name": TUNERS[each][0], **TUNERS[each][1]} for each in names]


NEEDS: Mapping[str, Mapping[str, Any]] = {  # tables without which a strategy is refused, by its name
    "fedbn": {"tuner": [{"name": "lora", "rank": 4}, {"name": "norm"}]},
    "scaffold": {"train": federation.SGD},
    "fedpft": {"tuner": [{"name": "linear"}], "strategy": {"min_images": 2, "components": 2}},
}


ONE_SHOT = frozenset(
    name for name in registry.members("strategies") if registry.build("strategies", name, {}).declares.once
)
FEDERATED = sorted(  # every strategy but the one that has the images of all sites in one place
    name for name in registry.members("strategies") if not registry.build("strategies", name, {}).declares.pools_images
)


def settings(strategy: str, **tables: Any) -> config.Config:
    """The small configuration for a strategy, with some keys of its tables replaced, and with what it needs."""
    needs = NEEDS.get(strategy, {})
    if strategy in ONE_SHOT and tables.get("evaluation", {}).get("serve") == "best":  # refused: sites send once
        tables["evaluation"] = {**tables["evaluation"], "serve": "last"}
    train = {**federation.TABLE["train"], **tables.pop("train", {}), **needs.get("train", {})}
    chosen = {"tuner": needs["tuner"]} if "tuner" in needs and "tuner" not in tables else {}
    return federation.configure(
        strategy={"name": strategy, **needs.get("strategy", {})}, train=train, **chosen, **tables
    )
