"""The interval that the tables of several benchmarks show."""

import numpy as np
from scipy import stats


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean of a few values, and half of its 95 % t-interval (NaN for one value)."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return float(values.mean()), float(half)
