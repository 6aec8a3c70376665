"""What several stages need: the names of their files, and the tokens they were given."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.data.packing import Packed
from capacity_gap.models.defaults import completed, frozen_rows, training_only
from capacity_gap.models.folders import in_text
from capacity_gap.store.stage import StageRun

METRICS = "metrics.jsonl"  # the logged history of a training run
RESULT = "result.json"


def read_result(folder: Path) -> dict[str, Any]:
    """What a stage wrote about its result."""
    return json.loads((folder / RESULT).read_text())


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The logged points of a training stage."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def packed_split(run: StageRun, split: str) -> Packed:
    """One split of the tokens that the stage was given, as sequences."""
    return Packed(run.inputs["tokens"] / split, run.config["sequence_length"])


def ignored_in_training(cell: ResolvedCell, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a config.json that act in training only, such as dropout, and are ignored here.

    Versions that did not ignore them gave other results, so the keys are part of a training stage's identity. It is
    empty for models without such keys, whose stages therefore keep the digests they always had.
    """
    return _identity(cell, training_only(shape))


def ignored_in_gradients(cell: ResolvedCell, shape: Mapping[str, Any]) -> dict[str, Any]:
    """The same for stages that read the gradients of the embedding."""
    return _identity(cell, frozen_rows(shape))


def _identity(cell: ResolvedCell, keys: list[str]) -> dict[str, Any]:
    """`keys` without a padding token that no text holds: it never acted."""
    folder, pad = cell.tokenizer_folder, completed(cell.teacher_shape).get("pad_token_id")
    unread = folder is not None and pad is not None and not in_text(folder, pad)
    kept = [key for key in keys if not (key == "pad_token_id" and unread)]
    return {"ignored": kept} if kept else {}
