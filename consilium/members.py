"""Common: several models that are used as one. In: what a strategy serves. Out: each model, or their mean prediction.

A strategy may serve K models at once: a tensor "probabilities/<variable>" or "logits/<variable>", [K, ...], holds that
variable of each of them, and names what is averaged. All other variables are common to the K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from consilium.tensors import Tensors, within

Mean = Literal["probabilities", "logits"]  # of what the mean over the models is taken
Function = Callable[[Tensor], Tensor]


def averaged(variables: Tensors) -> Mean | None:
    """Of what the mean is taken; None where this is one model."""
    prefixes = {name.partition("/")[0] for name in variables if "/" in name}
    return next((kind for kind in get_args(Mean) if kind in prefixes), None)


def each(variables: Tensors) -> Iterator[Tensors]:
    """The variables of every model, one after another, in memory of their own: alignment can change last bits."""
    kind = averaged(variables)
    if kind is None:
        yield variables
        return
    stacked = within(kind, variables)
    common = {name: value for name, value in variables.items() if not name.startswith(f"{kind}/")}
    for at in range(len(next(iter(stacked.values())))):
        yield {**common, **{name: value[at].clone() for name, value in stacked.items()}}


def names(variables: Tensors) -> set[str]:
    """The variables of one of the models."""
    return {name.rpartition("/")[2] for name in variables}


def probabilities(variables: Tensors, outputs: Callable[[Tensors], Tensor], of_outputs: Function) -> Tensor:
    """[n, C] of a model, or the mean over several, summed in float64. `outputs`: of one model, [n, num_outputs];
    `of_outputs`: the task's function that makes probabilities of them."""
    kind = averaged(variables)
    if kind is None:
        return of_outputs(outputs(variables))
    one: Function = of_outputs if kind == "probabilities" else torch.Tensor.float
    mean = torch.stack([one(outputs(model)).double() for model in each(variables)]).mean(dim=0).float()
    return mean if kind == "probabilities" else of_outputs(mean)
