"""What a benchmark gives: a number with its standard error, and whether more is better. Imports nothing heavy."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from capacity_gap.records.tables import booleans, numbers
from capacity_gap.settings.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Score:
    """One score of one model: in the harness's own unit (accuracies 0 to 1), with its standard error."""

    task: str
    metric: str  # as the harness spells it, with its filter where it has one: `exact_match,strict-match`
    value: float
    stderr: float | None
    shots: int | None
    higher_is_better: bool | None
    samples: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def as_metrics(scores: Sequence[Score]) -> dict[str, dict[str, Any]]:
    """`{task: {value, stderr, shots, …}}` as records hold it.

    A task's first metric goes under its own name, others under `task/metric`.
    """
    found: dict[str, dict[str, Any]] = {}
    for score in scores:
        key = score.task if score.task not in found else f"{score.task}/{score.metric}"
        found[key] = {k: v for k, v in score.to_dict().items() if k != "task"}
    return found


# What a name says of its direction where the table does not: losses and perplexities down, shares of right answers up.
_DOWN = re.compile(
    r"loss|nll|cross_entropy|perplexity|ppl|bits_per_byte|entropy|error|wikitext|lambada|brier|flops|memory|wall_s"
)
_UP = re.compile(r"acc|exact_match|\bem\b|f1|pass@|mcc|bleu|rouge|win_rate|rating|tokens_per_s")
_UP_TASKS = re.compile(r"mmlu|ceval|drop|humaneval|bbh|gsm8k|pico_(cloze|next)")


def metric_direction(name: str, frame: "pd.DataFrame | None" = None) -> int:
    """Returns +1 if more of column `name` is better, −1 if less is.

    What was recorded beside a score (`<name>/higher_is_better`) decides; else the name does.

    Raises:
        UserError: neither says, or a cell beside a score is neither true nor false.
    """
    column = f"{name}/higher_is_better"
    if frame is not None and column in frame and (said := set(booleans(frame[column]).dropna())):
        if len(said) == 1:
            return 1 if said.pop() else -1
        raise UserError(f"the records disagree on whether higher {name} is better ({column} holds both).")
    metric = name.rpartition("/")[2]
    for pattern, direction in ((_DOWN, -1), (_UP, 1), (_UP_TASKS, 1)):
        if pattern.search(metric):
            return direction
    raise UserError(
        f"it is unknown whether higher {name} is better. Add a column {column} (true or false) to the table, or use a "
        "column name that implies it, such as one that ends in loss, perplexity or acc."
    )


WRONG = "1 − "  # in front of a score's name: the share of wrong answers


def measured(name: str | None) -> str:
    """What a fit minimises, in words: the loss, unless another column was named."""
    if name is None or name in ("loss", "student_loss"):
        return "loss"
    if name.startswith(WRONG):
        return f"error rate of {name.removeprefix(WRONG).removeprefix('metrics/')}"
    return name.removeprefix("metrics/").replace("_", " ")


def as_loss(frame: "pd.DataFrame", name: str | None) -> "tuple[pd.DataFrame, str | None]":
    """The table with a column of which less is better, since fits minimise, and what that column is called.

    A loss stays as it is. A share of right answers `x` becomes the share of wrong ones, `1 − x`; any other score `−x`.

    Raises:
        UserError: nothing says which way is better, or a score is no number.
    """
    if name is None or name not in frame or metric_direction(name, frame) < 0:
        return frame, name
    values = numbers(frame, [name])[name].astype(float)
    share = values.dropna().between(0, 1).all()
    turned = f"{WRONG}{name}" if share else f"−{name}"
    errors = {f"{turned}/stderr": frame[e] for e in (f"{name}/stderr", f"{name}_stderr") if e in frame}
    return frame.assign(**{turned: 1.0 - values if share else -values, **errors}), turned
