"""Adjusts losses for differences in student size within a curve, and propagates the error of the adjustment.

Within 1 % the slope of loss against log size is taken as known. Beyond, it is estimated in each setting, between
students under the same teacher, and every bootstrap draw of the chain draws it anew. A curve whose setting does
not identify it is left out and named.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd

TIGHT = 0.01  # sizes within 1 % in a curve: adjusted for, or said to differ, without an error of their own
SPREAD = 0.05  # log units off their teacher's mean that students must differ by to tell what size does
LEAST_TELLING = 4  # teachers with such students that a slope with a standard error takes
SIZE_TERMS = ("_size", "_distance", "_bend")


@dataclass(frozen=True, eq=False)
class SizeSlope:
    """`value` [3] of `ℓ = T(teacher) + γ·u + c·(x − u − m)² + q·u²` in one setting: u log student size off its mean, x
    log teacher scale, m their mean distance. Its covariance is `spread'spread`, a jackknife over teachers [G, 3].
    """

    value: np.ndarray
    spread: np.ndarray
    df: int


class Adjusted(Protocol):
    """A curve: what size did to its means [K, 3], and with which slope; None where all students are of one size."""

    @property
    def size_off(self) -> np.ndarray | None: ...  # noqa: D102

    @property
    def size_slope(self) -> SizeSlope | None: ...  # noqa: D102


def adjust_for_size(
    frame: pd.DataFrame, student: str, teacher: str, column: str, keys: Sequence[str]
) -> tuple[pd.DataFrame, list[str]]:
    """Takes out what a student's size, off its curve's mean, does to its loss: `ℓ − γ·(log N_S − mean log N_S)`.

    γ = ∂ℓ/∂log N_S is estimated between students under the same teacher and settings, since within a curve size may go
    with the teacher's; 2 % of a student's parameters are worth about 0.006 nats at pico scale (docs/method.md §6).

    Returns:
        The table, and notes. Where sizes within a curve differ by more than `TIGHT`, columns `_slope` and
        `SIZE_TERMS` hold what the error acts on; curves that do not identify γ are left out.
    """
    logs = frame[student].astype(float).map(math.log)
    groups = [frame[k] for k in keys]
    off = logs - logs.groupby(groups, dropna=False).transform("mean")
    # 0.1 % of a student's size is worth about 0.0003 nats (docs/method.md §6).
    if off.abs().max() < 1e-3:
        return frame, []
    sizes = frame[student].astype(float).groupby(groups, dropna=False)
    wide = sizes.transform("max") > sizes.transform("min") * (1 + TIGHT) * (1 + 1e-9)
    adjusted, notes = _adjust_tight(frame, teacher, column, keys, logs, off.mask(wide, 0.0))
    if not wide.any():
        return adjusted, notes
    adjusted, said = _adjust_wide(adjusted, student, teacher, column, keys, off.where(wide).to_numpy(float))
    return adjusted, [*notes, *said]


def _adjust_tight(
    frame: pd.DataFrame, teacher: str, column: str, keys: Sequence[str], logs: pd.Series, off: pd.Series
) -> tuple[pd.DataFrame, list[str]]:
    """Adjusts by one γ for the whole table, taken as known; not at all where γ is not."""
    others = [frame[k] for k in (*keys, teacher) if k != "_student"]
    within = [v - v.groupby(others, dropna=False).transform("mean") for v in (logs, frame[column].astype(float))]
    most = off.abs().max()
    if (within[0].abs() < SPREAD).all():
        note = f"student sizes differ by up to {most:.1%} within a curve; not adjusted for: each has one size"
        return frame, [note] if most >= 1e-3 else []
    gamma = float((within[0] * within[1]).sum() / (within[0] ** 2).sum())
    note = f"losses adjusted for student sizes that differ by up to {most:.1%} ({gamma:.3f} nats per log unit)"
    return frame.assign(**{column: frame[column].astype(float) - gamma * off}), [note] if most >= 1e-3 else []


def _adjust_wide(
    frame: pd.DataFrame, student: str, teacher: str, column: str, keys: Sequence[str], off: np.ndarray
) -> tuple[pd.DataFrame, list[str]]:
    """Adjusts rows whose `off` is not NaN by the slope of their setting; leaves them out where that has none."""
    settings = [k for k in keys if k != "_student"]
    groups = [frame[k] for k in settings] or [pd.Series(0, index=frame.index)]
    number = frame.groupby(groups, dropna=False, sort=False).ngroup().to_numpy()
    u, x, loss = (f(frame[c].to_numpy(float)) for f, c in ((np.log, student), (np.log, teacher), (np.array, column)))
    terms, slopes, notes = np.zeros((len(frame), 3)), np.full(len(frame), None, dtype=object), []
    for mine in (number == n for n in np.unique(number[np.isfinite(off)])):
        wide = mine & np.isfinite(off)
        centre, m = u[mine].mean(), (x[mine] - u[mine]).mean()
        slope = _size_slope(_size_terms(u, x, centre, m)[mine], loss[mine], x[mine], frame["_student"][mine])
        if slope is None:
            notes += [_refusal(part, student, settings) for _, part in frame[wide].groupby("_student", sort=False)]
            continue
        terms[wide] = (_size_terms(u, x, centre, m) - _size_terms(u - off, x, centre, m))[wide]
        loss[wide] -= terms[wide] @ slope.value
        slopes[wide] = slope
        notes.append(_adjustment(slope, float(np.abs(off[wide]).max())))
    added = {**dict(zip(SIZE_TERMS, terms.T, strict=True)), column: loss, "_slope": pd.Series(slopes, frame.index)}
    return frame.assign(**added)[np.isnan(off) | pd.notna(slopes)], notes


def _size_terms(u: np.ndarray, x: np.ndarray, centre: float, m: float) -> np.ndarray:
    """What a student's size may do to its loss [n, 3]: by itself, by its distance from the teacher, and bent."""
    return np.stack([u - centre, (x - u - m) ** 2, (u - centre) ** 2], axis=1)


def _size_slope(terms: np.ndarray, loss: np.ndarray, x: np.ndarray, students: pd.Series) -> SizeSlope | None:
    """Least squares within teachers, and again without each; None if too few have students of unlike size."""
    values = pd.DataFrame(np.column_stack([terms, loss]))
    within = (values - values.groupby(x).transform("mean")).to_numpy()
    teachers = [t for t in np.unique(x) if np.abs(within[x == t, 0]).max() >= SPREAD]
    bent = sum(students[x == t].nunique() > 2 for t in teachers) >= 2 and len(teachers) > LEAST_TELLING
    P, G = 3 if bent else 2, len(teachers)  # two students do not tell a bend
    if G < LEAST_TELLING:
        return None
    products = np.array([within[x == t].T @ within[x == t] for t in teachers])  # [G, 4, 4]
    sums = np.concatenate([products.sum(0)[None], products.sum(0) - products])
    if np.linalg.cond(sums[:, :P, :P]).max() > 1e8:
        return None
    found = np.zeros((G + 1, 3))
    found[:, :P] = np.linalg.solve(sums[:, :P, :P], sums[:, :P, 3:])[..., 0]
    return SizeSlope(found[0], (found[1:] - found[0]) * math.sqrt((G - 1) / G), G - P)


def _adjustment(slope: SizeSlope, most: float) -> str:
    stderr = math.sqrt((slope.spread[:, 0] ** 2).sum())
    return (
        f"losses adjusted for student sizes that differ by up to {most:.1%} ({slope.value[0]:.3f} ± {stderr:.3f} nats "
        f"per log unit, from {len(slope.spread)} teachers); intervals include that error"
    )


def _refusal(part: pd.DataFrame, student: str, settings: Sequence[str]) -> str:
    """Why a curve is left out, and what to do."""
    low, high = part[student].min(), part[student].max()
    where = "".join(f", {k}={part[k].iloc[0]}" for k in settings if part[k].notna().all())
    return (
        f"student {part['_student'].iloc[0]}{where} left out ({len(part)} rows): its sizes differ by "
        f"{high / low - 1:.1%} ({low:,.0f} to {high:,.0f}), and the effect of size alone is not identified. Use "
        f"prune.shape=common, or add students of other sizes under at least {LEAST_TELLING} of the same teachers"
    )


def size_draws(found: Sequence[Adjusted], shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """What the error of adjusting for size does to the means [B, C, K]: one draw for all curves of a setting."""
    errors = np.zeros(shape)
    drawn: dict[SizeSlope, np.ndarray] = {}
    for c, curve in enumerate(found):
        slope, off = curve.size_slope, curve.size_off
        if slope is None or off is None:
            continue
        if slope not in drawn:
            scale = np.sqrt(slope.df / generator.chisquare(slope.df, shape[0]))
            drawn[slope] = generator.standard_normal((shape[0], len(slope.spread))) @ slope.spread * scale[:, None]
        errors[:, c, : len(off)] = -drawn[slope] @ off.T
    return errors
