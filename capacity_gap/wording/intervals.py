"""Intervals that may be open at an end, in words. Commands, pages and figures say them by these functions."""

import math
from collections.abc import Callable, Sequence

from capacity_gap.settings.scales import short_scale

End = float | None  # None or an infinity: nothing is known on that side
Name = Callable[[float], str]


def ends(interval: Sequence[End], least: float = 0.0) -> tuple[End, End]:
    """The two ends, None where one is open. A lower end that is no more than `least` is open: sizes are positive."""
    low, high = interval
    known = [None if end is None or not math.isfinite(end) else end for end in (low, high)]
    return (None if known[0] is None or known[0] <= least else known[0]), known[1]


def span(interval: Sequence[End], name: Name = short_scale, *, least: float = 0.0) -> str:
    """For sentences: `180k to 400k`, `at least 180k`, `at most 400k` or `no bound`."""
    return _said(ends(interval, least), name, "at least ", "at most ", "no bound")


def marks(interval: Sequence[End], name: Name = short_scale, *, least: float = 0.0) -> str:
    """For cells of tables: `180k to 400k`, `≥ 180k`, `≤ 400k` or `–`."""
    return _said(ends(interval, least), name, "≥ ", "≤ ", "–")


def _said(found: tuple[End, End], name: Name, at_least: str, at_most: str, none: str) -> str:
    low, high = found
    if low is not None and high is not None:
        first, last = name(low), name(high)
        return first if first == last else f"{first} to {last}"
    if low is not None:
        return at_least + name(low)
    return at_most + name(high) if high is not None else none
