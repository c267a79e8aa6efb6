"""Common: a vision transformer split in front of a block. In: a module and variables. Out: its halves as functions.

Depth d, from 1 to the number of blocks: tokens where block d would read them, before any hook of that block, or behind
the last block. One more: the pooled features. Depth 0 stands for the images. What tuners hung in acts in either half.

Whether the halves are the whole is tried out with random images, block by block, bit for bit: a model that computes
anything else between its blocks cannot be split, and is used whole. On a CPU, depths are told apart at which the bits
of an image depend on how many it is computed with: `even`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from consilium import seeds
from consilium.tensors import Tensors

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_REGISTERS = 32  # float32 that the widest loops of torch take at once
_TOP = ("norm.", "fc_norm.")  # behind the blocks


class _Caught(Exception):
    """Ends a forward pass half way."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


class _Range(nn.Module):
    """The module from one depth to another; `named`: what each block is called with beside its tokens (rotations)."""

    def __init__(self, whole: nn.Module, named: list[dict[str, Any]]) -> None:
        super().__init__()
        self.whole, self.named = whole, named

    def forward(self, inputs: Tensor, start: int, depth: int) -> Tensor:
        blocks, whole = list(self.whole.get_submodule("blocks").children()), self.whole
        if start == 0:
            return _until(whole, blocks, inputs, depth)
        for block, named in list(zip(blocks, self.named, strict=True))[start:depth]:
            inputs = block(inputs, **named)
        if depth <= len(blocks):
            return inputs
        found: Tensor = whole.forward_head(whole.norm(inputs))  # type: ignore[operator]
        return found


def _until(whole: nn.Module, blocks: list[nn.Module], images: Tensor, depth: int) -> Tensor:
    """The forward pass of images up to a depth, by timm's own code."""

    def catch(block: nn.Module, inputs: tuple[Tensor, ...], *output: Tensor) -> None:  # noqa: ARG001
        raise _Caught(output[0] if output else inputs[0])

    if depth > len(blocks):
        features: Tensor = whole(images)
        return features
    if depth < len(blocks):
        handle = blocks[depth].register_forward_pre_hook(catch, prepend=True)
    else:
        handle = blocks[-1].register_forward_hook(catch)
    try:
        whole(images)
    except _Caught as caught:
        return caught.tokens
    finally:
        handle.remove()
    raise RuntimeError(f"the forward pass never came to depth {depth}")


def place(name: str, deepest: int) -> int:
    """The greatest depth that a tensor of the backbone by this name does not change; 0 for what is in no block."""
    match = _BLOCK.match(name)
    if match:
        return int(match.group(1))
    return deepest - 1 if name.startswith(_TOP) else 0


class Halves:
    """`run(variables, inputs, start, depth)` for a module whose halves are the whole; see `split`."""

    def __init__(self, module: nn.Module, named: list[dict[str, Any]], sizes: list[int], quiet: int) -> None:
        self._range = _Range(module, named)
        self.deepest = len(named) + 1  # the depth of the pooled features
        self.sizes = sizes  # of one image at each depth: numbers
        self.quiet = quiet  # up to here a forward pass that records gradients draws nothing (dropout)
        self.even = self.deepest  # up to here an image has the same bits in every batch
        self._hung = [n for n, each in module.named_modules() if each._forward_hooks or each._forward_pre_hooks]
        self._beside = any(isinstance(value, Tensor) for each in named for value in each.values())

    def run(self, variables: Tensors, inputs: Tensor, start: int, depth: int) -> Tensor:
        """From depth `start` (0: `inputs` are images [B, 3, H, W]) to `depth`; [B, tokens, d] or features [B, d].
        `variables` are the backbone's."""
        if start == depth:
            return inputs
        inside = {f"whole.{name}": value for name, value in variables.items()}
        found: Tensor = functional_call(self._range, inside, (inputs, start, depth), tie_weights=False)
        return found

    def usable(self, variables: Iterable[str]) -> bool:
        """Whether these variables leave alone what blocks are called with beside tokens."""
        return not self._beside or not any(name.startswith("rope") for name in variables)

    def plain(self, depth: int) -> bool:
        """Whether no tuner has hung anything into the part below this depth."""
        return not any(place(f"{name}.", self.deepest) < depth for name in self._hung)


@dataclass
class _Trace:
    """One forward pass: what each block read, beside what, and whether nothing had been drawn until then."""

    tokens: list[Tensor] = field(default_factory=list)
    named: list[dict[str, Any]] = field(default_factory=list)
    silent: list[bool] = field(default_factory=list)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees in this thread whether anything is drawn; attention that drops nothing is marked as if it might."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [each.name for each in func._schema.arguments]
        drops = {**dict(zip(names, args, strict=False)), **(kwargs or {})}.get("dropout_p", "dropout_p" not in names)
        self.seen |= torch.Tag.nondeterministic_seeded in func.tags and bool(drops)
        return func(*args, **(kwargs or {}))


def split(module: nn.Module, variables: Tensors, image_size: int) -> Halves | None:
    """The halves of a module, tried out with these variables of the backbone; None where they are not the whole."""
    like = next(module.parameters())
    draw = torch.Generator().manual_seed(seeds.derive(0, purpose="halves"))
    images = torch.randn(2, 3, image_size, image_size, generator=draw).to(like.device, like.dtype)
    try:
        with torch.enable_grad():
            two, _ = _trace(module, variables, images)  # what blocks are called with for two must do for one
        with torch.no_grad():
            one, features = _trace(module, variables, images[:1])
            quiet = two.silent.index(False) - 1 if False in two.silent else len(two.named) + 1
            halves = Halves(module, two.named, [], quiet)
            halves.sizes = _tried_out(halves, variables, images[:1], one, features)
            halves.even = _even(module, variables, images[:1]) if like.device.type == "cpu" else halves.deepest
    except (AttributeError, TypeError, ValueError, RuntimeError):  # it is built in another way
        return None
    return halves if all(halves.sizes) else None


def _trace(module: nn.Module, variables: Tensors, images: Tensor) -> tuple[_Trace, Tensor]:
    found, blocks = _Trace(), list(module.get_submodule("blocks").children())

    def note(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if len(inputs) != 1 or block is not blocks[len(found.named) % len(blocks)]:
            raise ValueError("blocks take one sequence of tokens, one after the other")
        found.tokens.append(inputs[0])
        found.named.append(named)
        found.silent.append(not draws.seen)

    with seeds.ambient(0), _Draws() as draws:  # type: ignore[no-untyped-call]
        handles = [block.register_forward_pre_hook(note, prepend=True, with_kwargs=True) for block in blocks]
        try:
            features: Tensor = functional_call(module, dict(variables), (images,), tie_weights=False)
        finally:
            for handle in handles:
                handle.remove()
        found.silent.append(not draws.seen)
    if len(found.named) != len(blocks):
        raise ValueError("each block is called once")
    return found, features


def _even(module: nn.Module, variables: Tensors, image: Tensor) -> int:
    """The depth up to which the numbers of an image do not depend on how many it is computed with. On a CPU functions
    of single numbers go through vector registers, and what is left at the end of a batch is rounded in another way."""
    odd: list[int] = [len(list(module.get_submodule("blocks").children())) + 1]

    def note(block: int, child: nn.Module, inputs: object, output: object) -> None:  # noqa: ARG001
        if isinstance(output, Tensor) and output.numel() % _REGISTERS:
            odd.append(block)

    inside = [(int(match.group(1)), child) for name, child in module.named_modules() if (match := _BLOCK.match(name))]
    handles = [child.register_forward_hook(partial(note, block)) for block, child in inside]
    try:
        functional_call(module, dict(variables), (image,), tie_weights=False)
    finally:
        for handle in handles:
            handle.remove()
    return min(odd)


def _tried_out(halves: Halves, variables: Tensors, image: Tensor, trace: _Trace, features: Tensor) -> list[int]:
    """Numbers per image at each depth; 0 where the way there has other bits than timm's own pass."""
    last = halves.run(variables, image, 0, halves.deepest - 1)
    known = [image, *trace.tokens[1:], last, features]
    steps = [halves.run(variables, tokens, depth, depth + 1) for depth, tokens in enumerate(known[:-1])]
    same = [torch.equal(step, tokens) for step, tokens in zip(steps, known[1:], strict=True)]
    return [image.numel(), *(tokens.numel() * fits for tokens, fits in zip(known[1:], same, strict=True))]
