"""Every registered tuner, by itself and with the options that make another method of it."""

from __future__ import annotations

from collections.abc import Mapping

from consilium import registry

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
