"""The fitted law as a frozen result, with its text and table output."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from capacity_gap.fit.curse import Curse
from capacity_gap.fit.optimum import Optimum
from capacity_gap.fit.regression import Agreement, Estimate, Form
from capacity_gap.fit.valley import LEAST_TEACHERS
from capacity_gap.store.files import write_text
from capacity_gap.wording.curve_words import CurveWords, curve_words, ladder
from capacity_gap.wording.fit_words import law_words
from capacity_gap.wording.intervals import marks

LEAST_STUDENTS = 3
Pair = tuple[float, float] | None


@dataclass(frozen=True)
class LawFit:
    """The fit of a whole table. Estimates are None unless `status` is `law`.

    `status`: `law`; `no_optimum` (curves without a minimum that beats noise); `censored` (optima lie at or beyond the
    grid's ends); `too_few` (under three students). `ratio` is r of `N_T* = r·N_S`; `slope` is b of `N_T* = a·N_S^b`
    (1 if the ratio is one constant); intervals are 95 %, from the bootstrap of the whole chain.
    """

    status: str
    ratio: float | None
    ratio_interval: Pair
    slope: float | None
    slope_interval: Pair
    axis: str
    optima: tuple[Optimum, ...]
    null_p: float | None  # share of permutations with as much curvature
    without_outer_rungs: float | None  # the ratio when each curve's largest and smallest teacher are dropped
    without_outer_interval: Pair = None
    rests_on: tuple[float, ...] = ()  # teachers without which the claim falls
    rests_on_outer: bool = False  # whether it falls without each curve's largest and smallest teacher
    method: str = "asymmetric"
    kappa: float = 0.0  # asymmetry of the curves (`valley.py`)
    forms: dict[str, Form] = field(default_factory=dict)
    effects: dict[str, Estimate] = field(default_factory=dict)  # of covariates on log N_T*
    agreements: tuple[Agreement, ...] = ()
    tests: dict[str, float] = field(default_factory=dict)  # hypothesis → p
    curses: tuple[Curse, ...] = ()
    draws: tuple[tuple[float, float], ...] = ()  # (log a, b) of the power law, or (log r, 1) where it has none
    notes: tuple[str, ...] = ()

    def predict(self, student_params: float) -> float:
        """The best teacher's parameters for a student of `student_params`.

        Raises:
            ValueError: there is no law to predict from.
        """
        if self.ratio is None:
            raise ValueError(f"there is no law to predict from: status {self.status}. {self.verdict()}")
        return self.ratio * student_params

    def verdict(self) -> str:
        """The result in one or two sentences."""
        return law_words(self, students=LEAST_STUDENTS, teachers=LEAST_TEACHERS, doubts=_doubts(self))

    def sentences(self, *, measure: str = "loss") -> list[str]:
        """For each curve what is known of its best teacher, and what to run next. `measure`: what was minimised."""
        return [str(found) for found in self.words(measure=measure)]

    def words(self, *, measure: str = "loss") -> list[CurveWords]:
        """The same in parts. Rungs are named where the axis is that of their names."""
        known = {o.family: ladder(o.family) if self.axis == "total" else {} for o in self.optima}
        return [curve_words(o, known[o.family], measure=measure) for o in self.optima]

    def summary(self) -> str:
        """A table of the optima and the estimates, with the verdict."""
        return summary(self)

    def to_json(self) -> str:
        """The whole fit as JSON; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "LawFit":
        """Reads what `to_json` wrote."""
        given = json.loads(text)
        given["optima"] = tuple(Optimum(**_tuples(o)) for o in given["optima"])
        given["curses"] = tuple(Curse(**_tuples(c)) for c in given.get("curses", ()))
        given["forms"] = {k: _form(f) for k, f in given.get("forms", {}).items()}
        given["effects"] = _estimates(given.get("effects", {}))
        given["agreements"] = tuple(
            Agreement(**{**a, "ratios": _estimates(a["ratios"])}) for a in given.get("agreements", ())
        )
        given["draws"] = tuple(tuple(d) for d in given.get("draws", ()))
        return cls(**_tuples(given))

    def save(self, file: Path) -> None:
        """Writes the JSON, whole or not at all."""
        write_text(file, self.to_json() + "\n")


def _tuples(given: dict[str, Any]) -> dict[str, Any]:
    return {k: _tuple(v) for k, v in given.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _estimates(given: dict[str, Any]) -> dict[str, Estimate]:
    return {k: Estimate(**_tuples(e)) for k, e in given.items()}


def _form(given: dict[str, Any]) -> Form:
    return Form(**{**given, "parameters": _estimates(given["parameters"])})


def _doubts(law: LawFit) -> list[str]:
    """The evidence against one constant ratio."""
    said = []
    if law.tests.get("b = 1", 1.0) < 0.05 and law.slope is not None:
        said.append(f"the ratio is not constant over students (exponent {law.slope:.2f})")
    return said + [f"it depends on {a.by} (p = {a.p:.2g})" for a in law.agreements if a.p < 0.05]


def summary(law: LawFit) -> str:
    """Optima, estimates, tests, what was left out, and the verdict."""
    blocks = [
        [_title(law)],
        _optima(law),
        _forms(law),
        _effects(law),
        _checks(law),
        _curses(law),
        [f"note: {n}" for n in law.notes],
        ["", law.verdict()],
    ]
    return "\n".join(line for block in blocks for line in block)


def _title(law: LawFit) -> str:
    return f"Capacity-gap law, parameters: {law.axis}, status: {law.status}, form: {law.method} (κ = {law.kappa:.2g})"


def _optima(law: LawFit) -> list[str]:
    lines = [
        f"{'student':>10} {'data':>10} {'init':>7} {'teachers':>8} {'status':>14} {'best teacher':>13} "
        f"{'95 % interval':>21} {'ratio':>6}"
    ]
    for o in law.optima:
        best = "–" if o.teacher_params is None else f"{o.teacher_params:,.0f}"
        ratio = "–" if o.ratio is None else f"{o.ratio:.2f}"
        tokens = "–" if o.data_tokens is None else f"{o.data_tokens:,}"
        lines.append(
            f"{o.student:>10} {tokens:>10} {o.init or '–':>7} {o.teachers:>8} {o.status:>14} {best:>13} "
            f"{marks(o.interval, '{:,.0f}'.format):>21} {ratio:>6}"
        )
    return lines


def _number(estimate: Estimate) -> str:
    low, high = estimate.interval
    return f"{estimate.value:.4g} ({low:.4g} to {high:.4g})"


def _forms(law: LawFit) -> list[str]:
    if not law.forms:
        return []
    lines = ["", f"{'law':<22} {'left-out error, log N_T*':>25}   estimates (95 %)"]
    for form in law.forms.values():
        off = "–" if form.left_out_error is None else f"{form.left_out_error:.3f}"
        values = ", ".join(f"{k} = {_number(e)}" for k, e in form.parameters.items())
        lines.append(f"{form.formula:<22} {off:>25}   {values}")
    return lines


def _effects(law: LawFit) -> list[str]:
    lines = [f"effect of {name} on log N_T*: {_number(e)}" for name, e in law.effects.items()]
    for a in law.agreements:
        ratios = ", ".join(f"{level}: {_number(e)}" for level, e in a.ratios.items())
        lines.append(f"ratio by {a.by}: {ratios}; the same? p = {a.p:.2g}, I² = {a.i2:.0%}")
    return lines


def _checks(law: LawFit) -> list[str]:
    lines = [f"{name}: p = {p:.2g}" for name, p in law.tests.items()]
    if law.without_outer_rungs is not None and law.without_outer_interval is not None:
        low, high = law.without_outer_interval
        lines.append(f"ratio without each curve's outer rungs: {law.without_outer_rungs:.2f} ({low:.2f} to {high:.2f})")
    if law.null_p is not None:
        lines.append(f"permutation null: p = {law.null_p:.3f}")
    return lines


def _curses(law: LawFit) -> list[str]:
    """In how many curves the largest teacher is worse than the best, beyond doubt."""
    if not law.curses:
        return []
    shown = [c for c in law.curses if c.p < 0.05]
    line = f"the largest teacher is worse than the best in {len(shown)} of {len(law.curses)} curves (p < 0.05 each)"
    worst = max(shown, key=lambda c: c.excess, default=None)
    if worst is None:
        return [line]
    low, high = worst.interval
    return [f"{line}; most for student {worst.student}: {worst.excess:.3f} nats ({low:.3f} to {high:.3f})"]
