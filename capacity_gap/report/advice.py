"""A recommendation: the rungs of a ladder, what a fit says of each, on what grounds. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from capacity_gap.models.ladders import Family
from capacity_gap.settings.scales import format_scale

BOUNDS = "No rung is recommended: nothing was established. Who must choose takes"
BEYOND = "extrapolated: beyond the teachers of the fit"
EXTRAPOLATES = "this EXTRAPOLATES"  # how a warning begins that the question lies outside the fit
NEAR_OWN = (
    "Two teachers at two budgets near your own scale say more: `fit` then says at how many tokens the larger one "
    "begins to win."
)
HALF = 0.5  # probability of the fit's teachers together, below which larger ones are more likely to be best
NEARLY = 0.5  # of the best rung's regret, by which another may lose more and still be named with it
NEAR = 0.1  # log: sizes this close are one

Array = np.ndarray


@dataclass(frozen=True)
class Rung:
    """One teacher that could be taken. `flops` are the student's training and the teacher's forward passes.

    `probability` that it is the best of the ladder and `regret` (expected loss above the best, nats per token) are None
    where the fit cannot say; `allowed` counts the curves whose bounds do not rule it out, where only those are known.
    `beyond`: it is smaller or larger than all teachers of the fit; its probability and regret are then not printed.
    """

    name: str
    teacher_params: int
    ratio: float
    flops: float
    probability: float | None = None
    regret: float | None = None
    allowed: int | None = None
    note: str = ""
    beyond: bool = False

    @property
    def remarks(self) -> str:
        """What is said behind its row."""
        return "; ".join(filter(None, (self.note, BEYOND if self.beyond else "")))


@dataclass(frozen=True)
class Recommendation:
    """What to take, and on what grounds: `basis` is `joint`, `law`, `surface`, `bounds` or `nothing`.

    `doubt`: why the fit itself is not firm, such as `provisional: …`; empty where it is.
    """

    student_params: int
    family: str
    data_tokens: int
    axis: str
    basis: str
    best: str | None
    rungs: tuple[Rung, ...]
    findings: tuple[str, ...]
    warnings: tuple[str, ...]
    doubt: str = ""

    def summary(self) -> str:
        """The ladder as a table, then what is known and what is not."""
        per = self.data_tokens / self.student_params
        bounds = any(r.allowed is not None for r in self.rungs)
        lines = [
            f"Student of {format_scale(self.student_params)} parameters, family {self.family}, "
            f"{format_scale(self.data_tokens)} tokens ({per:.3g} per parameter). Basis: {self.basis}",
            f"{'rung':>8} {'teacher/student':>15} {'P(best)':>8} {'regret, nats':>12} "
            f"{'allowed ' if bounds else ''}{'FLOPs':>9}",
        ]
        for r in self.rungs:
            chance = "–" if r.probability is None or r.beyond else f"{r.probability:.0%}"
            regret = "–" if r.regret is None or r.beyond else f"{r.regret:.4f}"
            allowed = f"{'–' if r.allowed is None else r.allowed:>7} " if bounds else ""
            row = f"{r.name:>8} {r.ratio:>15.2f} {chance:>8} {regret:>12} {allowed}{r.flops:>9.2g}"
            lines.append(row + (f"  {r.remarks}" if r.remarks else ""))
        lines += [*_legend(bounds), *self.findings, *(f"WARNING: {w}" for w in self.warnings)]
        return "\n".join([*lines, "", self.advice])

    @property
    def advice(self) -> str:
        """What to take, as firmly as the fit allows; outside the fit, which runs would say more."""
        outside = any(w.startswith(EXTRAPOLATES) for w in self.warnings)
        if self.best is None or self.basis == "bounds":
            said = f"{BOUNDS} {self.best}." if self.best else "No rung is recommended."
            return f"{said} {NEAR_OWN}" if outside else said
        best = next(r for r in self.rungs if r.name == self.best)
        doubts = [
            *([self.doubt] if self.doubt else []),
            *([BEYOND] if best.beyond else []),
            *(["see the warnings"] if self.warnings else []),
        ]
        if not doubts:
            return f"Take {self.best}.{self._ties(best)}"
        guess = f"{self.best} is the best guess so far ({'; '.join(doubts)})."
        if best.probability is None or best.beyond:
            return guess
        least = "It has the least regret; its" if best.regret is not None else "Its"
        return f"{guess} {least} P(best) is {best.probability:.0%}.{self._ties(best)}"

    def _ties(self, best: Rung) -> str:
        """The rungs, the smallest first, whose regret is above the best one's by less than `NEARLY` of it."""
        inside = sum(r.probability or 0 for r in self.rungs if not r.beyond)
        if best.regret is None or inside < HALF:
            return ""
        rungs = sorted((r for r in self.rungs if not r.beyond and r is not best), key=lambda r: r.ratio)
        extra = {r.name: r.regret - best.regret for r in rungs if r.regret is not None}
        near = {name: more for name, more in extra.items() if more < NEARLY * best.regret}
        if not near:
            return ""
        flops = {r.name: r.flops for r in self.rungs}
        cheapest = min([best.name, *near], key=lambda name: flops[name])
        said = f"Nearly as good, at most {max(near.values()):.2g} nats worse on average: {', '.join(near)}"
        return f" {said}; {cheapest} costs fewest FLOPs."


def _legend(bounds: bool) -> list[str]:
    """The columns in words."""
    return [
        "P(best): probability that a rung gives the least loss of these. Regret: its expected loss above the least. "
        "–: the fit does not say, or the rung lies beyond its teachers.",
        "FLOPs: of the student's training and the teacher's forward passes."
        + (" Allowed: curves of the fit whose bounds do not rule a rung out." if bounds else ""),
        "",
    ]


@dataclass(frozen=True)
class Ask:
    """The question: rungs large enough, smallest first, as the fit's axis counts parameters."""

    family: Family
    student: int
    tokens: int
    axis: str
    rungs: tuple[Rung, ...]
    student_count: float  # on the axis

    @property
    def x(self) -> Array:
        """log teacher scale of each rung."""
        return np.log([r.ratio * self.student_count for r in self.rungs])


def scored(rungs: Sequence[Rung], excess: Array, *, known: bool) -> tuple[tuple[Rung, ...], str]:
    """Rungs with the share of draws [B, R] in which each has the least loss, and its mean loss above that.

    Where the size of losses is not known (`known`), nearness in log scale still tells which is the best.
    """
    chance = np.bincount(excess.argmin(axis=1), minlength=len(rungs)) / len(excess)
    regret = (excess - excess.min(axis=1, keepdims=True)).mean(axis=0)
    made = tuple(
        replace(r, probability=float(p), regret=float(g) if known else None)
        for r, p, g in zip(rungs, chance, regret, strict=True)
    )
    return made, made[int(regret.argmin() if known else chance.argmax())].name


def other_family(ask: Ask, families: Sequence[str]) -> list[str]:
    """A warning where no run of the fit is of the ladder that is asked about, or the fit does not say."""
    if not families:
        return ["the fit does not say of which family its runs are: make it from a table with a column family"]
    if ask.family.name in families:
        return []
    return [f"no run of the fit is of family {ask.family.name} (it saw {', '.join(families)})"]


def made_on(said: Sequence[str], tokens: Sequence[float], families: Sequence[str], more: Sequence[str] = ()) -> str:
    """On what a fit was made: parts of a sentence, the least and the largest budget if there are any, and families."""
    budgets = [f"{between(min(tokens), max(tokens))} tokens"] if tokens else []
    named = [f"family {', '.join(families)}"] if families else []
    return f"The fit was made on {', '.join([*said, *budgets, *named, *more])}."


def with_range(ask: Ask, smallest: float, largest: float) -> Ask:
    """The question with the rungs marked that lie beyond the teachers of a fit, in log sizes."""
    outside = (ask.x < smallest - NEAR) | (ask.x > largest + NEAR)
    return replace(ask, rungs=tuple(replace(r, beyond=bool(o)) for r, o in zip(ask.rungs, outside, strict=True)))


def answer(
    ask: Ask,
    basis: str,
    best: str | None,
    rungs: Sequence[Rung],
    findings: Sequence[str],
    warnings: Sequence[str],
    *,
    doubt: str = "",
) -> Recommendation:
    """The question with what was found."""
    asked = (ask.student, ask.family.name, ask.tokens, ask.axis)
    return Recommendation(*asked, basis, best, tuple(rungs), tuple(findings), tuple(warnings), doubt)


def short(count: float) -> str:
    """A scale to three digits."""
    return format_scale(int(float(f"{count:.3g}"))) if count >= 1000 else f"{count:.3g}"


def between(low: float, high: float) -> str:
    """Two scales as a range."""
    first, last = short(low), short(high)
    return first if first == last else f"{first} to {last}"
