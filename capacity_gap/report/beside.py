"""Cells beside published ones: both losses of each, and the published cells' best teacher for the same students."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from capacity_gap.fit import JointFit, fit_joint
from capacity_gap.fit.joint_fit import Best
from capacity_gap.records.columns import BY
from capacity_gap.report.joint_tables import ratio
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.places import SWEEPS
from capacity_gap.settings.scales import format_scale, short_scale

CLOSE = math.log(1.5)  # students whose sizes differ by more are no neighbours
FAR = math.log(10.0)  # beyond the published sizes and budgets: nothing is predicted
PRUNED = 1.02  # a teacher is larger than its student by more
ASIDE = ("data_tokens",)  # a budget is compared cell by cell
HEADINGS = ("student", "teacher", "tokens", "loss", "published", "for student")


def alike(mine: pd.DataFrame, published: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The published cells that share most settings with `mine`, and a line for each setting in which they differ.

    Raises:
        ConfigError: there are no published cells.
    """
    found, notes = published[(published["status"] == "done") & (published["data_tokens"] > 0)], []
    if found.empty:
        raise ConfigError("there are no published cells to compare with: give --records another folder or table.")
    for column in (c for c in BY if c not in ASIDE and c in mine):
        held = found[column] if column in published else pd.Series(None, found.index, dtype=object)
        values = held.astype(object).where(held.notna(), None)  # a column left out is one that is empty in all rows
        own = mine[column].astype(object).where(mine[column].notna(), None).unique()
        same = values.isin(list(own))
        if not same.any():
            usual = values.mode(dropna=False).iloc[0]
            notes.append(f"{column}: {', '.join(map(_said, own))} here, {_said(usual)} there")
            same = values.isin([usual])
        found = found[same]
    return found, notes


def _said(value: object) -> str:
    return "none" if value is None else str(value)


def loss_rows(mine: pd.DataFrame, published: pd.DataFrame) -> list[list[str]]:
    """A row for each student, teacher and budget of `mine`: its mean loss, and that of the nearest published student.

    The published mean is followed by the standard deviation over runs and their number.
    """
    groups = published.groupby(["student", "teacher", "data_tokens"])["student_loss"]
    there = {tuple(key): losses for key, losses in groups}
    sizes = published.groupby("student")["student_params"].first()
    rows = []
    keys = ["student", "student_params", "teacher", "teacher_params", "data_tokens"]
    means = mine.groupby(keys)["student_loss"].mean().reset_index()
    for row in means.sort_values(["student_params", "data_tokens", "teacher_params"]).to_dict("records"):
        far = np.abs(np.log(sizes / row["student_params"]))
        near = str(far.idxmin())
        key = (near, row["teacher"], row["data_tokens"])
        known = there.get(key) if far.min() <= CLOSE else None
        said = "–" if known is None else f"{known.mean():.3f}{_spread(known)}"
        first = [row["student"], row["teacher"], short_scale(row["data_tokens"]), f"{row['student_loss']:.3f}"]
        rows.append([*first, said, "" if known is None else near])
    return rows


def _spread(losses: pd.Series) -> str:
    return f" ± {losses.std():.3f} ({len(losses)} runs)" if len(losses) > 1 else " (1 run)"


def answers(fit: JointFit, mine: pd.DataFrame) -> list[str]:
    """A sentence for each student and budget of `mine`, by a fit of the published cells."""
    lines = []
    rungs = mine.groupby("teacher")["teacher_params"].first().sort_values()
    pairs = mine.groupby(["student", "student_params", "data_tokens"]).size().reset_index()
    for row in pairs.sort_values(["student_params", "data_tokens"]).to_dict("records"):
        params, tokens = float(row["student_params"]), float(row["data_tokens"])
        if (far := _beyond(fit, params, tokens)) > FAR:
            name = f"a {row['student']} student at {short_scale(tokens)} tokens"
            lines.append(f"{name}: {math.exp(far):.0f} times beyond the published cells, so nothing is predicted")
            continue
        able = {str(name): float(size) for name, size in rungs.items() if size > params * PRUNED}
        if not able:
            continue
        best = fit.best_teacher(params, tokens, rungs=able)
        likely = max(best.probabilities, key=lambda name: best.probabilities[name])
        lines.append(
            f"a {row['student']} student at {short_scale(tokens)} tokens: {_times(best, params)}; of the teachers here "
            f"{likely} is best with probability {best.probabilities[likely]:.0%}"
        )
    return lines


def _beyond(fit: JointFit, params: float, tokens: float) -> float:
    """How far (log) a student or a budget is outside what was fitted."""
    curve = fit.curve
    n, d = math.log(params) - curve.means[0], math.log(tokens) - curve.means[1]
    spans = [(n, curve.n_span), *([(d, curve.d_span)] if "d" in curve.terms else [])]
    return max(max(low - x, x - high) for x, (low, high) in spans)


def _times(best: Best, params: float) -> str:
    said = ratio(best.params, best.interval, params)
    if said == "open":
        return "the best teacher's size is open at both ends"
    return f"the best teacher has {said} times its parameters"


def beside(mine: pd.DataFrame, published: pd.DataFrame, *, source: str) -> list[str]:
    """The whole comparison as lines of text.

    Args:
        mine: finished cells.
        published: records of others.
        source: what to call those.
    """
    if arms := [c for c in BY if c not in ASIDE and c in mine and mine[c].nunique(dropna=False) > 1]:
        raise ConfigError(
            f"these cells differ in {', '.join(arms)}, and a comparison takes cells alike but for student, teacher, "
            "budget and seed. Give another --sweep."
        )
    kept, notes = alike(mine, published)
    lines = [f"{len(mine)} cells beside {len(kept)} alike of {len(published)} published ones ({source})"]
    lines += _table([list(HEADINGS), *loss_rows(mine, kept)])
    lines += [f"  they differ in {note}" for note in notes]
    fit = fit_joint(kept, metric="student_loss")
    lines += ["", f"what the published cells predict (joint model, status {fit.status}):"]
    return lines + [f"  {line}" for line in answers(fit, mine)]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def next_commands(mine: pd.DataFrame, tool: Sequence[str], run: Sequence[str], store: str, sweep: str) -> list[str]:
    """What to type next: more seeds of the same grid where it has one, then the cells that would say most."""
    largest = mine.sort_values("student_params")["student"].iloc[-1]
    target = f"--student {largest} --data {format_scale(int(mine['data_tokens'].max()))}"
    lines = [f"{' '.join(tool)} next {store} --sweep {sweep} {target}"]
    if mine["seed"].nunique() == 1 and (SWEEPS / f"{sweep}.yaml").exists():
        used = int(mine["seed"].iloc[0])
        lines.insert(0, f"{' '.join(run)} -m +sweeps={sweep} seed={used + 1},{used + 2}")
    return lines
