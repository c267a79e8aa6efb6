"""Stage 2, backbones. In: a vision transformer. Out: the same one, whose blocks run through `torch.compile`.

Block by block, not as a whole: blocks of one form share one compiled function, so that compiling takes as long as for a
single block, and what acts between blocks (prompts, recomputing, a cached prefix) stays as it is. No graph may break:
a hook that `torch.compile` cannot follow is an error, not a slow run. Fused sums differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from consilium.errors import ConfigError

BACKEND = "inductor"
_FORMS = 64  # of one block: trained or not, gradient for its input or not, evaluated, size of the batch, precision


def by_block(module: nn.Module, device: str) -> None:
    """Compile every block of `module.blocks` when it is first called; ConfigError where there is no compiler."""
    _require_compiler(BACKEND, device)
    for block in module.get_submodule("blocks").children():
        block.forward = _any_batch(torch.compile(block.forward, fullgraph=True, dynamic=False, backend=BACKEND))


def _any_batch(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One function for every size of batch, from the first on. Left to itself torch.compile makes one for the first
    size it meets, so that bits would depend on what a process has seen: on workers, and on where a run was resumed."""

    def call(x: Tensor, *inputs: Any, **named: Any) -> Tensor:
        limits = torch._dynamo.config
        if limits.recompile_limit < _FORMS:  # it counts in each thread, and stacked sites have threads
            limits.recompile_limit = _FORMS
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return run(x, *inputs, **named)

    return call


@lru_cache(maxsize=4)
def _require_compiler(backend: str, device: str) -> None:
    """Compile one sum: what is missing (a C++ compiler, Triton, headers) shows nowhere else before the first round."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True, backend=backend)(torch.zeros(8, device=device))
    except Exception as error:
        lines = str(error).strip().splitlines()[:2] or [type(error).__name__]  # who raised, and what
        raise ConfigError(
            "torch.compile does not work here",
            where="engine.compile",
            received=" ".join(lines)[:300],
            remedy="leave engine.compile out; or install a C++ compiler (CPU), or Triton (GPU)",
        ) from error
