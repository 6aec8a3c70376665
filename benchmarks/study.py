"""Every figure and number of the pico study, from its records.

    python -m benchmarks.study export STORE        copy the study's cells out of a store, to results/pico/
    python -m benchmarks.study figures             law.json, docs/study_*.png, and the tables inside docs/study.md

Tables stand in docs/study.md between `<!-- NAME -->` and `<!-- /NAME -->`; a test makes them again and compares.
"""

import argparse
import re
from pathlib import Path

import pandas as pd

from capacity_gap import records
from capacity_gap.fit.frame import curves
from capacity_gap.fit.law import LawFit, law_from
from capacity_gap.fit.optimum import Located, locate
from capacity_gap.report.plots import plot_curves, plot_law, save_figure
from capacity_gap.scales import format_scale

ROOT = Path(__file__).resolve().parent.parent
RECORDS, PAGE = ROOT / "results" / "pico", ROOT / "docs" / "study.md"
DROPPED = ("error", "git_commit", "micro_batch", "created", "schema_version", "peak_memory_bytes", "ranks")


def export(store: str) -> None:
    """One CSV for each of the store's sweeps, sorted, without what only the machine knows."""
    from capacity_gap import store_tools

    frame = records.load(store)
    for name, cells in store_tools.sweeps(store_tools.open_store(store)).items():
        mine = frame[("record/" + frame["cell"]).isin(list(cells)) & (frame["status"] == "done")]
        mine = mine.drop(columns=list(DROPPED)).dropna(axis=1, how="all").sort_values("cell")
        RECORDS.mkdir(parents=True, exist_ok=True)
        mine.to_csv(RECORDS / f"{name}.csv", index=False, float_format="%.6g")
        print(f"{name}: {len(mine)} cells")


def load() -> pd.DataFrame:
    """The study's cells, each once."""
    return records.load(RECORDS).drop_duplicates("cell").reset_index(drop=True)


def arm(frame: pd.DataFrame, **given: object) -> pd.DataFrame:
    """The rows that have the given values."""
    for name, value in given.items():
        frame = frame[frame[name] == value]
    return frame


def fit(frame: pd.DataFrame, axis: str = "total", method: str = "asymmetric") -> tuple[Located, LawFit]:
    """Curves, optima and law of one arm."""
    found, notes = curves(frame, axis=axis)
    located = locate(found, method=method)
    return located, law_from(located, axis=axis, notes=notes)


def optima_table(law: LawFit) -> str:
    """One row a curve."""
    lines = ["| student | tokens | teachers | status | best teacher | 95 % interval | ratio | largest − best, nats |"]
    lines.append("|---" * 8 + "|")
    for o, c in zip(law.optima, law.curses, strict=True):
        best = "–" if o.teacher_params is None else f"{o.teacher_params:,.0f}"
        low, high = ("…" if v is None else f"{v:,.0f}" for v in o.interval)
        ratio = "–" if o.ratio is None else f"{o.ratio:.2f}"
        excess = f"{c.excess:.3f} ({c.interval[0]:.3f} to {c.interval[1]:.3f})"
        lines.append(
            f"| {o.student} | {format_scale(o.data_tokens or 0)} | {o.teachers} | {o.status} | {best} "
            f"| {low} to {high} | {ratio} | {excess} |"
        )
    return "\n".join(lines)


def arms_table(frame: pd.DataFrame) -> str:
    """One row a data scale, parameter axis and method: status, ratio, null."""
    lines = ["| tokens | parameters | method | status | ratio (95 %) | permutation p |", "|---" * 6 + "|"]
    for tokens in sorted(frame["data_tokens"].unique()):
        part = arm(frame, data_tokens=tokens)
        for axis, method in (("total", "asymmetric"), ("non_embedding", "asymmetric"), ("total", "argmin")):
            law = fit(part, axis, method)[1]
            ratio = "–"
            if law.ratio is not None and law.ratio_interval is not None:
                ratio = f"{law.ratio:.2f} ({law.ratio_interval[0]:.2f} to {law.ratio_interval[1]:.2f})"
            p = "–" if law.null_p is None else f"{law.null_p:.3f}"
            lines.append(f"| {format_scale(int(tokens))} | {axis} | {method} | {law.status} | {ratio} | {p} |")
    return "\n".join(lines)


def teachers_table(frame: pd.DataFrame) -> str:
    """The teachers' own held-out losses, mean and standard deviation over seeds."""
    each = frame.drop_duplicates(["teacher", "teacher_seed"]).groupby("teacher_params")["teacher_loss"]
    lines = ["| teacher | loss | standard deviation |", "|---|---|---|"]
    for params, losses in each:
        lines.append(f"| {params:,.0f} | {losses.mean():.3f} | {losses.std():.3f} |")
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """The tables of docs/study.md."""
    frame = load()
    trained, start = frame[frame["data_tokens"] > 0], frame[frame["data_tokens"] == 0]
    law = fit(trained)[1]
    return {
        "teachers": teachers_table(frame),
        "optima": optima_table(law),
        "start": optima_table(fit(start)[1]),
        "arms": arms_table(frame),
        "verdict": f"> {law.verdict()}",
    }


def filled(text: str, tables: dict[str, str]) -> str:
    """The page with each table in its place."""
    for name, table in tables.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not marked.search(text):
            raise SystemExit(f"docs/study.md has no place for {name}: <!-- {name} --> … <!-- /{name} -->")
        text = marked.sub(lambda m, t=table: m[1] + t + "\n" + m[2], text)  # type: ignore[misc]
    return text


def figures() -> None:
    """Writes everything that is published."""
    trained = load().query("data_tokens > 0")
    located, law = fit(trained)
    law.save(RECORDS / "law.json")
    for figure, name in ((plot_curves(located), "study_curves"), (plot_law(law), "study_law")):
        save_figure(figure, ROOT / "docs" / name)
        (ROOT / "docs" / f"{name}.svg").unlink()
    PAGE.write_text(filled(PAGE.read_text(), pages()))
    print(law.summary())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("export", "figures"))
    parser.add_argument("store", nargs="?")
    given = parser.parse_args()
    if given.what == "export":
        if not given.store:
            parser.error("export needs the STORE")
        export(given.store)
    else:
        figures()


if __name__ == "__main__":
    main()
