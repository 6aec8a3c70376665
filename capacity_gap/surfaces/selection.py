"""Which form of a loss surface to extrapolate with: the one that best predicts the most expensive runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from capacity_gap.settings.errors import ConfigError, choose
from capacity_gap.surfaces.fitting import fit_surface
from capacity_gap.surfaces.forms import FORMS
from capacity_gap.surfaces.runs import read_runs
from capacity_gap.surfaces.surface import SurfaceFit

SHARE = 0.1  # of the runs, the most expensive, that are predicted
LEAST = 3  # of them
MOST = 0.5
OF_TEXT = ("chinchilla", "supervised")  # forms of student and tokens alone


@dataclass(frozen=True)
class Trial:
    """How well a form predicted the most expensive runs: mean and largest |L̂/L − 1|, and R² of their loss."""

    form: str
    error: float
    largest: float
    r2: float


@dataclass(frozen=True)
class Selection:
    """The form that predicted best, fitted to all runs, and the scores of all forms.

    `foretold`: the number of held-out runs, the most expensive ones.
    """

    surface: SurfaceFit
    trials: tuple[Trial, ...]
    foretold: int


def select_surface(
    frame: pd.DataFrame,
    forms: Sequence[str] = OF_TEXT,
    *,
    metric: str | None = None,
    axis: str = "total",
    share: float = SHARE,
    bootstraps: int = 1000,
    seed: int = 0,
) -> Selection:
    """Fits each form to the cheaper runs and predicts the most expensive ones; the most accurate form is fitted to all.

    A run costs 6·N·D, N its student's parameters. Interpolation hardly discriminates between forms.

    Args:
        frame: one row a run, as `fit_surface` reads it.
        forms: of one kind of input; by default those of student and tokens alone.
        metric: the loss column, by default `loss`, or `student_loss` of our records.
        axis: count `total` parameters or `non_embedding` ones.
        share: of the runs, the most expensive, to be predicted.
        bootstraps: of the final fit.
        seed: of starts and draws.

    Raises:
        ConfigError: a form is unknown, forms take different inputs, or there are too few runs.
    """
    for form in forms:
        choose("form", form, FORMS)
    if not 0 < share <= MOST:
        raise ConfigError(f"share={share} is out of range: above 0, at most {MOST}.")
    if len({FORMS[form].inputs for form in forms}) > 1:
        raise ConfigError(f"forms={list(forms)} take different inputs, so their predictions cannot be compared.")
    runs = read_runs(frame, FORMS[forms[0]].inputs, metric=metric, axis=axis, cluster=None)
    cost = 6 * runs.inputs["student_params"] * runs.inputs["data_tokens"]
    held = max(LEAST, round(share * len(cost)))
    if len(cost) < 3 * held:
        raise ConfigError(
            f"{len(cost)} runs are too few to predict the most expensive {held} of them. Provide 9 or more."
        )
    table = pd.DataFrame({**runs.inputs, "loss": runs.loss})
    order = np.argsort(cost, kind="stable")
    near, far = table.iloc[order[:-held]], table.iloc[order[-held:]]
    trials = []
    for form in forms:
        fit = fit_surface(near, form, bootstraps=0, permutations=0, seed=seed)
        trials.append(Trial(form, *foretold(fit, far)))
    best = min(trials, key=lambda t: t.error)
    surface = fit_surface(frame, best.form, metric=metric, axis=axis, bootstraps=bootstraps, seed=seed)
    return Selection(surface, tuple(trials), held)


def foretold(fit: SurfaceFit, runs: pd.DataFrame) -> tuple[float, float, float]:
    """Mean and largest relative error, and R², of a surface at other runs (columns of its inputs, and `loss`)."""
    seen = runs["loss"].to_numpy(float)
    given = fit.predict(**{name: runs[name].to_numpy(float) for name in FORMS[fit.form].inputs})
    away = np.abs(given / seen - 1)
    r2 = 1 - float(((given - seen) ** 2).sum() / ((seen - seen.mean()) ** 2).sum())
    return float(away.mean()), float(away.max()), r2
