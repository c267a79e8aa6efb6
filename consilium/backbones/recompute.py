"""Stage 2, backbones. In: a vision transformer. Out: the same one, which keeps no activations inside its blocks.

Gradient checkpointing: Chen, Xu, Zhang, Guestrin, "Training deep nets with sublinear memory cost", arXiv 1604.06174. In
the backward pass a block is computed once more. Variables come in by `functional_call` and are gone by then, so each
block remembers the tensors it was called with and is called again with those. Outputs and gradients keep their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


class _Body(nn.Module):
    """A block without the hooks on itself, which run around it, once."""

    def __init__(self, block: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block, self.inner = block, forward

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return self.inner(*inputs, **named)


def by_block(module: nn.Module) -> None:
    """Compute every block of `module.blocks` again when its gradient is asked for, in place of keeping activations."""
    for block in module.get_submodule("blocks").children():
        block.forward = _recomputed(block, block.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    bodies = [_Body(block, forward)]  # in a list: the block must not become its own child

    def call(*inputs: Any, **named: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        held = {f"block.{name}": tensor for name, tensor in _tensors(block)}
        result: Tensor = checkpoint(
            lambda *again: functional_call(bodies[0], held, again, named, tie_weights=False),
            *inputs,
            use_reentrant=False,
        )
        return result

    return call


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters(remove_duplicate=False)
    yield from block.named_buffers(remove_duplicate=False)
