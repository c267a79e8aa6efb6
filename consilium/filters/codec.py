"""Stage 6, filters: differences instead of values, coded. In: tensors to be sent. Out: what travels, and what arrives.

Both ways alike: the sender takes the difference to what the receiver holds, adds what earlier messages left unsaid,
codes the sum, and keeps what the code loses for the next message (error feedback: Seide et al., Interspeech 2014;
Karimireddy et al., ICML 2019, arXiv 1901.09847).

    wanted = value + residual     sent = Q(wanted - held)     held <- held + sent     residual <- wanted - held

So the sum of all that arrived is the sum of all that was meant, but for the last residual. Up, `held` is what the site
received and the residual stays in its state. Down, it is the broadcast: what every site holds that is up to date, and
what the strategy goes on from, so that both ends compute with the same bits.

Only float32 tensors of slot parameter are coded, where that is shorter. Integers and float64 are counts and sums whose
exactness is the point; control variates and statistics are no steps, so that errors would not be made good by later
ones; a changed base must be the same matrix that the sum was formed with; what comes in another shape is no step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from consilium.errors import TrainingError, WireError
from consilium.filters.narrow import Width, forms, narrowed, num_bytes, widened
from consilium.protocols import Spec, Specs
from consilium.rounds import Broadcast, Versions
from consilium.tensors import Tensors, digest


@dataclass(frozen=True)
class Step:
    """One coded message about one tensor: what travels, what the receiver then holds, what is left unsaid."""

    parts: Mapping[str, Tensor]
    held: Tensor
    residual: Tensor


@dataclass(frozen=True)
class Codec:
    """How parameters travel. Without a `width` they travel as they are, and everything here leaves them alone.

    `forgets`: tensors whose earlier residual says nothing, since they come back in another basis.
    """

    width: Width | None = None
    feedback: bool = True
    forgets: Set[str] = frozenset()

    # -------------------------------------------------------------------------------------------- what may travel
    def coded(self, declared: Specs) -> Specs:
        """Those of the declared tensors that are coded."""
        return {name: spec for name, spec in declared.items() if self.width and _pays(spec, self.width)}

    def wire(self, declared: Specs) -> dict[str, Spec]:
        """What may be in a message: coded tensors in either form, since the receiver may lack what a step builds on."""
        return {**declared, **self._narrow(self.coded(declared))}

    def names(self, coded: Iterable[str]) -> list[str]:
        """The names that coded tensors have on the wire."""
        return [f"{name}:{part}" for name in coded for part in self._parts]

    def num_bytes(self, spec: Spec) -> int:
        """Bytes of one coded tensor; a free dimension counts as 0."""
        return num_bytes(spec.shape, self.width) if self.width else 0

    @property
    def _parts(self) -> tuple[str, ...]:
        return tuple(forms((), self.width)) if self.width else ()

    def _narrow(self, coded: Specs) -> dict[str, Spec]:
        width = self.width
        return {
            f"{name}:{part}": replace(spec, shape=shape, dtype=dtype, factor=None)
            for name, spec in coded.items()
            for part, (shape, dtype) in (forms(spec.shape, width) if width else {}).items()
        }

    # -------------------------------------------------------------------------------------------- both ways
    def read(self, wire: Tensors, held: Tensors, declared: Specs) -> dict[str, Tensor]:
        """The tensors that came to somebody who holds `held`; WireError where parts or what they build on are missing,
        or a tensor comes in both forms, TrainingError where a sum is not finite."""
        coded = self.coded(declared)
        found = {name: value for name, value in wire.items() if name in declared}
        for name in sorted({name.rpartition(":")[0] for name in wire.keys() - found.keys()}):
            parts = {part: wire[f"{name}:{part}"] for part in self._parts if f"{name}:{part}" in wire}
            if name not in coded or name in found or name not in held or len(parts) < len(self._parts):
                what = "a coded tensor lacks a part or what it builds on, or came in full beside"
                raise WireError(what, received=f"{name}: {', '.join(parts)}")
            found[name] = _added(held[name], widened(parts, self._known))
            if not bool(found[name].isfinite().all()):
                raise TrainingError("a coded step leads to NaN or infinity", received=name)
        return found

    # -------------------------------------------------------------------------------------------- up
    def reply(
        self, update: Tensors, received: Tensors, residual: Tensors, declared: Specs
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What travels in place of a site's update, and the residual that stays there."""
        names = self.coded(declared).keys() & update.keys() & received.keys()
        coded, kept = [n for n in sorted(names) if update[n].shape == received[n].shape], dict(residual)
        wire = {name: value for name, value in update.items() if name not in coded}
        for name in coded:
            step = self._step(update[name], received[name], residual.get(name))
            wire |= {f"{name}:{part}": value for part, value in step.parts.items()}
            kept |= self._kept(name, step)
        return wire, kept

    # -------------------------------------------------------------------------------------------- down
    def broadcast(
        self, before: Tensors, after: Tensors, memory: Broadcast, declared: Specs
    ) -> tuple[dict[str, Tensor], Broadcast]:
        """What sites will hold in place of `after`, once they have what they lack; and what to remember of it."""
        coded, shared = self.coded(declared), dict(after)
        residual, news, steps = dict(memory.residual), dict(memory.news), dict(memory.steps)
        for name in after.keys() & before.keys() & coded.keys():
            if after[name] is before[name] or torch.equal(after[name], before[name]):
                continue
            step = self._step(after[name], before[name], memory.residual.get(name))
            shared[name] = step.held
            residual |= self._kept(name, step)
            news |= {f"{name}:{part}": value for part, value in step.parts.items()}
            steps[name] = (digest(before[name]), digest(step.held))
        return shared, Broadcast(residual, news, steps)

    def request(self, lacking: Tensors, held: Versions, versions: Versions, memory: Broadcast) -> dict[str, Tensor]:
        """What travels to a site that lacks these tensors: a step where the site holds what it starts from, and the
        whole value elsewhere (a site that missed a round, that never took part, or gets something of its own)."""
        short = [n for n in lacking if n in held and memory.steps.get(n) == (held[n], versions[n])]
        whole = {name: value for name, value in lacking.items() if name not in short}
        return {**whole, **{name: memory.news[name] for name in self.names(short)}}

    # -------------------------------------------------------------------------------------------- one step
    @property
    def _known(self) -> Width:
        assert self.width is not None, "nothing is coded without a width"
        return self.width

    def _step(self, value: Tensor, held: Tensor, residual: Tensor | None) -> Step:
        wanted = value.double() if residual is None else value.double() + residual.double()
        parts = narrowed((wanted - held.double()).float(), self._known)
        arrived = _added(held, widened(parts, self._known))
        return Step(parts, arrived, (wanted - arrived.double()).float())

    def _kept(self, name: str, step: Step) -> dict[str, Tensor]:
        return {name: step.residual} if self.feedback and name not in self.forgets else {}


def _pays(spec: Spec, width: Width) -> bool:
    if spec.dtype != torch.float32 or spec.tag.slot != "parameter" or spec.shrinks is not None:
        return False
    known = tuple(size for size in spec.shape if size is not None)
    whole = 4 * torch.Size(known).numel()
    return len(known) < len(spec.shape) or num_bytes(spec.shape, width) < whole


def _added(held: Tensor, step: Tensor) -> Tensor:
    """WireError for another shape."""
    if held.shape != step.shape:
        raise WireError("a step of another shape", allowed=tuple(held.shape), received=tuple(step.shape))
    return held + step
