"""From a teacher's loss to the size at which its ladder has that loss, and how sure that is."""

from dataclasses import dataclass

import numpy as np

LEAST = 4  # rungs that a bent line takes


@dataclass(frozen=True)
class SizeMap:
    """A teacher's loss as a quadratic of its log size. `sd` is the scatter of log sizes about it."""

    coefficients: tuple[float, ...]  # of (s − middle)², s − middle, 1
    middle: float
    span: tuple[float, float]
    sd: float

    def size(self, loss: np.ndarray) -> np.ndarray:
        """The log size at which the ladder has this loss; beyond its ends along the slope there."""
        grid = np.linspace(*self.span, 500)
        at = np.polyval(self.coefficients, grid - self.middle)
        found = np.interp(-loss, -at, grid)
        for end, beyond in ((0, loss > at[0]), (-1, loss < at[-1])):
            slope = np.polyval(np.polyder(np.array(self.coefficients)), grid[end] - self.middle)
            found = np.where(beyond, grid[end] + (loss - at[end]) / slope, found)
        return found


def size_map(size: np.ndarray, loss: np.ndarray, rung: np.ndarray) -> SizeMap:
    """Fits means of rungs.

    Args:
        size: log sizes of teachers, one a cell [m].
        loss: of these teachers.
        rung: codes.

    Raises:
        ValueError: the loss does not fall with size all along, so that a loss stands for no one size.
    """
    codes = np.unique(rung)
    s, y = (np.array([x[rung == c].mean() for c in codes]) for x in (size, loss))
    middle = float(s.mean())
    degree = 2 if len(codes) >= LEAST else 1
    fit = np.polyfit(s - middle, y, degree)
    slope = np.polyval(np.polyder(fit), np.linspace(s.min(), s.max(), 50) - middle)
    if (slope >= 0).any():
        raise ValueError(
            "axis=teacher_loss needs losses that fall with teacher size, but the quadratic fit to the ladder's losses "
            "does not. Train the larger ones longer, or fit axis=total."
        )
    rest = (y - np.polyval(fit, s - middle)) / np.polyval(np.polyder(fit), s - middle)
    free = max(1, len(codes) - degree - 1)
    sd = float(np.sqrt(rest @ rest / free * (1 + 1 / len(codes))))
    return SizeMap(tuple(map(float, fit)), middle, (float(s.min()), float(s.max())), sd)
