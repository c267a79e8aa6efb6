"""Stage 4, local training: the learning rate. In: progress of the federation, 0 to 1. Out: a factor.

Pure functions of progress, so that a schedule runs over the whole federation and needs no state between rounds.
"""

from __future__ import annotations

import math

from consilium.config import Schedule


def factor(schedule: Schedule, progress: float) -> float:
    """Share of the base learning rate at `progress` in [0, 1).

    Linear warm-up over the share `warmup`, then constant, a cosine or a line to zero. one_cycle rises along a cosine
    from 1/25 over the warm-up (0.3 unless given) and falls along a cosine to 1/250,000, as torch's OneCycleLR does.
    """
    if schedule.name == "one_cycle":
        return _one_cycle(progress, 0.3 if schedule.warmup is None else schedule.warmup)
    rising = 0.05 if schedule.warmup is None else schedule.warmup
    if progress < rising:
        return progress / rising
    rest = (progress - rising) / (1 - rising)
    return {"constant": 1.0, "cosine": (1 + math.cos(math.pi * rest)) / 2, "linear": 1 - rest}[schedule.name]


def _one_cycle(progress: float, rising: float) -> float:
    first, last = 1 / 25, 1 / 25 / 1e4
    if progress < rising:
        return _cosine(first, 1.0, progress / rising)
    return _cosine(1.0, last, (progress - rising) / (1 - rising))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def federation_progress(schedule: Schedule, round: int, rounds: int, step: int, steps: int) -> float:
    """Progress in the middle of `step` (from 0) of `steps` in `round` (from 1) of `rounds`; of the round if restart."""
    within = (step + 0.5) / steps
    return within if schedule.restart else (round - 1 + within) / rounds
