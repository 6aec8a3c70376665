"""A fitted loss surface: its parameters with their intervals, predictions under every bootstrap draw, and its text."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from capacity_gap.estimators.batched import Array
from capacity_gap.settings.errors import ConfigError
from capacity_gap.surfaces.forms import FORMS, VANISHED
from capacity_gap.surfaces.runs import log_columns

EDGE = 1e-6  # relative: nearer to the end of a span is inside it

Pair = tuple[float, float]


@dataclass(frozen=True)
class SurfaceFit:
    """A fitted surface. `parameters` and `intervals` (95 %, bootstrap) are natural ones, as in the form's equation.

    `status`: `fitted`; `at_bound` (the parameters named in `at_bound` sit at the edge of what the fit allows, so read
    none of them as an estimate); `not_converged`; `too_few` (fewer runs than parameters, or nothing varies: no
    parameters at all). `held` are parameters that these data do not identify; `null_p` the share of permuted teachers
    that fit as well (where the surface includes a teacher). `centre`, `theta` and `draws` are internal: logs about the
    data's middle.
    """

    form: str
    status: str
    parameters: Mapping[str, float]
    intervals: Mapping[str, Pair]
    at_bound: tuple[str, ...]
    held: tuple[str, ...]
    axis: str
    runs: int
    families: tuple[str, ...]
    span: Mapping[str, Pair]
    residual: float  # median |L̂/L − 1|
    null_p: float | None
    notes: tuple[str, ...]
    centre: Mapping[str, float]
    theta: tuple[float, ...]
    draws: tuple[tuple[float, ...], ...]
    base: "SurfaceFit | None" = None  # of the distillation law: L̃, the student's loss on text alone

    @property
    def equation(self) -> str:
        """The form as text."""
        return FORMS[self.form].equation

    @cached_property
    def theta_draws(self) -> Array:
        """Bootstrap draws of the internal parameters [B, p]."""
        return np.array(self.draws).reshape(len(self.draws), len(FORMS[self.form].parameters))

    def predict(self, **inputs: Any) -> Array:
        """Loss (nats per token) at `student_params, data_tokens` and `teacher_params` or `teacher_loss`, broadcast.

        Raises:
            ConfigError: an input is missing, unknown or not positive, or the status is `too_few`.
        """
        return self.predict_under(np.array([self.theta]), **inputs)[0]

    def predict_draws(self, **inputs: Any) -> Array:
        """The same under every bootstrap draw: the first axis counts draws."""
        return self.predict_under(self.theta_draws, **inputs)

    def predict_under(self, theta: Array, **inputs: Any) -> Array:
        """The same under given internal parameters [B, p]."""
        form = FORMS[self.form]
        if not self.parameters:
            raise ConfigError(f"there is no surface to predict from: status {self.status}. {' '.join(self.notes)}")
        if set(inputs) != set(form.inputs):
            raise ConfigError(
                f"the {self.form} surface takes {', '.join(form.inputs)}; given: {', '.join(inputs) or 'nothing'}."
            )
        arrays = dict(zip(inputs, np.broadcast_arrays(*(np.asarray(v, float) for v in inputs.values())), strict=True))
        if not all((v > 0).all() for v in arrays.values()):
            raise ConfigError(f"{', '.join(inputs)} must be positive, since the surface takes their logarithms.")
        flat = {k: v.ravel() for k, v in arrays.items()}
        loss, _ = form.loss(theta, centred(flat, self.centre, self.base), False)
        return loss.reshape(len(theta), *next(iter(arrays.values())).shape)

    def outside(self, **inputs: float) -> tuple[str, ...]:
        """Which inputs (or ratios of them) are outside the runs that the surface was fitted to."""
        arrays = {k: np.atleast_1d(np.asarray(v, float)) for k, v in inputs.items()}
        given = {k: float(np.exp(v)[0]) for k, v in log_columns(arrays).items()}
        return tuple(k for k, v in given.items() if k in self.span and not _within(v, self.span[k]))

    def summary(self) -> str:
        """Estimates, intervals, bounds and what was left out, as a table."""
        lines = [
            f"Loss surface: {self.form}, parameters: {self.axis}, status: {self.status}",
            f"  {self.equation}",
            f"  {self.runs} runs, median error {self.residual:.2%}, {len(self.draws)} bootstraps",
        ]
        if self.parameters:
            lines.append(f"{'parameter':>10} {'estimate':>12} {'95 % interval':>27}")
        for name, value in self.parameters.items():
            low, high = self.intervals.get(name, (np.nan, np.nan))
            between = f"{low:.5g} to {high:.5g}" if np.isfinite(low) else "–"
            mark = "  at a bound" if name in self.at_bound else "  held" if name in self.held else ""
            lines.append(f"{name:>10} {value:>12.5g} {between:>27}{mark}")
        lines += [f"fitted on {k}: {low:,.4g} to {high:,.4g}" for k, (low, high) in self.span.items()]
        if self.null_p is not None:
            lines.append(f"permuted teachers fit as well in {self.null_p:.1%} of cases")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def to_json(self) -> str:
        """The whole fit as JSON; `from_json` reads it back."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "SurfaceFit":
        """Reads what `to_json` wrote."""
        return _from_dict(json.loads(text))


def _from_dict(given: dict[str, Any]) -> SurfaceFit:
    for name in ("intervals", "span"):
        given[name] = {k: tuple(v) for k, v in given[name].items()}
    for name in ("at_bound", "held", "families", "notes", "theta"):
        given[name] = tuple(given[name])
    given["draws"] = tuple(map(tuple, given["draws"]))
    base = given.pop("base")
    return SurfaceFit(**given, base=None if base is None else _from_dict(base))


def _within(value: float, span: Pair) -> bool:
    return span[0] * (1 - EDGE) <= value <= span[1] * (1 + EDGE)


def centred(inputs: Mapping[str, Array], centre: Mapping[str, float], base: SurfaceFit | None) -> dict[str, Array]:
    """The input columns of the forms: logs about their centres, and those of the distillation law besides."""
    logs = log_columns(inputs)
    columns = {k: v - centre[k] for k, v in logs.items()}
    if base is not None:
        columns["log_teacher_loss"] = logs["teacher_loss"]
        own = base.predict(student_params=inputs["student_params"], data_tokens=inputs["data_tokens"])
        columns["own_loss"] = np.log(own)
    return columns


# Published coefficients. Besiroglu et al. 2024 (arXiv 2404.10102) refitted Chinchilla; the other two are Busbridge et
# al. 2025 (arXiv 2502.08606): N non-embedding parameters, students from random weights, pure KL, temperature 1.
PUBLISHED = {
    "chinchilla": {"E": 1.8172, "A": 477.84, "alpha": 0.3473, "B": 2143.86, "beta": 0.3672},
    "supervised": {"E": 1.220, "A": 3355.0, "alpha": 0.408, "B": 18186.0, "beta": 0.431, "gamma": 0.452},
    "distillation": {
        "A": 2243.0,
        "alpha": 0.321,
        "B": 24181.0,
        "beta": 0.637,
        "gamma": 0.764,
        "c0": 2.549,
        "c1": 522.6,
        "f1": 0.090,
        "d1": 1.315,
    },
}


def published(form: str) -> SurfaceFit:
    """The surface with its published coefficients; the distillation law brings its L̃ along."""
    base = published("supervised") if form == "distillation" else None
    return from_parameters(form, PUBLISHED[form], base=base, note="published coefficients, no data")


def from_parameters(
    form: str,
    parameters: Mapping[str, float],
    *,
    base: SurfaceFit | None = None,
    axis: str = "non_embedding",
    note: str = "parameters as given, no data",
) -> SurfaceFit:
    """A surface from natural parameters, without data: no intervals, no draws, no span."""
    names = FORMS[form].parameters
    logs = {"log_" + name: np.log(v) if v > 0 else VANISHED for name, v in parameters.items()}
    logs["mu"] = logs.get("log_ratio", 0.0)
    if form == "distillation":
        logs["log_k"] = logs["log_c1"] + logs["log_f1"] - logs["log_d1"] / parameters["f1"]
    theta = tuple(float(parameters[n] if n in parameters else logs[n]) for n in names)
    columns = ("student_params", "data_tokens", "teacher_params", "teacher_loss", "ratio", "tokens_per_param")
    return SurfaceFit(
        form=form,
        status="fitted",
        parameters=dict(parameters),
        intervals={},
        at_bound=(),
        held=(),
        axis=axis,
        runs=0,
        families=(),
        span={},
        residual=0.0,
        null_p=None,
        notes=(note,),
        centre=dict.fromkeys(columns, 0.0),
        theta=theta,
        draws=(),
        base=base,
    )
