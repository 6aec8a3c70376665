"""The road to MiniChat at pico size: what each step did, and whether it passes. A table; exit status 1 if it does not.

    python run.py +sweeps=minichat_pico store=STORE
    python -m benchmarks.minichat STORE [--out results/minichat.csv]

Gates: exact match on held-out instructions at least `GAIN` above the student before tuning and above a constant answer
per task and script (the column `constant`: what a lookup reaches), both by three standard errors; held-out loss of the
tuned student at most `LOST` of the way from the distilled one's to a uniform guess; DPO's reward margin higher at its
end than at its start; fewer tokens for the second script, by a half.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import pandas as pd

from capacity_gap import records

GAIN = 0.1
LOST = 0.2
MODELS = ("constant", "base", "instruct", "prefer")


def scores(row: dict) -> pd.DataFrame:
    """One row per score of the answers, one column per model, with standard errors."""
    found: dict[str, dict[str, float]] = {}
    for name, score in row["metrics"].items():
        kind, _, model = name.rpartition("/")
        if model in MODELS:
            found.setdefault(kind, {})[model] = score["value"]
            found[kind][f"{model}_stderr"] = score["stderr"]
    columns = [c for m in MODELS for c in (m, f"{m}_stderr")]
    return pd.DataFrame.from_dict(found, orient="index")[columns].rename_axis("score").reset_index()


def failures(row: dict) -> list[str]:
    """Which gates the cell does not pass."""
    metrics, missed = row["metrics"], []
    after = metrics["exact_match/instruct"]
    for name, said in (("base", "before"), ("constant", "for a constant per task and script")):
        least = metrics[f"exact_match/{name}"]
        if after["value"] - least["value"] < max(GAIN, 3 * (least["stderr"] ** 2 + after["stderr"] ** 2) ** 0.5):
            missed.append(f"exact match: {least['value']:.3f} {said}, {after['value']:.3f} after fine-tuning")
    uniform, distilled = math.log(row["expanded_vocab"]), row["student_loss"]
    if row["tuned_loss"] > distilled + LOST * (uniform - distilled):
        missed.append(
            f"held-out loss: {distilled:.3f} distilled, {row['tuned_loss']:.3f} tuned; "
            f"a uniform guess has {uniform:.3f}"
        )
    start, end = (metrics[f"reward_margin/{when}"]["value"] for when in ("start", "end"))
    if end <= start:
        missed.append(f"DPO's reward margin does not rise: {start:.4f}, then {end:.4f}")
    if row["second_bytes_per_token"] < 1.5 * row["second_bytes_per_token_before"]:
        missed.append(f"the second script: {row['second_bytes_per_token']:.2f} bytes a token")
    return missed


def stages(store: Path, key: str) -> pd.DataFrame:
    """Seconds of each stage that the one named by `key` needs, as their folders say."""
    keys, todo = {key}, [key]
    while todo:
        needed = json.loads((store / todo.pop() / "stage.json").read_text())["inputs"].values()
        todo += set(needed) - keys
        keys.update(needed)
    made = [json.loads((store / k / "stage.json").read_text()) for k in keys]
    return pd.DataFrame([{"stage": m["name"], "wall_s": m["wall_s"]} for m in sorted(made, key=lambda m: m["created"])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/minichat.csv"))
    given = parser.parse_args()
    tuned = [r for r in records.read(given.store) if r["status"] == "done" and "exact_match/prefer" in r["metrics"]]
    if not tuned:
        parser.error(f"{given.store} records no cell that was fine-tuned and optimised on preferences.")
    (*more, row) = sorted(tuned, key=lambda r: r["created"])
    if more:
        print(f"{1 + len(more)} tuned cells are recorded; this is the youngest, {row['cell']}")
    found = scores(row)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    found.round(4).to_csv(given.out, index=False)
    margins = {when: round(row["metrics"][f"reward_margin/{when}"]["value"], 4) for when in ("start", "end")}
    print(found.round(3).to_string(index=False))
    print(
        f"\nreward margin {margins}; losses: teacher {row['teacher_loss']:.3f}, start {row['init_loss']:.3f}, ", end=""
    )
    print(
        f"distilled {row['student_loss']:.3f}, tuned {row['tuned_loss']:.3f}; bytes a token of the second script ",
        end="",
    )
    print(f"{row['second_bytes_per_token_before']:.3f} → {row['second_bytes_per_token']:.3f}\n")
    print(stages(given.store, f"record/{row['cell']}").to_string(index=False))
    missed = failures(row)
    print("\n" + ("\n".join(f"gate missed: {m}" for m in missed) or "all gates passed"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
