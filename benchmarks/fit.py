"""Claim: the whole chain with 1,000 bootstraps on 40 curves takes under two seconds; a loop of scipy calls, minutes.

    python -m benchmarks.fit [--repeats 5] [--out results/fit_speed.csv]        about three minutes

40 curves (8 students × 5 data scales, 7 teachers, 3 seeds). Ours: from curves to law, everything in it. The loop does
the same estimator as one would write it down: for each draw, shape κ, curve and left-out teacher a `scipy.linalg.lstsq`
(exact, so that no start or tolerance is in question; an iterative optimiser takes fifty times longer still), then the
optimum of each curve, then the ratio. It is timed on a stated number of draws and scaled up. Both run in turn in one
process, one thread; CPU seconds.
"""

import argparse
import os
import platform
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scipy
from scipy import linalg

from benchmarks.fit_coverage import Design, quadratic
from capacity_gap.fit.frame import Curve
from capacity_gap.fit.law import law_from
from capacity_gap.fit.optimum import locate
from capacity_gap.fit.valley import SHAPES, warp

BOOTSTRAPS, SAMPLE = 1000, 5  # draws; draws that the loop is timed on


def table(draw: int) -> list[Curve]:
    """40 curves: five data scales of eight students."""
    rng, found = np.random.default_rng(draw), []
    for scale in range(5):
        for curve in Design("bench", quadratic, students=8, best=2 + 0.3 * scale).draw(rng):
            found.append(Curve(**{**curve.__dict__, "key": {**curve.key, "data_tokens": 10**6 * 2**scale}}))
    return found


def ours(found: list[Curve]) -> float:
    law = law_from(locate(found, bootstraps=BOOTSTRAPS), axis="total")
    assert law.status == "law"
    return float(law.ratio or 0)


def _fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray, centre: float, kappa: float) -> np.ndarray:
    w = warp(x, centre, kappa)

    root = np.sqrt(weight)
    return linalg.lstsq(root[:, None] * np.stack([np.ones_like(w), w, w * w], 1), root * y, check_finite=False)[0]


def loop(found: list[Curve], draws: int) -> float:
    """The same chain, a curve, a shape and a teacher at a time."""
    rng, ratios = np.random.default_rng(0), []
    span = float(np.median([c.x[-1] - c.x[0] for c in found])) / 2
    for _ in range(draws):
        losses = [c.loss + 0.0023 * rng.standard_normal(len(c.x)) for c in found]
        errors = np.zeros(len(SHAPES))
        for q, shape in enumerate(SHAPES):
            for c, y in zip(found, losses, strict=True):
                middle = (c.x[0] + c.x[-1]) / 2
                for k in range(len(c.x)):
                    keep = np.arange(len(c.x)) != k
                    beta = _fit(c.x[keep], y[keep], c.count[keep], middle, shape / span)
                    w = warp(c.x[k], middle, shape / span)
                    errors[q] += c.count[k] * (beta[0] + beta[1] * w + beta[2] * w * w - y[k]) ** 2
        kappa = SHAPES[int(errors.argmin())] / span
        optima = []
        for c, y in zip(found, losses, strict=True):
            middle = (c.x[0] + c.x[-1]) / 2
            beta = _fit(c.x, y, c.count, middle, kappa)
            w = np.clip(-beta[1] / (2 * beta[2]), *(warp(c.x[i], middle, kappa) for i in (0, -1)))
            x = middle + (np.log1p(kappa * w) / kappa if kappa else w)
            optima.append(x - np.log(c.student_params))
        ratios.append(np.mean(optima))
    return float(np.exp(np.mean(ratios)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="CSV for the table")
    given = parser.parse_args()
    rows = []
    for repeat in range(given.repeats):
        found, row = table(repeat), {}
        for name, run in (("ours", lambda f: ours(f)), ("loop", lambda f: loop(f, SAMPLE))):
            began = time.process_time()
            row[f"ratio, {name}"] = run(found)
            row[f"s, {name}"] = time.process_time() - began
        row["s, loop"] *= BOOTSTRAPS / SAMPLE
        row["times faster"] = row["s, loop"] / row["s, ours"]
        rows.append(row)
        print({k: round(v, 2) for k, v in row.items()}, flush=True)
    made = pd.DataFrame(rows)
    summary = made.median().to_frame("median").T
    summary["from"], summary["to"] = made["times faster"].min(), made["times faster"].max()
    print(summary.to_string(index=False, float_format="{:.3g}".format))
    print(f"CPU seconds of one thread; the loop on {SAMPLE} of {BOOTSTRAPS} draws, scaled up")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}, ", end="")
    print(f"scipy {scipy.__version__}")
    if given.out:
        summary.to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
