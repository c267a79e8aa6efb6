"""Stage 10, report. In: numbers and a run's settings. Out: how the page writes them."""

from __future__ import annotations

from collections.abc import Sequence

from consilium.report.load import Settings

UNDEFINED = "\u2013"  # an en dash


def bytes_text(value: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def short(value: float) -> str:
    """A number on an axis."""
    return f"{value:.4g}"


def whole(value: float) -> str:
    """A round on an axis."""
    return f"{value:.0f}"


def count(number: int | None) -> str:
    """A whole number with thin spaces between thousands."""
    return UNDEFINED if number is None else f"{number:,}".replace(",", "\u202f")


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return UNDEFINED
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def shape(sizes: Sequence[int | None]) -> str:
    """The shape of a tensor; a free dimension is "any"."""
    return " \u00d7 ".join("any" if size is None else str(size) for size in sizes) or "scalar"


def tuner_text(settings: Settings) -> str:
    """The tuners' names with their rank, if they have one."""
    named = [(tuner.name, (tuner.model_extra or {}).get("rank")) for tuner in settings.tuner]
    return " + ".join(f"{name} r={rank}" if rank else name for name, rank in named) or UNDEFINED


def strategy_text(settings: Settings) -> str:
    """The strategy's name."""
    return settings.strategy.name if settings.strategy else UNDEFINED


def recipe(settings: Settings) -> str:
    """Tuners and strategy, of every stage."""
    each = settings.stages or [settings]
    return ", then ".join(f"{tuner_text(one)} combined by {strategy_text(one)}" for one in each)
