"""Fitting loss surfaces: robust, from many starts, with whole runs drawn again and parameters at a bound named."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from capacity_gap.estimators.batched import Array, Minima, Problem, huber, minimise
from capacity_gap.settings.errors import ConfigError, choose
from capacity_gap.surfaces.forms import FORMS, Form
from capacity_gap.surfaces.runs import Runs, collinear, constant, log_columns, read_runs, two_values
from capacity_gap.surfaces.surface import SurfaceFit, centred

SCREENED = 2048  # starts that are looked at; the best of them are run to the end
DISTINCT = 1e-2  # minima whose parameters differ by less are one
AT_BOUND = 1e-7  # of a parameter's range
ROUGHLY = 1e-8  # tolerance of bootstraps and permutations: a sum of relative errors to eight digits
TAIL = 0.025  # each side of a 95 % interval


def fit_surface(
    frame: pd.DataFrame,
    form: str = "additive",
    *,
    metric: str | None = None,
    axis: str = "total",
    base: SurfaceFit | None = None,
    delta: float = 1e-3,
    starts: int = 48,
    bootstraps: int = 1000,
    cluster: str | None = None,
    permutations: int = 199,
    seed: int = 0,
) -> SurfaceFit:
    """Fits a surface: Huber loss on log loss, best of many starts, intervals from whole runs drawn with replacement.

    Args:
        frame: one row a run; needs the form's inputs and a loss. Rows are taken as they are: pass one kind of run.
        form: `additive`, `additive_free`, `distillation`, `chinchilla` or `supervised`.
        metric: the loss column, by default `loss`, or `student_loss` of our records.
        axis: count `total` parameters or `non_embedding` ones.
        base: for `distillation`: the surface of students trained on text alone, L̃(N_S, D_S).
        delta: where Huber's loss turns linear, in log loss.
        starts: of the 2,048 that are looked at, how many are run to the end.
        bootstraps: draws; 0 for none.
        cluster: a column, such as `teacher_params`, whose values are drawn as a whole: runs that share a teacher share
            its error.
        permutations: of teachers, for the null of surfaces that include a teacher; 0 for none.
        seed: of starts, draws and permutations.
    """
    choose("form", form, FORMS)
    spec = FORMS[form]
    if (base is not None) != (form == "distillation"):
        raise ConfigError("base, the surface of students trained on text alone, applies only to the form distillation.")
    runs = read_runs(frame, spec.inputs, metric=metric, axis=axis, cluster=cluster)
    generator = np.random.default_rng(seed)
    task = _prepare(spec, runs, base, delta)
    if task.lacking:
        return _nothing(spec, runs, axis, base, task)
    minima = _best_minima(task, starts, generator)
    draws = _bootstrap(task, minima, _drawn_weights(runs, bootstraps, generator))
    null = _null_p(task, minima, permutations, generator) if len(spec.inputs) > 2 else None
    return _result(task, runs, minima, draws, null, axis)


@dataclass(frozen=True)
class _Task:
    """What the steps of one fit share."""

    form: Form
    problem: Problem
    logs: Mapping[str, Array]  # of the inputs, not centred
    centre: Mapping[str, float]
    base: SurfaceFit | None
    low: Array  # the box of starts
    high: Array
    held: tuple[str, ...]
    notes: tuple[str, ...]
    lacking: str


def _prepare(form: Form, runs: Runs, base: SurfaceFit | None, delta: float) -> _Task:
    logs = log_columns(runs.inputs)
    centre = {k: float(v.mean()) if len(v) else 0.0 for k, v in logs.items()}
    lower, upper, low, high = (np.array(v) for v in (form.lower, form.upper, form.low, form.high))
    free = np.ones(len(lower), bool)
    holds, notes = _unidentified(form, logs) if len(runs.loss) else ({}, ())
    for name, value in holds.items():
        i = form.index(name)
        lower[i] = upper[i] = low[i] = high[i] = value
        free[i] = False
    if len(runs.loss):
        _from_data(form, runs, logs, centre, (lower, upper, low, high))
    columns = centred(runs.inputs, centre, base)
    problem = Problem(form.loss, columns, np.log(runs.loss), lower, upper, free, delta)
    lacking = _lacking(form, runs, logs, int(free.sum()))
    return _Task(form, problem, logs, centre, base, low, high, tuple(holds), notes, lacking)


def _from_data(form: Form, runs: Runs, logs: Mapping[str, Array], centre: Mapping[str, float], box: Any) -> None:
    """Fills in bounds that depend on the data: E starts below the least loss, mu stays near the tested ratios."""
    lower, upper, low, high = box
    if "E" in form.parameters:
        high[form.index("E")] = runs.loss.min()
    if "mu" in form.parameters:
        i, ratio = form.index("mu"), logs["ratio"] - centre["ratio"]
        # The centre may lie one span of ratios outside the data: a loss that only falls ends there, at the bound.
        width = max(np.ptp(ratio), 1.0)
        low[i], high[i] = ratio.min(), ratio.max()
        lower[i], upper[i] = low[i] - width, high[i] + width


def _unidentified(form: Form, logs: Mapping[str, Array]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Parameters that these columns do not identify, the values they are held at, and why."""
    holds: dict[str, float] = {}
    chinchilla = FORMS["chinchilla"].parameters
    notes = []
    for column, parameters in form.alone.items():
        if column in logs and constant(logs[column]):
            holds.update(parameters)
            notes.append(f"{column} takes one value: {', '.join(parameters)} held")
        elif column in form.inputs[:2] and column in logs and two_values(logs[column]):
            term = " and ".join(name for name in parameters if name in chinchilla)
            notes.append(f"{column} takes two values: {term} are not identified separately, only their term")
    if collinear(logs["student_params"], logs["data_tokens"]):
        holds.update(form.alone["data_tokens"])
        notes.append("data_tokens are proportional to student_params: A/N^alpha stands for both, log_B and beta held")
    return holds, tuple(notes)


def _lacking(form: Form, runs: Runs, logs: Mapping[str, Array], free: int) -> str:
    """Why no surface can be fitted at all, or nothing."""
    if len(runs.loss) <= free:
        return f"{len(runs.loss)} runs for {free} parameters"
    third = form.inputs[2:]
    if all(constant(logs[k]) for k in form.inputs[:2]) and not third:
        return "all runs have the same student and tokens"
    return next((f"all runs have the same {k}: a surface needs several" for k in third if constant(logs[k])), "")


def _nothing(form: Form, runs: Runs, axis: str, base: SurfaceFit | None, task: _Task) -> SurfaceFit:
    span = runs.span if len(runs.loss) else {}
    notes = (*runs.notes, f"no {form.name} surface can be fitted: {task.lacking}")
    return SurfaceFit(
        form=form.name,
        status="too_few",
        parameters={},
        intervals={},
        at_bound=(),
        held=(),
        axis=axis,
        runs=len(runs.loss),
        families=runs.families,
        span=span,
        residual=0.0,
        null_p=None,
        notes=notes,
        centre=task.centre,
        theta=(),
        draws=(),
        base=base,
    )


def _best_minima(task: _Task, starts: int, generator: np.random.Generator) -> Minima:
    """Minima of all runs, best first, each once. Sobol points in the box are looked at, the best run to the end."""
    sobol = stats.qmc.Sobol(len(task.low), rng=generator)
    box = task.low + sobol.random(SCREENED) * (task.high - task.low)
    with np.errstate(all="ignore"):
        loss, _ = task.form.loss(box, task.problem.columns, False)
        value = huber(np.log(loss) - task.problem.target, np.ones((1, loss.shape[1])), task.problem.delta)
    weights = np.ones(loss.shape[1])
    found = minimise(task.problem, box[np.argsort(value)[:starts]], weights)
    # A minimum of a long valley may be reached from one side only; the best is polished to a finer tolerance.
    order = np.argsort(found.value)
    best = minimise(task.problem, found.theta[order[:4]], weights, tolerance=1e-12, most_steps=2000)
    return _distinct(_joined([best, Minima(*(f[order] for f in _fields(found)))]))


def _fields(found: Minima) -> tuple[Array, ...]:
    return found.theta, found.value, found.steps, found.converged


def _joined(parts: Sequence[Minima]) -> Minima:
    return Minima(*(np.concatenate(f) for f in zip(*map(_fields, parts), strict=True)))


def _distinct(found: Minima) -> Minima:
    kept: list[int] = []
    for i in np.argsort(found.value, kind="stable"):
        if all(np.abs(found.theta[i] - found.theta[j]).max() > DISTINCT for j in kept):
            kept.append(int(i))
    return Minima(*(f[kept] for f in _fields(found)))


def _drawn_weights(runs: Runs, bootstraps: int, generator: np.random.Generator) -> Array:
    """How often each run is drawn [B, n]; clusters are drawn as a whole."""
    cluster = np.arange(len(runs.loss)) if runs.cluster is None else runs.cluster
    groups = int(cluster.max()) + 1
    counts = generator.multinomial(groups, np.full(groups, 1 / groups), size=bootstraps)
    return counts[:, cluster].astype(float)


def _bootstrap(task: _Task, minima: Minima, weights: Array) -> Minima:
    """The best minimum of each draw, from the two best minima of all runs."""
    tries = [
        minimise(task.problem, np.tile(theta, (len(weights), 1)), weights, tolerance=ROUGHLY)
        # A draw may have its best minimum where all runs have their second.
        for theta in minima.theta[:2]
        if len(weights)
    ]
    if not tries:
        empty = np.empty(0)
        return Minima(np.empty((0, len(task.low))), empty, empty, empty.astype(bool))
    return _best_of(tries)


def _best_of(tries: Sequence[Minima]) -> Minima:
    """Per problem, the lowest of several minima."""
    pick = np.argmin(np.stack([t.value for t in tries]), axis=0)
    rows = np.arange(len(pick))
    return Minima(*(np.stack(f)[pick, rows] for f in zip(*map(_fields, tries), strict=True)))


def _null_p(task: _Task, minima: Minima, permutations: int, generator: np.random.Generator) -> float | None:
    """How often permuted teachers are fitted as well as the real ones.

    One random ranking of all teachers reorders every student's curve at once, so that the error of one teacher, shared
    by all its students, is part of the null (docs/decisions.md, statuses before estimates). All
    teachers are fitted from the same starts.
    """
    if not permutations:
        return None
    names = ("teacher_params", "teacher_loss")
    third = next(task.logs[n] for n in names if n in task.logs)
    permuted = np.concatenate([third[None], _permuted(task.logs, third, permutations, generator)])
    problem = replace(task.problem, columns={**task.problem.columns, **_teacher_columns(task, permuted)})
    weights = np.ones(len(third))
    starts = _gap_starts(task, minima.theta[0]) if "mu" in task.form.parameters else list(minima.theta[:3])
    tries = [minimise(problem, np.tile(s, (len(permuted), 1)), weights, tolerance=ROUGHLY) for s in starts]
    value = _best_of(tries).value
    # The slack counts ties, such as the identity permutation, against the claim.
    return float((1 + (value[1:] <= value[0] * (1 + 1e-9)).sum()) / (1 + permutations))


def _teacher_columns(task: _Task, permuted: Array) -> dict[str, Array]:
    """The columns that depend on the teacher, for other teachers (logs of their parameters, or of their losses)."""
    if "mu" in task.form.parameters:
        return {"ratio": permuted - task.logs["student_params"] - task.centre["ratio"]}
    return {"teacher_loss": permuted - task.centre["teacher_loss"], "log_teacher_loss": permuted}


def _gap_starts(task: _Task, theta: Array) -> list[Array]:
    """The best fit, and parabolas of the same powers at the left, the middle and the right of the tested ratios."""
    c, k, mu = (task.form.index(name) for name in ("c", "k", "mu"))
    starts = [theta]
    # From the real optimum alone permuted teachers would be fitted worse than real ones, and p would be too small.
    for share in (0.1, 0.5, 0.9):
        start = theta.copy()
        start[[c, k, mu]] = task.high[c] / 4, 0.0, task.low[mu] + share * (task.high[mu] - task.low[mu])
        starts.append(start)
    return starts


def _permuted(logs: Mapping[str, Array], teacher: Array, permutations: int, generator: np.random.Generator) -> Array:
    """The teacher of every run [permutations, n] after teachers were permuted within each student's curve."""
    levels, level = np.unique(teacher, return_inverse=True)
    rank = np.argsort(generator.random((permutations, len(levels))), axis=1)
    out = np.tile(teacher, (permutations, 1))
    _, curve = np.unique(np.stack([logs["student_params"], logs["data_tokens"]]), axis=1, return_inverse=True)
    for c in range(curve.max() + 1):
        rows = curve == c
        mine, at = np.unique(level[rows], return_inverse=True)
        order = np.argsort(np.argsort(rank[:, mine], axis=1), axis=1)
        out[:, rows] = levels[mine][order][:, at]
    return out


def _result(task: _Task, runs: Runs, minima: Minima, draws: Minima, null_p: float | None, axis: str) -> SurfaceFit:
    form, theta = task.form, minima.theta[0]
    # `natural` gives the parameters in the order of θ: `free` and `_at_bound` are read by position.
    names = list(form.natural(minima.theta[:1], task.centre))
    parameters = {k: float(v[0]) for k, v in form.natural(minima.theta[:1], task.centre).items()}
    held = tuple(n for n, free in zip(names, task.problem.free, strict=True) if not free)
    edge = _at_bound(task, minima.theta[:1])[0]
    at_bound = tuple(n for n, at in zip(names, edge, strict=True) if at)
    loss, _ = form.loss(theta[None], task.problem.columns, False)
    status = "at_bound" if at_bound else "fitted" if minima.converged[0] else "not_converged"
    return SurfaceFit(
        form=form.name,
        status=status,
        parameters=parameters,
        intervals=_intervals(form.natural(draws.theta, task.centre), held) if len(draws.theta) else {},
        at_bound=at_bound,
        held=held,
        axis=axis,
        runs=len(runs.loss),
        families=runs.families,
        span=runs.span,
        residual=float(np.median(np.abs(loss[0] / runs.loss - 1))),
        null_p=null_p,
        notes=(*runs.notes, *task.notes, *_doubts(task, names, at_bound, draws)),
        centre=task.centre,
        theta=tuple(map(float, theta)),
        draws=tuple(tuple(map(float, row)) for row in draws.theta),
        base=task.base,
    )


def _at_bound(task: _Task, theta: Array) -> Array:
    """Which free parameters sit at a bound [B, p]."""
    p = task.problem
    near = AT_BOUND * np.where(np.isfinite(p.upper - p.lower), p.upper - p.lower, 1.0)
    return p.free & ((theta <= p.lower + near) | (theta >= p.upper - near))


def _intervals(natural: Mapping[str, Array], held: Sequence[str]) -> dict[str, tuple[float, float]]:
    found = {k: np.quantile(v, (TAIL, 1 - TAIL)) for k, v in natural.items() if k not in held}
    return {k: (float(low), float(high)) for k, (low, high) in found.items()}


def _doubts(task: _Task, names: Sequence[str], at_bound: Sequence[str], draws: Minima) -> list[str]:
    """Caveats on the estimates."""
    notes = []
    if len(draws.theta):
        share = _at_bound(task, draws.theta).mean(axis=0)
        often = [f"{n} ({s:.0%})" for n, s in zip(names, share, strict=True) if s > TAIL and n not in at_bound]
        if often:
            notes.append(f"at a bound in part of the bootstraps, so weakly identified: {', '.join(often)}")
        if not draws.converged.all():
            notes.append(
                f"{(~draws.converged).sum()} of {len(draws.converged)} bootstraps were stopped before they converged"
            )
    if "c" in at_bound:
        others = " and ".join(n for n in names if n in ("ratio", "nu", "b", "d"))
        notes.append(f"c = 0: no capacity gap in these data, so k and {others} are meaningless")
    elif "ratio" in at_bound:
        notes.append("the best ratio is at the edge of what the fit allows: the loss only falls, or only rises")
    return notes
