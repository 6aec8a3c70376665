"""The tables of docs/study2.md, in markdown, of what `study2_answers` and `study2_corrected` found."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from benchmarks.study2_after import own_disagreement
from benchmarks.study2_answers import Estimate, Slope, judged, one_loss, rates, stands
from benchmarks.study2_corrected import excess, hedged_brier, set_held
from benchmarks.study_tables import markdown
from capacity_gap.fit import JointFit
from capacity_gap.settings.scales import short_scale
from capacity_gap.wording.intervals import marks

STARTS = {"pruned": "pruned", "pretrained": "trained", "random": "random"}  # as the page calls them
WIDTH = 32  # of the 80k student, for which rates were tuned


def row_table(row: Mapping[str, object]) -> str:
    """One answer, a row a quantity."""
    return markdown(["quantity", "found"], [[name, said(value)] for name, value in row.items()])


def said(value: object) -> str:
    """A value, a size or an interval in a few digits."""
    if isinstance(value, tuple):
        return marks(value, "{:.2f}".format)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def rows_table(rows: pd.DataFrame) -> str:
    """A table as it is, with four decimals."""
    return markdown(list(rows), [[str(value) for value in row] for row in rows.round(4).to_numpy()])


def ratios_table(fit: JointFit) -> str:
    """Best teacher over student at each budget, at a student of middle size, with its 95 % set."""
    rows = []
    for tokens in fit.budgets:
        found = fit.ratio_at(tokens)
        rows.append([short_scale(round(tokens or 0, -3)), f"{found.value:.1f}", marks(found.interval, "{:.1f}".format)])
    return markdown(["tokens", "best teacher over student", "95 % set"], rows)


def rates_table(frame: pd.DataFrame) -> str:
    """Question 2's rates: mean validation loss, a row a start and budget; bold is that of the rate that was taken."""
    found = rates(frame)
    tried = sorted(found["learning_rate"].unique())
    rows = []
    for (start, tokens), mine in found.groupby(["init", "data_tokens"]):
        by = mine.set_index("learning_rate")
        losses = [f"{by.at[r, 'student_loss_validation']:.3f}" for r in tried]
        taken = [f"**{loss}**" if by.at[r, "taken"] else loss for r, loss in zip(tried, losses, strict=True)]
        rows.append([STARTS[str(start)], short_scale(tokens), *taken])
    return markdown(["start", "tokens", *(f"{rate * WIDTH:.2g} / width" for rate in tried)], rows)


def starts_table(slopes: Mapping[str, Slope], by_student: Mapping[str, Mapping[str, Slope]]) -> str:
    """Question 2: the slope at each budget and its growth, a row a start: of both students, then of each."""
    cells: dict[tuple[str, str], dict[str, Slope]] = {}
    for student, mine in {"both": slopes, **by_student}.items():
        for name, slope in mine.items():
            start, _, what = name.partition(": ")
            if start in STARTS:
                cells.setdefault((start, student), {})[what] = slope
    columns = sorted({w for row in cells.values() for w in row}, key=lambda w: (w.startswith("growth"), len(w), w))
    head = [_plainly(w) for w in columns]
    rows = [
        [STARTS[key[0]], key[1], *(established(cells[key][w]) if w in cells[key] else "–" for w in columns)]
        for key in sorted(cells, key=lambda key: (list(STARTS).index(key[0]), key[1] != "both", len(key[1]), key[1]))
    ]
    return markdown(["start", "student", *head], rows)


def established(slope: Slope) -> str:
    """A slope and what is established of it."""
    return f"{slope}: {SIGNS[slope.sign]}"


SIGNS = {"falls": "below zero", "rises": "above zero", "open": "open"}


def slopes_table(slopes: Mapping[str, Slope]) -> str:
    """What each slope is, its p against zero, and what is established."""
    rows = [
        [_plainly(name), str(s), f"{s.p:.2g}", SIGNS[s.sign] + (", small" if s.small else "")]
        for name, s in slopes.items()
    ]
    return markdown(["quantity", "nats per unit of log teacher size", "p", "established"], rows)


def _plainly(name: str) -> str:
    """A quantity in the words of the page, its tokens short: the answers write `slope at 300,000`."""
    head, _, last = name.replace("pretrained", "trained").rpartition(" ")
    number = last.replace(",", "")
    return f"{head} {short_scale(int(number)) if number.isdigit() else last}".strip()


def controls_table(gains: pd.DataFrame) -> str:
    """Question 2's controls: what a teacher adds to a start, a row a start, student and budget; nats."""
    rows = [
        [
            STARTS[row["start"]],
            row["student"],
            short_scale(row["tokens"]),
            f"{row['direct']:.3f}",
            f"{row['mean gain']:+.3f}",
            f"{row['its gain']:+.3f} ({row['best']})",
        ]
        for row in gains.to_dict("records")
    ]
    return markdown(
        ["start", "student", "tokens", "loss of direct training", "mean gain", "gain of the best rung"], rows
    )


def curves_of(told: pd.DataFrame, came: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Question 3, a row a curve: its scores as registered, and those of the baseline with odds."""
    keys = ["student", "data_tokens"]
    return judged(told, came, before).merge(hedged_brier(told, came, before)[[*keys, "hedge", "hedged"]], on=keys)


def forecast_table(told: pd.DataFrame, came: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Question 3, a column a curve: Brier scores beside those of the baselines, the likeliest rung and the best one."""
    held = set_held(told, came).set_index("student")
    names = {
        "brier": "Brier score of the odds",
        "brier, nearest budget": "of the order in the nearest curve",
        "hedged": "of the nearest curve, given odds",
        "right": "likelier teacher was better, of all pairs",
        "regret": "its loss above the best, nats",
        "regret of the mean rung": "that of a random rung, nats",
    }
    form = {"right": "{:.0%}", "regret": "{:.3f}", "regret of the mean rung": "{:.3f}"}
    rows: list[list[str]] = [[label] for label in names.values()]
    likeliest, best, inside = ["likeliest rung"], ["rung that came out best"], ["95 % set of the best teacher"]
    head = ["quantity"]
    for _, curve in curves.iterrows():
        head.append(f"{curve['student']} at {short_scale(curve['data_tokens'])}")
        for row, name in zip(rows, names, strict=True):
            row.append(form.get(name, "{:.3f}").format(curve[name]))
        likeliest.append(curve["taken"])
        best.append(f"{curve['best']} (given {curve['probability of the best']:.1%})")
        inside.append(held.at[curve["student"], "95 % set of the best teacher"])
    return markdown(head, [*rows[:4], likeliest, *rows[4:], best, inside])


def odds_table(told: pd.DataFrame, came: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Over the pairs of all curves: Brier scores, and how often the likelier teacher won, by the odds it was given."""
    rows = [
        [name, f"{np.average(curves[column], weights=curves['pairs']):.3f}"]
        for name, column in (
            ("Brier score of the odds", "brier"),
            ("of the order in the nearest curve (registered)", "brier, nearest budget"),
            ("of even odds (registered)", "brier, even odds"),
            (f"of the nearest curve with odds of {curves['hedge'].iloc[0]:.0%}", "hedged"),
        )
    ]
    means = came.groupby(["student", "data_tokens", "teacher"])["loss"].mean()
    keys = told[["student", "data_tokens"]].apply(tuple, axis=1)
    won = [
        means.get((*k, large), np.nan) - means.get((*k, small), np.nan)
        for k, small, large in zip(keys, told["small"], told["large"], strict=True)
    ]
    kept = told.assign(larger=np.array(won) < 0)[~np.isnan(won)]
    sure = np.maximum(kept["odds"], 1 - kept["odds"])
    right = (kept["odds"] > 0.5) == kept["larger"]
    for low, high in ((0.5, 0.7), (0.7, 0.9), (0.9, 1.0)):
        part = (sure > low) & (sure <= high)
        told_so = f"{right[part].mean():.0%} right, {sure[part].mean():.0%} expected" if part.any() else "none"
        rows.append([f"odds of {low:.0%} to {high:.0%} ({part.sum()} pairs)", told_so])
    return markdown(["over all pairs", "found"], rows)


def recipe_table(contrasts: Mapping[str, Estimate], *, verdict: bool = True) -> str:
    """Question 5: the contrast of the largest teacher with the smallest, a column a budget, and what it establishes."""
    budgets = list(dict.fromkeys(name.rsplit(", ", 1)[1] for name in contrasts))
    kinds = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in contrasts))
    rows = [[kind, *(str(contrasts[f"{kind}, {budget}"]) for budget in budgets)] for kind in kinds]
    head = [_plainly(f"at {budget}") for budget in budgets]
    if verdict:
        rows.append(["the break-even", stands(dict(contrasts)), *[""] * (len(budgets) - 1)])
    return markdown(["900k less 120k, nats", *head], rows)


def loss_table(frame: pd.DataFrame) -> str:
    """Question 6, a row a measure."""
    measures = {"student_loss_ood": ("student_loss_ood", -1)}
    for task in ("pico_cloze", "pico_next"):
        if f"metrics/{task}" in frame:
            measures[task] = (f"metrics/{task}", 1)
    frame, rows = frame[frame["teacher_params"] > 1.02 * frame["student_params"]], []
    for name, (column, better) in measures.items():
        found = one_loss(frame, column, better=better)
        own = [f"{own_disagreement(frame, of):.3f}" for of in ("loss", column)]
        rows.append([name, f"{found['discordant']:.3f}", f"{found['across']:.3f}", *own, f"{found['excess']:.4f}"])
        rows[-1] += [f"{found['excess_low']:.4f} to {found['excess_high']:.4f}"]
        mended = excess(frame, column, better=better)
        rows[-1] += [f"{mended['excess']:.4f} ({mended['excess_low']:.4f} to {mended['excess_high']:.4f})"]
        rows[-1] += [f"{found['regret']:.4f} of {found['range']:.4f}"]
    return markdown(
        [
            "measure",
            "pairs that it orders unlike loss, means over seeds",
            "the same, across two seeds",
            "two seeds, by loss",
            "two seeds, by this measure",
            "excess",
            "95 %",
            "excess, corrected",
            "cost of choosing by loss, of the range",
        ],
        rows,
    )
