"""The tables of the pico study, in markdown."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from benchmarks.intervals import interval
from benchmarks.study_arms import Arm, main_of
from capacity_gap.fit.law_fit import LawFit
from capacity_gap.fit.optimum import Optimum
from capacity_gap.settings.scales import format_scale
from capacity_gap.wording.intervals import marks

SMALL, LARGE = 120_200, 899_712  # the ends of what every student of the confound was distilled from
REFERENCES = ("120k", "900k")
NONE = pd.DataFrame(columns=["data_tokens", "student_params", "student", "seed", "reference", "teacher_params"])
NOT_YET = "Not run yet."


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, or a placeholder while none of its cells have run."""
    if not rows:
        return NOT_YET
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)])


def within(interval: tuple[float | None, float | None] | None, form: str) -> str:
    """An interval in a few marks."""
    return marks(interval or (None, None), lambda v: format(v, form), least=-math.inf)


def over(interval: tuple[float | None, float | None], params: float) -> str:
    """An interval of teachers as one of ratios."""
    low, high = (None if v is None else v / params for v in interval)
    return within((low, high), ".1f")


def counted(params: float | None) -> str:
    """A number of parameters, or a dash."""
    return "–" if params is None else f"{params:,.0f}"


def estimate(value: float | None, interval: tuple[float, float] | None) -> str:
    """A number with its interval, or a dash."""
    return "–" if value is None else f"{value:.2f} ({within(interval, '.2f')})"


def optima_table(arms: list[Arm]) -> str:
    """One row a curve: optimum, interval, status, and how much worse the largest teacher is than the best."""
    head = ["arm", "student", "tokens", "teachers", "status", "best teacher", "95 % interval", "ratio"]
    rows = []
    for arm in arms:
        curses = {(c.student, c.data_tokens): c for c in arm.law.curses}
        for o in sorted(arm.law.optima, key=lambda o: (o.data_tokens or 0, o.student_params)):
            ratio = "–" if o.ratio is None else f"{o.ratio:.2f}"
            c = curses.get((o.student, o.data_tokens))
            excess = f"{c.excess:.3f} ({within(c.interval, '.3f')})" if c else "–"
            place = [arm.name, o.student, format_scale(o.data_tokens or 0), str(o.teachers), o.status]
            rows.append([*place, counted(o.teacher_params), within(o.interval, ",.0f"), ratio, excess])
    return markdown([*head, "largest − best, nats"], rows)


def ratios_table(arm: Arm) -> str:
    """The headline: each student's best teacher over its own size, by budget; bounds where only these are known."""
    of = {(o.student_params, o.student, o.data_tokens or arm.budgets[0]): o for o in arm.law.optima}
    rows = [
        [student, *(ratio_of(of[params, student, n]) if (params, student, n) in of else "" for n in arm.budgets)]
        for params, student in sorted({key[:2] for key in of})
    ]
    return markdown(["student", *(f"{format_scale(n)} tokens" for n in arm.budgets)], rows)


def ratio_of(optimum: Optimum) -> str:
    """Teacher over student with its interval, a bound, or the status."""
    if optimum.ratio is not None:
        return f"{optimum.ratio:.1f} ({over(optimum.interval, optimum.student_params)})"
    return optimum.status if optimum.interval == (None, None) else over(optimum.interval, optimum.student_params)


def argmin_table(arm: Arm) -> str:
    """The paper's way: the teacher of the lowest mean loss over the student, by budget, and the geometric mean."""
    means = arm.frame.groupby(["student_params", "student", "data_tokens", "teacher_params"])["student_loss"].mean()
    best = means.groupby(level=[0, 1, 2]).idxmin().map(lambda at: at[3] / at[0]).unstack()
    rows = [[str(student), *(f"{v:.1f}" if v == v else "" for v in row)] for (_, student), row in best.iterrows()]
    rows.append(["geometric mean", *(f"{np.exp(np.log(best[n]).mean()):.1f}" for n in best)])
    return markdown(["student", *(f"{format_scale(int(n))} tokens" for n in best)], rows)


def laws_table(arms: list[Arm]) -> str:
    """One row an arm, data scale, axis and method: the ratio with its null, its outer rungs and its two tests."""
    head = ["arm", "tokens", "parameters", "method", "status", "ratio (95 %)", "without outer rungs", "permutation p"]
    rows = []
    for arm in arms:
        for tokens in [*arm.budgets, *(["all"] if len(arm.budgets) > 1 else [])]:
            for axis, method in (("total", "asymmetric"), ("non_embedding", "asymmetric"), ("total", "argmin")):
                law = arm.fit(tokens, axis, method)
                said = [arm.name, tokens if tokens == "all" else format_scale(int(tokens)), axis, method, law.status]
                rows.append([*said, estimate(law.ratio, law.ratio_interval), *_beside(law)])
    return markdown([*head, "b (95 %)", "p of b = 1", "p of r = 2.5"], rows)


def _beside(law: LawFit) -> list[str]:
    outer = estimate(law.without_outer_rungs, law.without_outer_interval)
    tests = [f"{law.tests[t]:.3f}" if t in law.tests else "–" for t in ("b = 1", "r = 2.5")]
    return [outer, "–" if law.null_p is None else f"{law.null_p:.3f}", estimate(law.slope, law.slope_interval), *tests]


def teachers_table(frame: pd.DataFrame) -> str:
    """The teachers' own held-out losses, mean and standard deviation over seeds, for each way to train them."""
    taught = frame[(frame["family"] == "pico") & (frame["corpus"] == "embedded")]
    each = taught.drop_duplicates(["teacher", "teacher_data", "teacher_seed"])
    rows = [
        [str(policy), f"{params:,.0f}", f"{losses.mean():.3f}", f"{losses.std():.3f}"]
        for (policy, params), losses in each.groupby(["teacher_data", "teacher_params"])["teacher_loss"]
    ]
    return markdown(["tokens", "teacher", "loss", "standard deviation"], rows)


# Contrasts, paired by seed


def shown(values: np.ndarray) -> str:
    """Mean ± half of the interval, or a dash."""
    if not len(values):
        return "–"
    mean, half = interval(values)
    return f"{mean:.3f} ± {half:.3f}"


def by_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """Losses, a row a seed (its teachers are its own) and a column a teacher from 120k to 900k; empty without both."""
    table = frame.pivot_table(index="seed", columns="teacher_params", values="student_loss")
    return table.loc[:, SMALL:LARGE] if {LARGE, SMALL} <= set(table) else pd.DataFrame({SMALL: [], LARGE: []})


def rise(frame: pd.DataFrame) -> pd.Series:
    """Loss under the largest teacher less that under the 120k one, for each seed."""
    table = by_seed(frame)
    return (table[LARGE] - table[SMALL]).dropna()


def line(frame: pd.DataFrame) -> pd.Series:
    """The same difference along a straight line in log teacher through all teachers from one to the other."""
    table = by_seed(frame).dropna()
    x = np.log(np.array(table.columns, dtype=float))
    weight = (x - x.mean()) / ((x - x.mean()) ** 2).sum() * np.log(LARGE / SMALL)
    return table @ weight


def contrasts_table(arms: list[Arm]) -> str:
    """Loss under a teacher 7.5 times as large less that under the small one, in every arm beside the main one."""
    main = main_of(arms)
    rows = []
    for arm in arms:
        for tokens in arm.budgets if arm.differs else []:
            pairs = [_pairs(main.frame, arm.frame, tokens, of) for of in (rise, line)]
            if len(pairs[0]) > 1:
                of = f"mean of {len(pairs[0])}"
                pairs = [p | {of: (sum(p.values()) / len(p)).dropna()} for p in pairs]  # type: ignore[attr-defined]
            for student in pairs[0]:
                ends, through = (p[student] for p in pairs)
                place = [arm.name, student, format_scale(tokens), str(len(ends))]
                rows.append([*place, *_contrast(ends), _contrast(through)[-1]])
    head = ["arm", "student", "tokens", "seeds", "main arm", "this arm", "main − this", "main − this, linear fit"]
    return markdown(head, rows)


def factors_table(arms: list[Arm]) -> str:
    """Effects of start and teacher: loss by the rung that the student was cut from and by its teacher, a budget a row.

    Under its own teacher a pruned student is the shared one, so four corners need two shared arms alone.
    """
    cells = pd.concat(
        [a.frame for a in arms if "reference" in a.differs and a.differs <= {"init", "reference"}] or [NONE]
    )
    rows = []
    for (tokens, _, student), of in cells.groupby(["data_tokens", "student_params", "student"]):
        table = of.pivot_table(index="seed", columns=["reference", "teacher_params"], values="student_loss").dropna()
        corners = [(r, t) for r in REFERENCES for t in (SMALL, LARGE)]
        if set(corners) <= set(table):
            loss = {c: table[c].to_numpy() for c in corners}
            good, bad = REFERENCES
            start = sum(loss[bad, t] - loss[good, t] for t in (SMALL, LARGE)) / 2
            taught = sum(loss[r, LARGE] - loss[r, SMALL] for r in REFERENCES) / 2
            means = [f"{loss[c].mean():.3f}" for c in corners]
            rows.append([str(student), format_scale(int(tokens)), *means, shown(start), shown(taught)])
    starts = [f"cut from {r}, teacher {t}" for r in REFERENCES for t in REFERENCES]
    return markdown(["student", "tokens", *starts, "effect of start", "effect of teacher"], rows)


def _pairs(main: pd.DataFrame, held: pd.DataFrame, tokens: int, of: Callable) -> dict[str, pd.DataFrame]:
    """What `of` gives for each student that both arms hold, one row a seed."""
    main, held = (f[f["data_tokens"] == tokens] for f in (main, held))
    students = held.sort_values("student_params")["student"].unique()
    both = {
        str(s): pd.concat([of(f[f["student"] == s]) for f in (main, held)], axis=1, keys=["main", "held"]).dropna()
        for s in students
    }
    return {s: pair for s, pair in both.items() if len(pair)}


def _contrast(pair: pd.DataFrame) -> list[str]:
    main, held = pair["main"].to_numpy(), pair["held"].to_numpy()
    return [shown(main), shown(held), shown(main - held)]


def budget_table(arm: Arm) -> str:
    """Students distilled on several budgets: how the best teacher and the largest one's excess change with tokens."""
    rows = []
    for (_, student), cells in arm.frame.groupby(["student_params", "student"]):
        budgets = sorted(cells["data_tokens"].unique())
        if len(budgets) < 2:
            continue
        doublings = np.log2(budgets) - np.log2(budgets).mean()
        rises = pd.concat([rise(cells[cells["data_tokens"] == n]) for n in budgets], axis=1).dropna().to_numpy()
        slopes = rises @ doublings / (doublings**2).sum()
        moved = _moves(arm, str(student), doublings)
        per = [f"{n / cells['student_params'].iloc[0]:.3g}" for n in budgets]
        rows.append([str(student), ", ".join(per), moved, shown(slopes)])
    head = ["student", "tokens a parameter", "best teacher, factor per doubling", "largest − 120k per doubling, nats"]
    return markdown(head, rows)


def _moves(arm: Arm, student: str, doublings: np.ndarray) -> str:
    """By what factor the minimum on the grid moves with every doubling of the tokens, over the draws of the chain."""
    found = arm.located.found
    mine = [i for i, c in enumerate(found) if c.key["student"] == student]
    mine.sort(key=lambda i: found[i].key.get("data_tokens") or 0)  # type: ignore[return-value, arg-type]
    weight = doublings / (doublings**2).sum()
    draws = np.exp(arm.located.best_draws[:, mine] @ weight)
    return estimate(float(np.exp(arm.located.best[mine] @ weight)), tuple(np.quantile(draws, [0.025, 0.975])))


def direct_table(frame: pd.DataFrame) -> str:
    """Direct training less distillation under each curve's best teacher, from the same random start, by seed."""
    random = frame[(frame["init"] == "random") & (frame["teacher_data"] == "1m")]
    direct, taught = random[random["kd_weight"] == 0], random[random["kd_weight"] == 0.5]
    rows = []
    for (tokens, _, student), cells in direct.groupby(["data_tokens", "student_params", "student"]):
        theirs = taught[(taught["student"] == student) & (taught["data_tokens"] == tokens)]
        if theirs.empty:
            continue
        best = theirs.groupby("teacher")["student_loss"].mean().idxmin()
        ours = theirs[theirs["teacher"] == best].set_index("seed")["student_loss"]
        gain = (cells.set_index("seed")["student_loss"] - ours).dropna()
        losses = [f"{cells['student_loss'].mean():.3f}", f"{ours.mean():.3f}"]
        rows.append([str(student), format_scale(int(tokens)), losses[0], str(best), losses[1], shown(gain.to_numpy())])
    return markdown(["student", "tokens", "direct", "best teacher", "distilled", "direct − distilled"], rows)


def seed_variance_table(frame: pd.DataFrame) -> str:
    """Standard deviations of a loss over teacher seeds and over student seeds, where both were crossed."""
    rows = []
    main = frame[(frame["data_tokens"] > 0) & (frame["init"] == "pruned") & (frame["kd_weight"] == 0.5)]
    main = main[(main["family"] == "pico") & (main["teacher_data"] == "1m") & (main["corpus"] == "embedded")]
    for (student, teacher_params, tokens), cells in main.groupby(["student", "teacher_params", "data_tokens"]):
        table = cells.pivot_table(index="teacher_seed", columns="seed", values="student_loss").dropna()
        if min(table.shape) > 1:
            spread = [table.mean(axis=1).std(), table.mean(axis=0).std(), remainder(table.to_numpy())]
            place = [str(student), format_scale(int(tokens)), f"{teacher_params:,.0f}"]
            rows.append([*place, *(f"{v:.4f}" for v in spread)])
    return markdown(["student", "tokens", "teacher", "teacher seed", "student seed", "residual"], rows)


def remainder(table: np.ndarray) -> float:
    """Residual standard deviation of a two-way table without interaction."""
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    return float(np.sqrt((rest**2).sum() / (table.shape[0] - 1) / (table.shape[1] - 1)))
