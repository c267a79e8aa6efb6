"""Common: two adapters weighed image by image. In: variables that say so, images. Out: the model's outputs.

FedDPA's instance-wise weights (Yang et al., NeurIPS 2024, arXiv 2403.19211), for a new image x, some training images
x_i of the site, and h, the pooled features of the model with the personal adapter alone:

    s(x) = mean_i cos(h(x), h(x_i))    a(x) = most * s(x), between 0 and 1    y = W_0 x + (1 - a) u_g + a u_p

with u_g and u_p exchanged where likeness is `of` the shared one, as in the authors' code. A served model says so by
tensors of its own: "instance/most", a sign in "instance/of", and "instance/features", the h(x_i), which the site adds.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from consilium.errors import ConfigError
from consilium.protocols import Model, Specs
from consilium.tensors import Tensors

MOST, OF, FEATURES = "instance/most", "instance/of", "instance/features"
Of = Literal["personal", "shared"]  # the adapter that likeness to the site's images speaks for


def weighed(variables: Tensors, most: float, of: Of) -> dict[str, Tensor]:
    """The model with word that its adapters are weighed so."""
    sign = 1.0 if of == "personal" else -1.0
    return {**variables, MOST: torch.tensor(most, dtype=torch.float64), OF: torch.tensor(sign)}


def plain(variables: Tensors) -> dict[str, Tensor]:
    """The model's own variables."""
    return {name: value for name, value in variables.items() if name not in (MOST, OF, FEATURES)}


def alone(specs: Specs, variables: Tensors) -> dict[str, Tensor]:
    """The model without its shared adapter: a factor that is missing adds nothing."""
    gone = {name for name, spec in specs.items() if spec.factor is not None and spec.tag.part != "personal"}
    return {name: value for name, value in plain(variables).items() if name not in gone}


def forward(model: Model, variables: Tensors, images: Tensor, depth: int = 0) -> Tensor:
    """Head outputs [B, C] as by `Model.forward`, of adapters that are weighed image by image where the variables say
    so. A personal adapter that adds nothing yet is not weighed. ConfigError where the site's features are missing."""
    if MOST not in variables:
        return model.forward(variables, images, depth)
    lefts = {n: spec for n, spec in model.specs.items() if spec.factor is not None and spec.factor.side == "left"}
    own = {name for name, spec in lefts.items() if spec.tag.part == "personal"}
    whole = plain(variables)
    if not any(bool(whole[name].any()) for name in own):
        return model.forward(whole, images, depth)
    if FEATURES not in variables or not len(variables[FEATURES]):
        remedy = "serve the model of a site that has training images"
        raise ConfigError("weights by image need features of the site's images", where="strategy", remedy=remedy)
    shares = of_personal(variables, model.features(alone(model.specs, variables), images, depth))
    outputs = []
    for at, share in enumerate(shares.unbind()):
        scaled = {name: whole[name] * (share if name in own else 1 - share).to(whole[name]) for name in lefts}
        outputs.append(model.forward({**whole, **scaled}, images[at : at + 1], depth))
    return torch.cat(outputs)


def of_personal(variables: Tensors, features: Tensor) -> Tensor:
    """The personal adapter's share of every image [B], float64, by features [B, D] of the model with it alone."""
    near, known = features.double(), variables[FEATURES].double()
    likeness = torch.nn.functional.cosine_similarity(near[:, None], known[None], dim=2).mean(dim=1)
    share = (variables[MOST].double() * likeness).clamp(0, 1)
    return share if float(variables[OF]) > 0 else 1 - share
