"""From optima to a law: regressions of log N_T* on log N_S and covariates, repeated on every draw of the chain.

    log N_T* = log r + log N_S (+ covariates)        `proportional`: N_T* = r·N_S
    log N_T* = log a + b·log N_S (+ covariates)      `power`
    N_T* = a + r·N_S                                 `affine`, after the covariates' effects are taken out

Each optimum weighs by its own error and the scatter between students; optima at the end of a grid are bounds
(`estimators/censored.py`). A draw of the chain moves all optima together, so what they share through their teachers is
in every interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from capacity_gap.estimators.censored import ABOVE, BELOW, SEEN, scatter, tobit
from capacity_gap.fit.optimum import Located
from capacity_gap.records.columns import BY

NAMED = ("interior", "left_edge", "right_edge")  # what enters a law: an optimum, or a bound
END = 1e-9  # in log scale


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, of 95 % where nothing else is asked for."""

    value: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, value: float, draws: np.ndarray) -> "Estimate":
        """From a point estimate and its draws."""
        low, high = np.quantile(draws, [0.025, 0.975])
        return cls(float(value), (float(low), float(high)))


@dataclass(frozen=True)
class Form:
    """One law: its parameters, and how far off it predicts left-out students (root mean square in log N_T*)."""

    name: str
    formula: str
    parameters: dict[str, Estimate]
    left_out_error: float | None


@dataclass(frozen=True)
class Agreement:
    """Ratios by level of one column, and whether they are one: I² (share of their scatter beyond error) and p."""

    by: str
    ratios: dict[str, Estimate]
    i2: float
    p: float


@dataclass(frozen=True)
class Responses:
    """The optima that enter a law, and their draws: log N_T* or a bound on it."""

    located: Located
    index: np.ndarray  # [C] curves of `located`
    log_student: np.ndarray  # [C]
    y: np.ndarray  # [C]
    draws: np.ndarray  # [B, C]
    error: np.ndarray  # [C]

    @classmethod
    def of(cls, located: Located, index: Sequence[int]) -> "Responses":
        """The named curves' optima."""
        chosen = np.asarray(index, dtype=int)
        draws = located.best_draws[:, chosen]
        # Half of the middle 68 %: one standard deviation, unmoved by draws that pile up at the grid's ends.
        spread = np.diff(np.quantile(draws, [0.16, 0.84], axis=0), axis=0)[0] / 2
        inside = _kind(located, chosen, located.best[chosen][None])[0] == SEEN
        typical = float(np.median(spread[inside])) if inside.any() else 0.1
        # Draws of an optimum beyond the grid pile up at its end, so their own spread is too small.
        error = np.maximum(np.where(inside, spread, np.maximum(spread, typical)), 1e-4)
        students = np.log([located.found[i].student_params for i in chosen])
        return cls(located, chosen, students, located.best[chosen], draws, error)

    def kind(self, y: np.ndarray) -> np.ndarray:
        """Which of the responses [B, C] are seen, and which are bounds."""
        return _kind(self.located, self.index, y)

    @property
    def students(self) -> np.ndarray:
        """Each curve's student, by name [C]."""
        return np.array([str(s) for s in self.keys("student")])

    @property
    def seen(self) -> np.ndarray:
        """Which are optima and not bounds [C]."""
        return self.kind(self.y[None])[0] == SEEN

    def keys(self, name: str) -> list[Any]:
        """Each curve's value of a column."""
        return [self.located.found[i].key.get(name) for i in self.index]

    def part(self, keep: np.ndarray) -> "Responses":
        """Some of them."""
        return Responses(
            self.located, self.index[keep], self.log_student[keep], self.y[keep], self.draws[:, keep], self.error[keep]
        )


def _kind(located: Located, index: np.ndarray, y: np.ndarray) -> np.ndarray:
    grid = located.design.grid
    low, high = y <= grid.first[index] + END, y >= grid.last[index] - END
    return np.where(high, ABOVE, np.where(low, BELOW, SEEN))


@dataclass(frozen=True)
class Fitted:
    """Coefficients [P], their draws [B, P], and the scatter between students beyond error."""

    beta: np.ndarray
    draws: np.ndarray
    omega: float


def regress(responses: Responses, X: np.ndarray, offset: np.ndarray, *, seed: int = 0) -> Fitted:
    """`log N_T* − offset = Xβ`, by Tobit, on the data and on each draw."""
    y = responses.y - offset
    kind = responses.kind(responses.y[None])
    beta = tobit(X, y[None], kind, responses.error)[0]
    seen = kind[0] == SEEN
    students, df = responses.students, max(1, len(set(responses.students[seen])) - X.shape[1])
    omega = scatter(*_by_student((y - X @ beta)[seen], responses.error[seen], students[seen]), X.shape[1])
    total = np.hypot(responses.error, omega)
    if omega > 0:
        beta = tobit(X, y[None], kind, total)[0]
    kinds = responses.kind(responses.draws)
    drawn = responses.draws - offset
    if omega > 0:
        rng, place = np.random.default_rng(seed), np.unique(students, return_inverse=True)[1]
        effect = rng.standard_normal((len(drawn), place.max() + 1))[:, place]  # one a student, at every budget
        spread = omega * np.sqrt(df / rng.chisquare(df, (len(drawn), 1))) * effect
        # Bounds are not scattered: they lie where the grid ends.
        drawn = drawn + np.where(kinds == SEEN, spread, 0.0)
    return Fitted(beta, tobit(X, drawn, kinds, total), omega)


def _by_student(residual: np.ndarray, error: np.ndarray, student: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each student's mean residual, weighted, and its standard error: curves of one student are no replicates of it."""
    weight, place = 1 / error**2, np.unique(student, return_inverse=True)[1]
    total = np.bincount(place, weight)
    return np.bincount(place, weight * residual) / total, 1 / np.sqrt(total)


def independent(columns: np.ndarray, base: np.ndarray) -> list[int]:
    """Which columns [C, P] add something to `base` [C, Q] and to those before them: over a hundredth of themselves."""
    kept: list[int] = []
    for i in range(columns.shape[1]):
        before = np.hstack([base, columns[:, kept]])
        rest = columns[:, i] - before @ np.linalg.lstsq(before, columns[:, i], rcond=None)[0]
        if np.linalg.norm(rest) > 0.01 * np.linalg.norm(columns[:, i]):
            kept.append(i)
    return kept


def covariates(responses: Responses, room: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Columns [C, P] for what varies between curves beyond the student, their names, and those left out.

    log data scale is centred, other columns are coded by deviation from their mean, so that the ratio is that of the
    average setting. A column that the seen optima do not separate from the student's size or from other covariates
    (tokens in proportion to parameters) is left out.
    """
    seen, N = responses.seen, responses.log_student
    base = np.stack([np.ones_like(N), N], 1)
    Z = np.zeros((len(N), 0))
    names: list[str] = []
    left: list[str] = []
    for name in BY:
        values = responses.keys(name)
        levels = sorted({str(v) for v in values if v is not None})
        if len(levels) < 2:
            continue
        if any(v is None for v in values):
            left.append(f"{name} (not given for every curve)")
            continue
        made = _columns(name, values, levels)
        new = np.stack(list(made.values()), 1)
        if Z.shape[1] + new.shape[1] > room:
            left.append(f"{name} (too few optima)")
        elif len(independent(new[seen], np.hstack([base, Z])[seen])) < new.shape[1]:
            left.append(f"{name} (confounded with the student's size or another setting)")
        else:
            Z, names = np.hstack([Z, new]), [*names, *made]
    return Z, names, left


def without_bounds_alone(responses: Responses) -> tuple[Responses, list[str]]:
    """Takes out levels of a setting of which only bounds are known: a mean of bounds is no estimate."""
    keep, notes = np.ones(len(responses.y), dtype=bool), []
    for name in BY:
        values = np.array([str(v) for v in responses.keys(name)])
        for level in np.unique(values):
            mine = values == level
            if len(np.unique(values)) > 1 and not responses.seen[mine].any():
                keep &= ~mine
                notes.append(f"{name}={level} is left out of the law: only bounds on its optima are known")
    return responses.part(keep), notes


def _columns(name: str, values: Sequence[Any], levels: Sequence[str]) -> dict[str, np.ndarray]:
    if name == "data_tokens":
        logs = np.log(np.array([float(v) for v in values]))
        return {"log data_tokens": logs - logs.mean()}
    hot = np.array([[float(str(v) == level) for level in levels] for v in values])
    return {f"{name}={level}": hot[:, i] - hot[:, -1] for i, level in enumerate(levels[:-1])}


def forms_of(responses: Responses, Z: np.ndarray, *, seed: int) -> tuple[dict[str, Form], Fitted, Fitted | None]:
    """The three laws, with the fits of the proportional and the power law."""
    ones, N = np.ones((len(responses.y), 1)), responses.log_student
    X = np.hstack([ones, Z])
    proportional = regress(responses, X, N, seed=seed)
    r = Estimate.of(np.exp(proportional.beta[0]), np.exp(proportional.draws[:, 0]))
    off = _left_out(responses, lambda part, z: np.hstack([np.ones((len(z), 1)), z]), Z, fixed=True)
    forms = {"proportional": Form("proportional", "N_T* = r·N_S", {"r": r}, off)}
    if np.ptp(N[responses.seen]) < 0.05 or len(set(responses.students[responses.seen])) < 3:
        return forms, proportional, None
    # Centred at the mean of log N_S: else intercept and b would be nearly collinear.
    middle = N.mean()
    power = regress(responses, np.hstack([ones, (N - middle)[:, None], Z]), np.zeros_like(N), seed=seed)
    scale = np.clip(power.draws[:, 0] - power.draws[:, 1] * middle, -300, 300)
    parameters = {
        "a": Estimate.of(np.exp(power.beta[0] - power.beta[1] * middle), np.exp(scale)),
        "b": Estimate.of(power.beta[1], power.draws[:, 1]),
    }
    off = _left_out(responses, lambda part, z: np.hstack([np.ones((len(z), 1)), part[:, None] - middle, z]), Z)
    forms["power"] = Form("power", "N_T* = a·N_S^b", parameters, off)
    forms["affine"] = affine(responses, Z, proportional)
    log_a = power.beta[0] - power.beta[1] * middle
    return forms, proportional, Fitted(np.array([log_a, power.beta[1]]), np.stack([scale, power.draws[:, 1]], 1), 0.0)


def _left_out(responses: Responses, design: Any, Z: np.ndarray, *, fixed: bool = False) -> float | None:
    """Root mean square error of log N_T* of students left out of the fit, over those whose optimum was seen."""
    students, seen = responses.students, responses.seen
    X = design(responses.log_student, Z)
    offset = responses.log_student if fixed else np.zeros_like(responses.log_student)
    errors = []
    for student in np.unique(students[seen]):
        keep, out = students != student, (students == student) & seen
        if np.linalg.matrix_rank(X[keep & seen]) < X.shape[1]:
            return None
        part = responses.part(keep)
        beta = tobit(X[keep], (part.y - offset[keep])[None], part.kind(part.y[None]), part.error)[0]
        errors += list(responses.y[out] - offset[out] - X[out] @ beta)
    return float(np.sqrt(np.mean(np.square(errors)))) if errors else None


def affine(responses: Responses, Z: np.ndarray, proportional: Fitted) -> Form:
    """`N_T* = a + r·N_S` by weighted least squares on the scale of parameters; bounds take no part."""
    part, z = responses.part(responses.seen), Z[responses.seen]
    n = np.exp(part.log_student)
    expected = np.exp(part.log_student + proportional.beta[0])
    # Delta method: an error e of log N_T* is N_T*·e in parameters.
    weight = 1 / (expected * np.hypot(part.error, proportional.omega)) ** 2
    X = np.stack([np.ones_like(n), n], 1)

    def solve(y: np.ndarray, effects: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """[B, 2] for log optima y [B, C]."""
        teacher = np.exp(y - effects)
        normal = (X[keep] * weight[keep, None]).T @ X[keep]
        return np.linalg.solve(normal, (X[keep].T @ (weight[keep, None] * teacher[:, keep].T))).T

    everyone = np.ones(len(n), dtype=bool)
    point = solve(part.y[None], (z @ proportional.beta[1:])[None], everyone)[0]
    draws = solve(part.draws, proportional.draws[:, 1:] @ z.T, everyone)
    errors: list[float] = []
    students, X1 = part.students, np.hstack([np.ones((len(n), 1)), z])
    for student in np.unique(students):
        keep = students != student
        if len(set(students[keep])) < 2 or np.linalg.matrix_rank(X1[keep]) < X1.shape[1]:
            errors = []
            break
        own = part.part(keep)
        effects = z @ tobit(X1[keep], (own.y - own.log_student)[None], np.full((1, keep.sum()), SEEN), own.error)[0, 1:]
        a, r = solve(part.y[None], effects[None], keep)[0]
        predicted = np.log(np.maximum(a + r * n[~keep], 1.0)) + effects[~keep]
        errors += list(part.y[~keep] - predicted)
    parameters = {name: Estimate.of(point[i], draws[:, i]) for i, name in enumerate(("a", "r"))}
    off = float(np.sqrt(np.mean(np.square(errors)))) if errors else None
    return Form("affine", "N_T* = a + r·N_S", parameters, off)


def agreements(responses: Responses, *, seed: int) -> tuple[Agreement, ...]:
    """Is the ratio the same at every level of each column that varies? Levels need an optimum that was seen."""
    seen, found = responses.seen, []
    for name in BY:
        values = np.array([str(v) for v in responses.keys(name)])
        levels = [str(v) for v in np.unique(values) if seen[values == v].any()]
        if len(levels) > 1:
            keep = np.isin(values, levels)
            found.append(_agreement(name, responses.part(keep), values[keep], levels, seed))
    return tuple(found)


def _agreement(name: str, part: Responses, values: np.ndarray, levels: list[str], seed: int) -> Agreement:
    X = (values[:, None] == np.array(levels)).astype(float)
    fit = regress(part, X, part.log_student, seed=seed)
    ratios = {v: Estimate.of(np.exp(fit.beta[i]), np.exp(fit.draws[:, i])) for i, v in enumerate(levels)}
    contrast = fit.beta[1:] - fit.beta[:1]
    covariance = np.atleast_2d(np.cov((fit.draws[:, 1:] - fit.draws[:, :1]).T)) + 1e-12 * np.eye(len(contrast))
    q, df = float(contrast @ np.linalg.solve(covariance, contrast)), len(contrast)
    p = float(stats.f.sf(q / df, df, max(2.0, part.located.noise.df)))
    return Agreement(name, ratios, max(0.0, (q - df) / q) if q > 0 else 0.0, p)


def two_sided(draws: np.ndarray, value: float) -> float:
    """p of the hypothesis that a parameter is `value`: twice the smaller share of draws on one side."""
    above = float((draws > value).mean())
    return float(min(1.0, 2 * max(min(above, 1 - above), 1 / (2 * len(draws)))))
