"""Stage 8, strategies: methods that are FedAvg with phases: what is trained first, never, or once more at the end.

In: updates of sites. Out: the next shared tensors.

fedavg_finetune: FedAvg (arXiv 1602.05629), then every site trains the final model on by itself: its personal model.
fedrep: Collins, Hassani, Mokhtari, Shakkottai, ICML 2021, arXiv 2102.07078, algorithm 1: in every round first the head
  h_i, with the representation phi still, then phi with h_i still; phi travels.
fedbabu: Oh, Kim, Yun, ICLR 2022, arXiv 2106.06042: the head keeps its common random start, the body is trained and
  averaged; at the end every site fine-tunes both.
    tau (steps of the head) -> head_epochs    fine-tuning epochs -> finetune_epochs    body, phi -> what travels
Leaves the site: what is trained and travels, number of training images. Stays: in fedrep the head, from the site's own
  seed; in the others nothing before the end, then the fine-tuned model. Kept between rounds: personal tensors.
Departures: lengths are in epochs; the last blocks, if kept (`personal_from_block`), count as head in fedrep.
  Fine-tuning is the last request's work, on training images alone, at every site whether a round drew it or not; it has
  the learning rates and the schedule of the run, from its beginning; what FedBABU does not train starts at unit gain.
  Guests (sites.held_out) are not fine-tuned: they get the global model.
Identity: fedrep with nothing personal = FedAvg; the global model of fedavg_finetune = FedAvg's; FedBABU's head keeps
  its bits until the end (tests/unit/test_strategy_phases.py).
Family: partial sharing
Family of fedavg_finetune: references
Identity test of fedavg_finetune: test_fedavg_is_fine_tuned_at_every_site_after_the_last_round
Identity test of fedrep: test_fedrep_with_nothing_personal_is_fedavg
Identity test of fedbabu: test_the_head_of_fedbabu_keeps_its_common_start_until_the_end
Slow reference of fedavg_finetune: test_fedavgs_rounds_are_the_papers
Slow reference of fedrep: test_fedrep_is_the_papers_algorithm
Slow reference of fedbabu: test_fedbabu_is_fedavg_of_the_body
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from consilium.protocols import Declaration, Fitted, LocalTraining, Objective, Selector, Tag
from consilium.registry import register
from consilium.strategies.fedavg import FedAvg, FedAvgOptions, Fit
from consilium.strategies.partial import FedPerOptions, below
from consilium.tensors import Tensors


class FinetuneOptions(FedAvgOptions):
    """Keys of `[strategy]` for fedavg_finetune and fedbabu."""

    finetune_epochs: float = Field(default=1.0, gt=0)  # at every site, after the last round


@register(
    "strategies",
    "fedavg_finetune",
    options=FinetuneOptions,
    summary="FedAvg, after which every site trains the final model on by itself",
    source="McMahan et al., AISTATS 2017, arXiv 1602.05629",
    facts={"leaves the site": "all trained tensors", "stays": "the fine-tuned model", "exact": "mean of each tensor"},
)
def fedavg_finetune(options: FinetuneOptions) -> FedAvg:
    """FedAvg with a last local phase."""
    declares = Declaration(finish_epochs=options.finetune_epochs)
    return FedAvg(options.weights, declares=declares, aggregate=options.aggregation())


def all_but_the_head(tag: Tag, round: int) -> bool:  # noqa: ARG001
    """Train the body alone, in every round."""
    return tag.role != "head"


@register(
    "strategies",
    "fedbabu",
    options=FinetuneOptions,
    summary="the head stays at a common random start, the rest is averaged; at the end every site fine-tunes both",
    source="FedBABU: Oh et al., ICLR 2022, arXiv 2106.06042",
    facts={"leaves the site": "trained tensors without the head", "stays": "the fine-tuned model"},
)
def fedbabu(options: FinetuneOptions) -> FedAvg:
    """FedAvg of the body; a head that is frozen for good is refused."""
    declares = Declaration(
        required_roles=frozenset({"head"}), trains=all_but_the_head, finish_epochs=options.finetune_epochs
    )
    return FedAvg(options.weights, declares=declares, aggregate=options.aggregation())


class FedRepOptions(FedPerOptions):
    """Keys of `[strategy]` for fedrep."""

    head_epochs: float = Field(default=1.0, gt=0)  # of the head, before the rest trains as long as train says


def head_first(shares: Selector, epochs: float) -> Fit:
    """First what stays at the site, then what travels."""

    def fit(training: LocalTraining, variables: Tensors, objective: Objective | None, fixed: Tensors) -> Fitted:
        def stays(tag: Tag) -> bool:
            return training.active(tag) and not shares(tag)

        def travels(tag: Tag) -> bool:
            return training.active(tag) and shares(tag)

        head = training.fit(variables, objective=objective, only=stays, fixed=fixed, epochs=epochs, purpose="head")
        body = training.fit(head.variables, objective=objective, only=travels, fixed=fixed)
        return replace(
            body,
            loss=body.loss if body.num_steps else head.loss,
            num_steps=head.num_steps + body.num_steps,
            image_passes=head.image_passes + body.image_passes,
            step_lengths={**head.step_lengths, **body.step_lengths},
        )

    return fit


@register(
    "strategies",
    "fedrep",
    options=FedRepOptions,
    summary="in every round first the head, which stays at the site, then the rest, which is averaged",
    source="FedRep: Collins et al., ICML 2021, arXiv 2102.07078",
    facts={"leaves the site": "trained tensors without the head", "stays": "the head, trained tensors of last blocks"},
)
def fedrep(options: FedRepOptions) -> FedAvg:
    """FedPer in two phases; a head that is declared shared or frozen elsewhere is refused."""
    shares, epochs = below(options.personal_from_block), options.head_epochs
    return FedAvg(
        options.weights,
        shares=shares,
        declares=Declaration(
            required_roles=frozenset({"head"}),
            last_block=options.personal_from_block,
            passes=lambda round: (epochs, None),  # noqa: ARG005
        ),
        aggregate=options.aggregation(),
        fit=head_first(shares, epochs),
    )
