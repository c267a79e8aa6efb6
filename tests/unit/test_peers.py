"""Updates beside their peers: what is broken is refused by name whoever comes first, and sites of any size are not."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilium.errors import ConfigError
from consilium.peers import FEWEST, Peers, Queue, Step, lengths_of
from tests import federation

LIMIT = 100.0
SIZES = st.lists(st.integers(20, 5000), min_size=3, max_size=12)


def judged(steps: list[Step], limit: float = LIMIT) -> list[str]:
    """Sites that are refused, where the answers come through the queue."""
    queue = Queue[str](Peers(limit))
    told = [pair for step in steps for pair in queue.put(step.site, step)] + list(queue.rest())
    assert [site for site, _ in told] == [step.site for step in steps]
    return [site for site, why in told if why is not None]


def steps(*pairs: tuple[float, int]) -> list[Step]:
    return [Step(f"s{at:03}", length, images, 0) for at, (length, images) in enumerate(pairs)]


@st.composite
def honest(draw: st.DrawFn) -> list[Step]:
    """Sites of 20 to 5000 images whose way grows with the steps they take: not at all (the same number of steps), with
    the root (noise) or in proportion; half to twice of that, as data differ."""
    power, unit = draw(st.sampled_from([0.0, 0.5, 0.75, 1.0])), draw(st.floats(1e-6, 1e3))
    sizes = draw(SIZES)
    luck = draw(st.lists(st.floats(0.5, 2), min_size=len(sizes), max_size=len(sizes)))
    return steps(*((unit * own * size**power, size) for size, own in zip(sizes, luck, strict=True)))


# ------------------------------------------------------------------------------------------------ who is refused
@given(honest())
def test_honest_sites_of_any_size_are_never_refused(sites: list[Step]) -> None:
    assert not judged(sites)


@given(honest(), st.data(), st.sampled_from([1e3, 1e4, 1e5, 1e6, 1e7]))
def test_what_is_broken_is_refused_wherever_it_stands_and_nobody_else(
    sites: list[Step], data: st.DataObject, times: float
) -> None:
    """Broken: its length is that of the longest times so much, and so is its length per image."""
    at = data.draw(st.integers(0, len(sites) - 1))
    rate = max(step.length / step.images for step in sites)
    length = times * max(max(step.length for step in sites), rate * sites[at].images)
    sites[at] = sites[at]._replace(length=length)
    assert judged(sites) == [sites[at].site]


@given(SIZES, st.data(), st.sampled_from([1e3, 1e4, 1e5, 1e6, 1e7]))
def test_a_multiple_of_an_update_among_sites_alike_is_refused(
    sizes: list[int], data: st.DataObject, times: float
) -> None:
    at = data.draw(st.integers(0, len(sizes) - 1))
    ways = [data.draw(st.floats(0.5, 2)) * (times if here == at else 1) for here in range(len(sizes))]
    assert judged(steps(*((way, 300) for way in ways))) == [f"s{at:03}"]


@given(honest(), st.data(), st.integers(-20, 20))
def test_the_unit_of_length_changes_nothing(sites: list[Step], data: st.DataObject, power: int) -> None:
    broken = [step._replace(length=step.length * data.draw(st.sampled_from([1, 50, 1e4]))) for step in sites]
    scale = 2.0**power
    other = [step._replace(length=step.length * scale, start=step.start * scale) for step in broken]
    assert judged(broken) == judged(other)


@given(honest(), st.data())
def test_the_first_ones_are_judged_together_whatever_their_order(sites: list[Step], data: st.DataObject) -> None:
    first = [step._replace(length=step.length * data.draw(st.sampled_from([1, 1e7]))) for step in sites[:FEWEST]]
    rest = sites[FEWEST:]
    assert len({tuple(sorted(judged([*turn, *rest]))) for turn in permutations(first)}) == 1


def test_of_two_the_longer_is_refused_and_one_has_no_peer() -> None:
    assert judged(steps((1e4, 10), (1, 10))) == ["s000"]
    assert judged(steps((1, 10), (1e4, 10))) == ["s001"]
    assert not judged(steps((1e9, 10)))


@pytest.mark.parametrize("images", [10, 10_000])
def test_it_must_be_out_of_proportion_in_both(images: int) -> None:
    """250 times the images and the length are no more per image; the same length from few images is no long way."""
    many = steps((1, 20), (1, 20), (250, 5000), (1, 20))
    few = steps((1, 5000), (1, 5000), (1, 20), (1, 5000))
    assert not judged(many)
    assert not judged(few)
    assert judged([*many, Step("x", 1e8, images, 0)]) == judged([*few, Step("x", 1e8, images, 0)]) == ["x"]


def test_what_is_shorter_than_the_model_is_not_refused_where_its_peers_fade() -> None:
    """Two sites have one class and a head of their own: they have learnt it, and their steps fade."""
    for fading in (1e-3, 1e-6, 1e-12, 0):
        peers = [step._replace(start=8.0) for step in steps((fading, 60), (fading / 2, 40), (0.3, 50))]
        assert not judged(peers)
        assert judged([*peers, Step("x", 1e4, 50, 8.0)]) == (["x"] if fading else [])


def test_where_most_stand_still_nobody_is_measured() -> None:
    assert not judged(steps((0, 10), (0, 10), (5, 10)))
    assert not judged(steps((0, 10), (5, 10), (0, 10), (1e9, 10)))
    assert judged(steps((0, 10), (5, 10), (5, 10), (1e9, 10))) == ["s003"]


def test_who_was_refused_is_no_peer_of_those_that_follow() -> None:
    """Six sites in a row that are broken do not become the measure of each other."""
    assert judged(steps(*[(1, 10)] * 3, *[(1e4, 10)] * 6)) == [f"s{at:03}" for at in range(3, 9)]


def test_zero_refuses_nobody() -> None:
    assert not judged(steps((1, 10), (1, 10), (1e30, 10)), limit=0)


def test_the_reason_says_how_long_and_how_long_it_might_be() -> None:
    (reason,) = (why for why in Peers(LIMIT).judge(steps((2, 10), (3, 10), (1e4, 10))) if why is not None)
    assert reason.splitlines()[:3] == [
        "the update of s002 is too long beside those of its peers",
        "  allowed: up to 300, where the median of this round is 3",
        "  received: 1e+04",
    ]
    assert "clip_updates" in reason
    assert "train.refuse_longer" in reason


@pytest.mark.parametrize("limit", [0.5, -1, math.nan, math.inf])
def test_bounds_that_are_none_are_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match="refuse_longer"):
        federation.configure(train={"refuse_longer": limit})


# ------------------------------------------------------------------------------------------------ who waits
def test_the_first_three_updates_wait_and_the_order_stays() -> None:
    queue = Queue[str](Peers(LIMIT))
    one = Step("x", 1, 1, 0)
    turns: list[tuple[str, Step | None]] = [("lost", None), ("a", one), ("none", None), ("b", one), ("c", one)]
    turns += [("d", one), ("away", None), ("e", one)]
    handed = [[site for site, _ in queue.put(site, step)] for site, step in turns]
    assert handed == [["lost"], [], [], [], ["a", "none", "b", "c"], ["d"], ["away"], ["e"]]
    assert not list(queue.rest())


def test_answers_without_a_length_never_wait() -> None:
    queue = Queue[str](Peers(LIMIT))
    assert [list(queue.put(site, None)) for site in "abcd"] == [[(site, None)] for site in "abcd"]


def test_what_waits_at_the_end_is_handed_on() -> None:
    queue = Queue[str](Peers(LIMIT))
    assert not list(queue.put("a", Step("a", 1, 1, 0)))
    assert not list(queue.put("lost", None))
    assert list(queue.rest()) == [("a", None), ("lost", None)]


# ------------------------------------------------------------------------------------------------ lengths
def test_the_length_is_that_of_all_steps_together() -> None:
    start = {"w": torch.zeros(2, 2), "b": torch.ones(3), "n": torch.zeros(2, dtype=torch.int64)}
    sent = {"w": torch.full((2, 2), 2.0), "b": torch.full((3,), 4.0), "n": torch.full((2,), 9), "new": torch.ones(7)}
    assert lengths_of(sent, start) == pytest.approx((math.sqrt(4 * 4 + 3 * 9), math.sqrt(3)))
    assert lengths_of(start, start) == pytest.approx((0, math.sqrt(3)))


def test_without_a_tensor_that_both_have_there_is_no_length() -> None:
    assert lengths_of({"mean": torch.ones(3)}, {"w": torch.ones(3)}) is None
    assert lengths_of({"w": torch.ones(5)}, {"w": torch.ones(3)}) is None
    assert lengths_of({}, {"w": torch.ones(3)}) is None


def test_large_numbers_do_not_overflow() -> None:
    assert lengths_of({"w": torch.full((4,), 1e30)}, {"w": torch.zeros(4)}) == pytest.approx((2e30, 0))
