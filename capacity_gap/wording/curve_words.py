"""What one curve says of its student's best teacher, and which cells to run next, in one sentence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from capacity_gap.models.ladders import FAMILIES
from capacity_gap.settings.scales import short_scale
from capacity_gap.wording.intervals import End, span

Rungs = Mapping[str, float]  # parameters by name

# A curve's status in a few words, for figures and headings.
STATUSES = {
    "interior": "best teacher inside the ladder",
    "left_edge": "only an upper bound on the best teacher",
    "right_edge": "only a lower bound on the best teacher",
    "flat": "no difference beyond noise",
    "not_unimodal": "worst teacher in the middle",
    "too_few": "too few teachers",
}
# The same of several curves, behind their number.
COUNTED = {
    "interior": "with a best teacher inside the ladder",
    "left_edge": "with only an upper bound",
    "right_edge": "with only a lower bound",
    "flat": "flat within noise",
    "not_unimodal": "with the worst teacher in the middle",
    "too_few": "with too few teachers",
}
USUAL = "as usual"  # how `fit.frame` calls settings that are all the default
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ENOUGH = 4  # teachers of a curve, as `fit.valley` takes them
SEEDS = 3  # from which noise between teachers can be seen
STEP = math.log(1.4)  # the least step to a teacher beyond those that were tried
BETWEEN = math.log(1.25)  # and to one that fills a gap
NAMED = math.log(1.02)  # a size this close to a rung's is the rung
SURE = 0.975  # as `fit.optimum` has it
WIDE = 2.0  # an interval of a larger factor is worth narrowing
LARGER = 1.02  # teachers larger than their student by less are no evidence


class OfCurve(Protocol):
    """What is read of an optimum (`fit.optimum.Optimum`)."""

    @property
    def student(self) -> str:
        """Its name, such as 60k."""
        ...

    @property
    def student_params(self) -> float:
        """Its parameters, as the fit's axis counts them."""
        ...

    @property
    def teacher_params(self) -> float | None:
        """Those of the best teacher, where one is located."""
        ...

    @property
    def interval(self) -> tuple[End, End]:
        """Of the best teacher, 95 %."""
        ...

    @property
    def status(self) -> str:
        """One of `STATUSES`."""
        ...

    @property
    def family(self) -> str | None:
        """The ladder's name."""
        ...

    @property
    def data_tokens(self) -> int | None:
        """The budget."""
        ...

    @property
    def curve(self) -> str:
        """What tells the curve from the others."""
        ...

    @property
    def tried(self) -> Sequence[tuple[float, float, int]]:
        """Parameters, mean loss and runs of each teacher."""
        ...

    @property
    def falls(self) -> float | None:
        """Share of draws whose slope is negative at the first teacher."""
        ...

    @property
    def rises(self) -> float | None:
        """Share of draws whose slope is positive at the last one."""
        ...


@dataclass(frozen=True)
class CurveWords:
    """The parts of a sentence about one curve. `tried` and `more` may be empty."""

    curve: str  # 60k at 300k tokens
    claim: str  # the best teacher has at least 177k parameters
    why: str  # the loss is not shown to rise at the largest tried, 400k
    tried: str  # the best tried was 270k
    more: str  # 400k and 600k, three seeds

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        more = f"next: {self.more}" if self.more else ""
        return f"{self.curve}: {'; '.join(part for part in (self.claim + why, self.tried, more) if part)}."


def ladder(family: str | None) -> Rungs:
    """The rungs of a family that is known here; of any other none."""
    if family is None or family not in FAMILIES:
        return {}
    return {name: float(size) for name, size in FAMILIES[family].params.items()}


def curve_words(o: OfCurve, rungs: Rungs, *, measure: str = "loss") -> CurveWords:
    """One curve in words.

    Args:
        o: what was found on it.
        rungs: teachers that could be run.
        measure: what is lowest under the best teacher.
    """
    sizes = _Sizes(o, rungs)
    best = min(o.tried, key=lambda t: t[1], default=None)
    claim, why = _claim(o, sizes, measure)
    tried = f"the best tried was {sizes.name(best[0])}" if best else ""
    return CurveWords(o.curve or _place(o.student, o.data_tokens), claim, why, tried, _more(o, sizes))


def curve_names(keys: Sequence[Mapping[str, Any]]) -> list[str]:
    """Curves by student and budget, and by whatever else tells them apart: `60k at 300k tokens, init random`."""
    others = [n for n in varied(keys) if n != "data_tokens"]
    return [
        ", ".join([_place(str(k["student"]), k.get("data_tokens")), *(setting_words(n, k.get(n)) for n in others)])
        for k in keys
    ]


def arm_names(keys: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells curves apart, the student aside: `300k tokens, init random`."""
    names = varied(keys)
    return [", ".join(setting_words(n, key.get(n)) for n in names) or "all runs" for key in keys]


def varied(keys: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which curves differ, the student aside."""
    names = dict.fromkeys(n for key in keys for n in key if n != "student")
    return [n for n in names if len({str(key.get(n)) for key in keys}) > 1]


def setting_words(name: str, value: Any) -> str:
    """One setting of a curve: `300k tokens`, `init random`."""
    if name == "data_tokens" and value == value and value is not None:
        return f"{short_scale(float(value))} tokens" if value else "no distillation"
    if name == "settings":
        return "default settings" if value in (None, USUAL) else str(value)
    return f"{name.replace('_', ' ')} {value}"


def _place(student: str, tokens: Any) -> str:
    if tokens is None or tokens != tokens:
        return student
    return f"{student} at {short_scale(float(tokens))} tokens" if tokens else f"{student} without distillation"


class _Sizes:
    """Teachers of one student: those that were tried, and those of the ladder, by names."""

    def __init__(self, o: OfCurve, rungs: Rungs) -> None:
        self.rungs, self.known = rungs, bool(rungs)
        self.tried = [t[0] for t in o.tried]
        self.runs = {t[0]: int(t[2]) for t in o.tried}
        larger = (float(n) for n in rungs.values() if n > LARGER * o.student_params)
        self.new = sorted(n for n in larger if all(abs(math.log(n / t)) > NAMED for t in self.tried))

    def name(self, size: float) -> str:
        """The rung of this size, or the size."""
        near = [(abs(math.log(n / size)), name) for name, n in self.rungs.items() if abs(math.log(n / size)) <= NAMED]
        return min(near)[1] if near else short_scale(size)

    def seeds(self, chosen: Sequence[float]) -> int:
        """How many runs under each of some teachers say more: three, or twice what there are."""
        runs = min((self.runs.get(size, 0) for size in chosen), default=0)
        return SEEDS if runs < SEEDS else 2 * runs

    def beyond(self, *, up: bool) -> list[float]:
        """The teacher at one end where it has few seeds, and those of the ladder beyond it, two in all."""
        at = max(self.tried) if up else min(self.tried)
        found = [at] if self.runs[at] < SEEDS else []
        outside = [n for n in self.new if n > at] if up else [n for n in reversed(self.new) if n < at]
        for size in outside:
            if abs(math.log(size / at)) >= STEP:
                found, at = [*found, size], size
        return sorted((found or outside[-1:])[:2])


def _claim(o: OfCurve, sizes: _Sizes, measure: str) -> tuple[str, str]:
    """What is known of the best teacher, and on what grounds."""
    if o.status == "interior" and o.teacher_params is not None:
        over = f"{o.teacher_params / o.student_params:.3g} times the student's"
        return f"the best teacher has {short_scale(o.teacher_params)} parameters", f"95 % {span(o.interval)}; {over}"
    if o.status in ("left_edge", "right_edge"):
        return f"the best teacher has {span(o.interval)} parameters", _edge(o, sizes, measure)
    why = {
        "flat": f"no difference in {measure} between them is beyond noise",
        "not_unimodal": f"the {measure} rises from the smallest and falls towards the largest",
        "too_few": f"{_counted(len(o.tried), 'teacher')} tried, and a curve alone takes {NUMBERS[ENOUGH]}",
    }
    return "no teacher is shown to be best", why.get(o.status, "") if o.tried else ""


def _edge(o: OfCurve, sizes: _Sizes, measure: str) -> str:
    """Which end of the ladder leaves the best teacher open."""
    if not o.tried:
        return ""
    if o.status == "right_edge":
        still = o.rises is not None and o.rises <= 1 - SURE
        said = "still falls" if still else "is not shown to rise"
        return f"the {measure} {said} at the largest tried, {sizes.name(max(sizes.tried))}"
    already = o.falls is not None and o.falls <= 1 - SURE
    said = "already rises" if already else "is not shown to fall"
    return f"the {measure} {said} at the smallest tried, {sizes.name(min(sizes.tried))}"


def _more(o: OfCurve, sizes: _Sizes) -> str:
    """Which teachers to run next for this curve, and how often."""
    if not o.tried:
        return ""
    if o.status in ("left_edge", "right_edge"):
        return _more_beyond(o, sizes, up=o.status == "right_edge")
    if o.status == "too_few":
        return _more_teachers(o, sizes)
    if o.status == "interior":
        return _more_inside(o, sizes)
    by_loss = sorted(o.tried, key=lambda t: t[1])
    ends = {min(sizes.tried), max(sizes.tried)}
    chosen = {by_loss[-1][0]} if o.status == "not_unimodal" else {*ends, by_loss[0][0]}
    return _seeds_of(sorted(chosen), sizes)


def _more_beyond(o: OfCurve, sizes: _Sizes, *, up: bool) -> str:
    if found := sizes.beyond(up=up):
        return _seeds_of(found, sizes)
    if up:
        at = max(sizes.tried)
        beyond = f", beyond the rungs of {o.family}" if sizes.known else ""
        return f"larger teachers, of about {short_scale(1.5 * at)} and {short_scale(2.25 * at)}{beyond}"
    at = min(sizes.tried)
    if sizes.known or at < 1.4 * o.student_params:
        return "nothing, since no smaller teacher is larger than the student"
    return f"smaller teachers, of about {short_scale(at / 1.4)}"


def _more_teachers(o: OfCurve, sizes: _Sizes) -> str:
    """Rungs that complete a curve, the nearest to the best one tried first."""
    best, lacking = min(o.tried, key=lambda t: t[1])[0], max(1, ENOUGH - len(o.tried))
    taken, found = [*sizes.tried], list[float]()
    for size in sorted(sizes.new, key=lambda n: abs(math.log(n / best))):
        if all(abs(math.log(size / t)) >= BETWEEN for t in taken):
            taken, found = [*taken, size], [*found, size]
    if found:
        return _seeds_of(sorted(found[:lacking]), sizes)
    return f"{NUMBERS[lacking]} more teacher{'s' * (lacking > 1)}, {NUMBERS[SEEDS]} seeds"


def _more_inside(o: OfCurve, sizes: _Sizes) -> str:
    """Rungs inside a wide interval, new ones if there are any; of a narrow one the rung nearest to the optimum."""
    low, high = o.interval
    assert o.teacher_params is not None
    if low is not None and high is not None and high <= WIDE * low:
        rungs = sorted(sizes.rungs.values(), key=lambda n: abs(math.log(n / o.teacher_params)))  # type: ignore[operator]
        return f"nothing; the nearest rung is {sizes.name(rungs[0])}" if rungs else "nothing"
    for some in (sizes.new, sizes.tried):
        inside = [n for n in some if (low or 0) <= n <= (high or math.inf)]
        nearest = sorted(inside, key=lambda n: abs(math.log(n / o.teacher_params)))[:2]  # type: ignore[operator]
        if nearest:
            return _seeds_of(sorted(nearest), sizes)
    return "teachers inside that interval"


def _seeds_of(chosen: Sequence[float], sizes: _Sizes) -> str:
    names, seeds = [sizes.name(size) for size in chosen], sizes.seeds(chosen)
    said = NUMBERS[seeds] if seeds < len(NUMBERS) else f"{seeds}"
    return f"{listed(names)}, {said} seeds"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def _counted(count: int, what: str) -> str:
    number = NUMBERS[count] if count < len(NUMBERS) else str(count)
    return f"{number} {what}{' was' if count == 1 else 's were'}"
