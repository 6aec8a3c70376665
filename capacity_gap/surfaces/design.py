"""`next_runs`: which runs of a pool to make next, so that a loss surface predicts best where it is to be read.

V-optimal design of the law linearised at its fit (Fedorov 1972; for scaling laws arXiv 2604.22753): with J the slopes
of log L̂ by the parameters, P the prior precision and v the error variances of log L,

    S = (J' diag(1/v) J + P)⁻¹,    V = mean over targets t of J_t S J_t',    v_i = s² + (m·d_i)²,

and a run with slopes j takes mean_t (J_t S j')² / (v + j S j') off V. Runs are taken one by one by that drop over
cost^exponent, and S follows by a rank-one update: S ← S − S j' j S / (v + j S j').

s is noise. m·d is ours: d is the distance to the nearest target in log scales, m how far a form is off per unit of it.
With m = 0 the design assumes that the form holds everywhere and chooses cheap runs, which inform the law away from
the targets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from capacity_gap.estimators.batched import Array
from capacity_gap.records.bills import Arithmetic, Bills, Cost, Row, Shared
from capacity_gap.records.candidate import Candidate
from capacity_gap.records.columns import AXES
from capacity_gap.records.tables import numbers
from capacity_gap.settings.errors import ConfigError, choose
from capacity_gap.settings.scales import short_scale
from capacity_gap.surfaces.fitting import fit_surface
from capacity_gap.surfaces.forms import FORMS, Form
from capacity_gap.surfaces.runs import collinear, constant, log_columns, read_runs, two_values
from capacity_gap.surfaces.surface import SurfaceFit, centred

EXPONENT = 0.4  # of the cost (arXiv 2604.22753)
NOISE = 3e-3  # s before there are residuals: what a seed changes in log loss, and what a form leaves over
START_EXPONENT = 0.7  # of an initial design: cheap runs identify a form as well as expensive ones
MISFIT = 3e-3  # m: a run an e-fold from the targets counts about half (docs/decisions.md, 2026-11-27)
NOISE_RUNS = 4.0  # how many runs that is worth
STARTS = 8  # of a refit: on public runs 4, 16 and 48 end at the same minimum
NORMAL = 1.4826  # a normal's standard deviation over its median absolute deviation
SEEDS = ("seed", "teacher_seed")  # what tells two runs of the same scales apart
LEAST_LOSS = 1.0  # assumed before any loss is known; the choice hardly depends on it

Inputs = dict[str, Array]


def training_flops(run: Row) -> tuple[float, Shared]:
    """6·N·D (Kaplan et al. 2020, §2.1), of a run that shares nothing with others."""
    return 6.0 * float(run["student_params"]) * float(run["data_tokens"]), {}


def next_runs(
    frame: pd.DataFrame,
    pool: pd.DataFrame,
    *,
    form: str = "supervised",
    k: int = 6,
    target: pd.DataFrame,
    cost: Cost | None = None,
    budget: float = math.inf,
    exponent: float = EXPONENT,
    misfit: float = MISFIT,
    metric: str | None = None,
    axis: str = "total",
    base: SurfaceFit | None = None,
) -> list[Candidate]:
    """The k runs of a pool to make next.

    Args:
        frame: runs so far, as for `fit_surface`; may be empty. While they do not identify the form, the runs chosen
            are a start: those that do, by gain per cost under the prior alone.
        pool: candidates, with the form's inputs. A run that is there twice may be chosen twice; one that the frame
            has is left out.
        form: of the surface.
        k: how many.
        target: where the surface is to be read: rows with the form's inputs, all of the same weight.
        cost: FLOPs of a run's own part and of what it shares; by default 6·N·D, with teachers `Arithmetic`.
        budget: FLOPs that the runs may cost together.
        exponent: of the cost, 0 to 1: at 1 a gain counts per FLOP, below it expensive runs count for more. A start has
            one of its own.
        misfit: m, in log loss per log unit of distance; 0 for plain V-optimal design.
        metric: the loss column of `frame`.
        axis: count `total` parameters or `non_embedding` ones.
        base: for `distillation`: the surface of students trained on text alone.

    Returns:
        At most k candidates, best first, gains as shares of V. Fewer where the pool or the budget ends, or where the
        form is identified by what was chosen: the rest takes their losses.

    Raises:
        ConfigError: an option is out of range, a column is missing or a scale not positive, or nothing can be run.
        ValueError: `cost` gives no FLOPs.
    """
    choose("form", form, FORMS)
    _check(k, budget, exponent, misfit)
    spec = FORMS[form]
    made = frame[frame["status"] == "done"] if "status" in frame else frame
    fresh, rows = _fresh(made, pool, spec, axis)
    goal = _inputs(target, spec, axis, "target")
    known, loss = _known(made, spec, metric, axis)
    everything = _joined(known, rows)
    lacking = _mendable_by_none(spec, everything)
    started = bool(_lacks(spec, known) - lacking)
    law = _assumed(spec, everything, base) if started else _fitted(made, spec, metric, axis, base, loss)
    error = Errors(NOISE if started else _noise(law, known, loss), misfit, goal)
    charge = cost or (Arithmetic() if "teacher_params" in spec.inputs else training_flops)
    bills = Bills.of(_with_sizes(fresh, axis), charge)
    design = Design(
        covariance(law, known, error.of(known)),
        slopes(law, rows),
        slopes(law, goal),
        error.of(rows),
        bills,
        bills.paid(_with_sizes(made, axis), charge),
        START_EXPONENT if started else exponent,
    )
    while len(design.chosen) < k and not (started and not _lacks(spec, _joined(known, rows, design.chosen)) - lacking):
        if not design.add(budget):
            break
    if not design.chosen:
        raise ConfigError(
            f"budget={budget:.3g} FLOPs is too small for any run of this pool. Raise it, or add smaller runs."
        )
    return _candidates(design, fresh, known, rows, spec if started else None)


def _check(k: int, budget: float, exponent: float, misfit: float) -> None:
    if k < 1:
        raise ConfigError(f"k={k} must be one or more.")
    if not budget > 0:
        raise ConfigError(f"budget={budget} must be above zero FLOPs.")
    if not 0 <= exponent <= 1:
        raise ConfigError(f"exponent={exponent} is out of range: 0 to 1.")
    if not 0 <= misfit < math.inf:
        raise ConfigError(f"misfit={misfit} must be zero or more.")


class Design:
    """Runs chosen one by one. M candidates, p parameters, T targets.

    Attributes:
        S: covariance of the parameters given the runs so far [p, p].
        slopes: ∂log L̂/∂θ of the candidates [M, p].
        W: mean over targets of J_t' J_t [p, p], so that V = tr(W S).
        error: v, the error variances of the candidates' log losses [M].
        chosen, gains, costs: what was chosen, in order: rows, drops of V (log loss squared), FLOPs.
    """

    def __init__(
        self, S: Array, slopes: Array, targets: Array, error: Array, bills: Bills, paid: Array, exponent: float
    ) -> None:
        self.S, self.slopes, self.error = S, slopes, error
        self.W = targets.T @ targets / len(targets)
        self.bills, self.paid, self.exponent = bills, paid.copy(), exponent
        self.left = np.ones(len(slopes), bool)
        self.before = self.variance
        self.chosen: list[int] = []
        self.gains: list[float] = []
        self.costs: list[float] = []

    @property
    def variance(self) -> float:
        """V, the mean variance of log L̂ over the targets."""
        return float(np.sum(self.W * self.S))

    def drops(self) -> Array:
        """By how much each candidate is expected to lower V [M]."""
        toward = self.slopes @ self.S
        return np.einsum("mp,pq,mq->m", toward, self.W, toward) / (self.error + np.sum(toward * self.slopes, axis=1))

    def add(self, budget: float) -> bool:
        """Chooses the candidate with most drop per cost^exponent that the budget still holds; False if none is left."""
        cost = self.bills.each(self.paid)
        open_ = self.left & (cost <= budget - sum(self.costs))
        if not open_.any():
            return False
        drop = self.drops()
        i = int(np.argmax(np.where(open_, drop / cost**self.exponent, -math.inf)))
        self.chosen.append(i)
        self.gains.append(float(drop[i]))
        self.costs.append(float(cost[i]))
        toward = self.S @ self.slopes[i]
        self.S = self.S - np.outer(toward, toward) / (self.error[i] + self.slopes[i] @ toward)
        self.left[i] = False
        self.paid[self.bills.needs[i]] = True
        return True


@dataclass(frozen=True)
class Law:
    """Where a form is made linear: `theta` [p] internal parameters, `sd` [p] of their prior, and the logs' centre."""

    form: Form
    theta: Array
    sd: Array
    centre: Mapping[str, float]
    base: SurfaceFit | None = None

    def log_loss(self, inputs: Mapping[str, Array]) -> Array:
        """log L̂ [n] at raw inputs, each [n]."""
        return np.log(self.form.loss(self.theta[None], centred(inputs, self.centre, self.base), False)[0][0])


def slopes(law: Law, inputs: Mapping[str, Array]) -> Array:
    """J = ∂log L̂/∂θ [n, p] at raw inputs, each [n]."""
    loss, grads = law.form.loss(law.theta[None], centred(inputs, law.centre, law.base), True)
    assert grads is not None
    return (grads[0] / loss[0]).T


@dataclass(frozen=True)
class Errors:
    """v = s² + (m·d)²: `noise` s, `misfit` m per log unit, d to the nearest of the targets `goal`."""

    noise: float
    misfit: float
    goal: Mapping[str, Array]

    def of(self, inputs: Mapping[str, Array]) -> Array:
        """v [n], log loss squared, of runs at raw inputs, each [n]."""
        steps = [np.log(inputs[name])[:, None] - np.log(there)[None] for name, there in self.goal.items()]
        return self.noise**2 + self.misfit**2 * sum(step**2 for step in steps).min(axis=1)


def covariance(law: Law, known: Mapping[str, Array], error: Array) -> Array:
    """S = (J' diag(1/v) J + P)⁻¹ [p, p] given the runs `known` and their v [n], P = diag(1/sd²).

    The weak prior keeps S finite where the runs do not identify a parameter, or one sits at its bound.
    """
    J = slopes(law, known)
    return np.linalg.inv(J.T @ (J / error[:, None]) + np.diag(law.sd**-2.0))


def _box(form: Form, least: float) -> tuple[Array, Array]:
    """The box of starts: middle and half width, each [p]. E is below the least loss, mu within one log unit."""
    low, high = np.array(form.low), np.array(form.high)
    for i, name in enumerate(form.parameters):
        if math.isnan(high[i]):
            low[i], high[i] = (0.0, least) if name == "E" else (-1.0, 1.0)
    return (low + high) / 2, (high - low) / 2


def _assumed(form: Form, rows: Mapping[str, Array], base: SurfaceFit | None) -> Law:
    """The middle of the prior as a law about the middle of all runs."""
    middle, sd = _box(form, LEAST_LOSS)
    return Law(form, middle, sd, {name: float(v.mean()) for name, v in log_columns(rows).items()}, base)


def _fitted(
    frame: pd.DataFrame, form: Form, metric: str | None, axis: str, base: SurfaceFit | None, loss: Array
) -> Law:
    """The law fitted to the runs so far."""
    fit = fit_surface(
        frame, form.name, metric=metric, axis=axis, base=base, starts=STARTS, bootstraps=0, permutations=0
    )
    if fit.status == "too_few":
        raise ConfigError(" ".join(fit.notes))
    return Law(form, np.array(fit.theta), _box(form, float(loss.min()))[1], fit.centre, base)


def _noise(law: Law, known: Mapping[str, Array], loss: Array) -> float:
    """s of log loss: the robust one of the residuals, drawn towards `NOISE` while runs are few."""
    size = float(np.median(np.abs(np.log(loss) - law.log_loss(known)))) * NORMAL
    free = max(len(loss) - len(law.theta), 0)
    return math.sqrt((NOISE_RUNS * NOISE**2 + len(loss) * size**2) / (NOISE_RUNS + free))


def _lacks(form: Form, inputs: Mapping[str, Array]) -> set[str]:
    """What runs lack to identify a form: more runs than parameters, three values of each scale, scales apart."""
    if len(inputs["student_params"]) <= len(form.parameters):
        return {"runs", *form.inputs, "apart"}
    logs = {name: np.log(inputs[name]) for name in form.inputs}
    found = {name for name, values in logs.items() if constant(values) or two_values(values)}
    return found | ({"apart"} if collinear(logs["student_params"], logs["data_tokens"]) else set())


def _mendable_by_none(form: Form, everything: Mapping[str, Array]) -> set[str]:
    """What all runs, made and candidates, lack together: such as several token budgets.

    Raises:
        ConfigError: they are too few.
    """
    lacking, count = _lacks(form, everything), len(everything["student_params"])
    if "runs" in lacking:
        raise ConfigError(
            f"{count} runs, made and candidates, do not identify {form.name}. Provide {len(form.parameters) + 1} or "
            "more."
        )
    return lacking


def _inputs(table: pd.DataFrame, form: Form, axis: str, what: str) -> dict[str, Array]:
    """The form's inputs of a table without losses, each [n]."""
    runs = read_runs(
        table.drop(columns="status", errors="ignore").assign(loss=1.0), form.inputs, metric="loss", axis=axis
    )
    if not len(table) or len(runs.loss) < len(table):
        held = f"{len(runs.loss)} of its {len(table)} rows have {', '.join(form.inputs)}"
        raise ConfigError(f"{what}: {held}. Provide at least one row with numbers in all of them.")
    return dict(runs.inputs)


def _known(frame: pd.DataFrame, form: Form, metric: str | None, axis: str) -> tuple[dict[str, Array], Array]:
    """Inputs and losses of the runs so far, each [n]."""
    if not len(frame):
        return dict.fromkeys(form.inputs, np.empty(0)), np.empty(0)
    runs = read_runs(frame, form.inputs, metric=metric, axis=axis)
    return dict(runs.inputs), runs.loss


def _fresh(frame: pd.DataFrame, pool: pd.DataFrame, form: Form, axis: str) -> tuple[pd.DataFrame, dict[str, Array]]:
    """The candidates that the frame does not have, and their inputs.

    Raises:
        ConfigError: there are none.
    """
    rows = _inputs(pool, form, axis, "pool")
    scales = [name + AXES[axis] if name.endswith("_params") else name for name in form.inputs]
    by = [*scales, *(name for name in SEEDS if name in pool and name in frame)]
    there = set(numbers(frame, scales)[by].itertuples(index=False, name=None)) if len(frame) else set()
    new = np.array([run not in there for run in numbers(pool, scales)[by].itertuples(index=False, name=None)])
    if not new.any():
        raise ConfigError(f"all {len(pool)} runs of the pool exist already. Add sizes, tokens or seeds.")
    return pool[new].reset_index(drop=True), {name: v[new] for name, v in rows.items()}


def _with_sizes(table: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The table with total sizes for the costs, where it has those of another axis only."""
    sizes = {name: name + AXES[axis] for name in ("student_params", "teacher_params")}
    return table.assign(**{name: table[other] for name, other in sizes.items() if other in table and name not in table})


def _joined(known: Mapping[str, Array], rows: Mapping[str, Array], which: Sequence[int] | None = None) -> Inputs:
    """The inputs of the runs so far and of some candidates, by default all."""
    chosen = slice(None) if which is None else np.array(which, int)
    return {name: np.concatenate([known[name], v[chosen]]) for name, v in rows.items()}


def _candidates(
    design: Design, fresh: pd.DataFrame, known: Mapping[str, Array], rows: Mapping[str, Array], start: Form | None
) -> list[Candidate]:
    cells = fresh.to_dict("records")
    found = []
    for n, i in enumerate(design.chosen):
        gain = design.gains[n] / design.before
        reason = _reason(_joined(known, rows, design.chosen[:n]), {name: v[i] for name, v in rows.items()}, gain, start)
        found.append(Candidate({str(k): v for k, v in cells[i].items()}, gain, design.costs[n], reason))
    return found


def _reason(before: Mapping[str, Array], run: Mapping[str, float], gain: float, start: Form | None) -> str:
    """What is new about a run, and what it is for."""
    told = f"{short_scale(run['student_params'])} on {short_scale(run['data_tokens'])} tokens"
    ends = [
        f"the {word} {name} so far"
        for name, words in (("student_params", ("smallest", "largest")), ("data_tokens", ("fewest", "most")))
        for word, beyond in zip(words, (np.less, np.greater), strict=True)
        if beyond(run[name], before[name]).all() and len(before[name])
    ]
    part = (
        f"part of an initial design that identifies {start.name}"
        if start
        else f"{gain:.0%} of the variance at the targets"
    )
    return f"{told}: {'; '.join([*ends, part])}."
