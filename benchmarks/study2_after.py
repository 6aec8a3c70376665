"""Additions to the analysis of study two that were made when its answers were known (docs/study2.md).

They decide no registered question. What was corrected before any cell was read is in `study2_corrected.py`.
"""

import pandas as pd

from benchmarks.study2_answers import Estimate, Slope, differences, one_loss, recipe, slope_of


def start_differences(frame: pd.DataFrame) -> dict[str, Slope]:
    """Question 2: the slope of trained and of random starts less that of pruned ones, at each budget; paired."""
    taught, found = frame[frame["kd_weight"] > 0], {}
    pruned = taught[taught["init"] == "pruned"]
    for start in ("pretrained", "random"):
        for tokens, cells in taught[taught["init"] == start].groupby("data_tokens"):
            alike = pruned[pruned["data_tokens"] == tokens]
            found[f"{start} less pruned, slope at {tokens:,.0f}"] = slope_of(differences(cells, alike))
    return found


def apart(grid: pd.DataFrame, usual: pd.DataFrame, one: pd.DataFrame) -> dict[str, Estimate]:
    """Question 5: the contrasts where only the rate or only the KD weight is tuned, the other one as in the recipe."""
    keys = ["student", "teacher_params", "data_tokens", "seed"]
    found = {}
    for name, fixed in (("rate alone", "kd_weight"), ("KD weight alone", "learning_rate")):
        as_usual = grid.merge(usual[[*keys, fixed]], on=[*keys, fixed])
        contrasts = recipe(as_usual, usual, one)
        found |= {key.replace("tuned", f"tuned {name}"): e for key, e in contrasts.items() if key.startswith("tuned,")}
    return found


def own_disagreement(frame: pd.DataFrame, column: str) -> float:
    """Question 6: the share of pairs of a curve's teachers that two seeds order differently by one measure.

    Half says that a measure has no order that repeats.
    """
    return one_loss(frame.assign(loss=frame[column]), "loss", better=-1, draws=1)["own"]
