"""What a fit of a whole table says, in a sentence or two: the law of single curves, and the model of all cells."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from capacity_gap.settings.scales import counted, short_scale
from capacity_gap.wording.curve_words import COUNTED, NUMBERS, OfCurve, listed
from capacity_gap.wording.intervals import End, span

# The status of a fit in a few words, for headings.
LAWS = {
    "law": "a ratio law",
    "no_optimum": "no law: no best teacher stands out from noise",
    "censored": "no law: the best teachers are at the ends of the ladder",
    "too_few": "no law: too few students or teachers",
}
JOINTS = {
    "law": "a best teacher, and no single rung decides it",
    "provisional": "a best teacher, as a hypothesis",
    "break_even": "no best teacher, but a break-even budget",
    "no_optimum": "no best teacher and no break-even budget",
}
ESTABLISHED = ("law", "provisional")  # of `JOINTS`: there is an optimum, so rungs have a probability of being best


class OfLaw(Protocol):
    """What is read of a law (`fit.law_fit.LawFit`)."""

    @property
    def status(self) -> str:
        """One of `LAWS`."""
        ...

    @property
    def ratio(self) -> float | None:
        """The best teacher over its student, where a law is claimed."""
        ...

    @property
    def ratio_interval(self) -> tuple[float, float] | None:
        """Of it, 95 %."""
        ...

    @property
    def null_p(self) -> float | None:
        """Share of permutations with as much curvature."""
        ...

    @property
    def optima(self) -> Sequence[OfCurve]:
        """Of the curves."""
        ...

    @property
    def rests_on(self) -> Sequence[float]:
        """Teachers without which the claim falls."""
        ...

    @property
    def rests_on_outer(self) -> bool:
        """Whether it falls without each curve's outer teachers."""
        ...


def law_words(law: OfLaw, *, students: int, teachers: int, doubts: Sequence[str] = ()) -> str:
    """The law of single curves in a sentence or two.

    Args:
        law: the fit.
        students: that a law takes at least.
        teachers: that a curve takes at least.
        doubts: evidence against one constant ratio.
    """
    of = f"{curves_words(law.optima)}."
    if law.status == "law" and law.ratio is not None and law.ratio_interval is not None:
        low, high = law.ratio_interval
        claim = f"The best teacher has {law.ratio:.2f}× the student's parameters (95 % {low:.2f} to {high:.2f})"
        null = f"permuted data do as well in {law.null_p:.1%} of cases"
        return f"{claim}; {null}. {of}" + (f" But {' and '.join(doubts)}." if doubts else "")
    if law.rests_on:
        names = listed([f"{t:,.0f}" for t in law.rests_on])
        return (
            f"No ratio is claimed: without the teacher of {names} parameters, fewer than {NUMBERS[students]} students "
            f"keep a best teacher inside the ladder. {of}"
        )
    if law.rests_on_outer:
        return (
            "No ratio is claimed: without each curve's largest and smallest teacher, fewer than "
            f"{NUMBERS[students]} students keep a best teacher inside the ladder. {of}"
        )
    reasons = {
        "too_few": f"No law can be fitted: it takes at least {students} students, each under at least {teachers} "
        f"teachers. {of}",
        "censored": f"No ratio is claimed: the best teachers are at or beyond the ends of the ladder. {of} "
        f"{_extend(law.optima)}",
        "no_optimum": f"No ratio is claimed: fewer than {NUMBERS[students]} students have a best teacher that stands "
        f"out from noise, or permuted data do as well. {of}",
    }
    return reasons[law.status]


def curves_words(optima: Sequence[OfCurve]) -> str:
    """How many curves there are of each kind: `Of 2 curves: 1 flat within noise, 1 with only a lower bound`."""
    counts = sorted(Counter(o.status for o in optima).items())
    seen = ", ".join(f"{n} {COUNTED.get(status, status)}" for status, n in counts)
    return f"Of {counted(len(optima), 'curve')}: {seen}"


def _extend(optima: Sequence[OfCurve]) -> str:
    """On which side the ladder should grow."""
    counts = Counter(o.status for o in optima)
    sides = [(counts[status], word) for status, word in (("left_edge", "smaller"), ("right_edge", "larger"))]
    said = [f"{word} teachers for {counted(n, 'curve')}" for n, word in sorted(sides, reverse=True) if n]
    return f"Try {listed(said)}."


def joint_words(
    status: str,
    *,
    ratio: tuple[float, tuple[End, End]],
    rests_on: Sequence[str],
    pair: tuple[float, float] | None,
    even: tuple[float, tuple[End, End]] | None,
    missing: str,
) -> str:
    """The model of all cells in a sentence or two.

    Args:
        status: of the fit.
        ratio: the best teacher over its student, with its set.
        rests_on: rungs without which there is no optimum.
        pair: the two teachers of the break-even budget.
        even: that budget with its set.
        missing: what would decide.
    """
    if status in ("law", "provisional"):
        value, found = ratio
        said = f"the best teacher has {value:.2g} times its student's parameters (95 % {span(found, _two)})"
        if status == "law" or not rests_on:
            return " ".join(filter(None, [f"{said}.", missing]))
        return f"{said}, but without {' or '.join(rests_on)} there is no optimum."
    if status == "break_even" and pair and even and math.isfinite(even[0]):
        small, large = map(short_scale, pair)
        return (
            f"above {short_scale(even[0])} tokens (95 % {span(even[1])}) a teacher of {large} is better than one of "
            f"{small}. {missing}"
        )
    return f"no optimum and no break-even budget is established. {missing}"


def _two(value: float) -> str:
    return f"{value:.2g}"
