"""Claim: a surface with 4,096 bootstraps is fitted at least 20 times as fast as by a loop over scipy's L-BFGS-B.

    python -m benchmarks.fit_surface [--out results/fit_surface.csv]      about three CPU minutes

Same runs, weights, starts, bounds, objective and tolerance (a relative decrease under 1e-9). The loop differentiates by
finite differences, as `scipy.optimize.minimize` does when it is given no gradient; it is timed on `--sample` of the
bootstraps, other ones in every round, and its seconds are scaled to all of them. Rounds are interleaved; one thread;
CPU seconds, because other work may share the machine. `worse`: share of the loop's fits that end above ours by more
than one part in 10⁴ of the objective, and the other way round.
"""

import argparse
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import scipy
from scipy.optimize import Bounds, minimize

from capacity_gap.estimators.batched import Array, Minima, Problem, huber, minimise
from capacity_gap.fit import fitting
from capacity_gap.surfaces.forms import FORMS
from capacity_gap.surfaces.runs import read_runs
from capacity_gap.surfaces.surface import published

TOLERANCE = 1e-9
NOISE = 0.005  # of the log loss
STARTS = 2


def grid(form: str, draw: np.random.Generator) -> pd.DataFrame:
    """225 runs from the published surface of that form, with noise; the additive one meets the distillation law's."""
    law = published("distillation")
    assert law.base is not None
    axes = np.geomspace(1e8, 3e9, 5), np.geomspace(4e9, 5e11, 5), np.geomspace(1e8, 2e10, 9)
    student, tokens, teacher = (a.ravel() for a in np.meshgrid(*axes))
    teacher_loss = law.base.predict(student_params=teacher, data_tokens=20 * teacher)
    if form in ("chinchilla", "supervised"):
        student, tokens = (np.exp(draw.uniform(np.log(a[0]), np.log(a[-1]), 225)) for a in axes[:2])
        loss = published(form).predict(student_params=student, data_tokens=tokens)
    else:
        loss = law.predict(student_params=student, data_tokens=tokens, teacher_loss=teacher_loss)
    return pd.DataFrame(
        {
            "student_params": student,
            "data_tokens": tokens,
            "teacher_params": teacher,
            "teacher_loss": teacher_loss,
            "loss": loss * np.exp(NOISE * draw.standard_normal(225)),
        }
    )


def task(form: str, draw: np.random.Generator, bootstraps: int) -> tuple[Problem, Array, Array]:
    """The problem, its starts [S, p] and the weights of all bootstraps [B, n]."""
    runs = read_runs(grid(form, draw), FORMS[form].inputs)
    base = published("supervised") if form == "distillation" else None
    made = fitting._prepare(FORMS[form], runs, base, 1e-3)
    best = fitting._best_minima(made, 48, draw).theta[0]
    # The second start is a fifth of the way from the best fit to a random point of the box of starts.
    other = best + 0.2 * (made.low + draw.random(len(best)) * (made.high - made.low) - best)
    return made.problem, np.stack([best, other])[:STARTS], fitting._drawn_weights(runs, bootstraps, draw)


def ours(problem: Problem, starts: Array, weights: Array) -> Array:
    """F of the best minimum of each bootstrap."""
    found: list[Minima] = [
        minimise(problem, np.tile(s, (len(weights), 1)), weights, tolerance=TOLERANCE) for s in starts
    ]
    return np.min([f.value for f in found], axis=0)


def loop(problem: Problem, starts: Array, weights: Array) -> Array:
    """The same, one bootstrap and one start after another."""
    bounds = Bounds(problem.lower, problem.upper)
    options = {"ftol": TOLERANCE, "maxiter": 15_000, "maxfun": 150_000}

    def value(theta: Array, weight: Array) -> float:
        loss, _ = problem.model(theta[None], problem.columns, False)
        return float(huber(np.log(loss) - problem.target, weight, problem.delta)[0])

    best = []
    for row in weights:
        tries = [
            minimize(value, s, args=(row[None],), method="L-BFGS-B", bounds=bounds, options=options) for s in starts
        ]
        best.append(min(t.fun for t in tries))
    return np.array(best)


def timed(function, *given) -> tuple[Array, float]:  # type: ignore[no-untyped-def]
    began = time.process_time()
    found = function(*given)
    return found, time.process_time() - began


def race(form: str, *, bootstraps: int, sample: int, rounds: int) -> dict[str, object]:
    problem, starts, weights = task(form, np.random.default_rng(0), bootstraps)
    ratios, mine, theirs, above, below = [], [], [], [], []
    for r in range(rounds):
        rows = slice(r * sample, (r + 1) * sample)
        fast, seconds = timed(ours, problem, starts, weights)
        slow, slow_seconds = timed(loop, problem, starts, weights[rows])
        mine.append(seconds)
        theirs.append(slow_seconds * bootstraps / sample)
        ratios.append(theirs[-1] / seconds)
        excess = slow / fast[rows] - 1
        above.append((excess > 1e-4).mean())
        below.append((excess < -1e-4).mean())
    return {
        "form": form,
        "parameters": len(FORMS[form].parameters),
        "runs": weights.shape[1],
        "bootstraps": bootstraps,
        "starts each": len(starts),
        "loop timed on": sample * rounds,
        "ours, CPU s": float(np.median(mine)),
        "loop, CPU s": float(np.median(theirs)),
        "ratio": float(np.median(ratios)),
        "ratio, least": min(ratios),
        "ratio, most": max(ratios),
        "loop worse": float(np.mean(above)),
        "ours worse": float(np.mean(below)),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
        "versions": f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstraps", type=int, default=4096)
    parser.add_argument("--sample", type=int, default=16, help="bootstraps that the loop fits in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="CSV for the table")
    given = parser.parse_args()
    shape = {"bootstraps": given.bootstraps, "sample": given.sample, "rounds": given.rounds}
    table = pd.DataFrame([race(form, **shape) for form in ("chinchilla", "additive", "distillation")])
    print(table.T.to_string(header=False, float_format="{:.3g}".format))
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
