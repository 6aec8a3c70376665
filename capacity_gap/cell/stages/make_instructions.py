"""The stage `instructions`: conversations and pairs of answers, made from the corpus or read from files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.shared import RESULT
from capacity_gap.data.corpus import read_texts
from capacity_gap.instruct.rows import PAIR, PAIRS, TALK, TEST, TRAIN, by_task, constant_hits, read_rows, share
from capacity_gap.instruct.templates import instructions as from_templates
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.hashing import files_digest
from capacity_gap.settings.places import user_path
from capacity_gap.store.files import write_json
from capacity_gap.store.stage import Stage, StageRun

SEED = 20240611  # of the instructions, which all cells share


def instructions_stage(cell: ResolvedCell, corpus: Stage) -> Stage:
    """Conversations and pairs of answers, the same for every cell."""
    tune, pairs = cell.config.instruct, cell.config.prefer
    given: dict[str, Any] = {"count": tune.count, "pairs": pairs.count, "held_out": tune.held_out}
    for name, path in (("rows", tune.path), ("pair_rows", pairs.path)):
        if path:
            given[name] = files_digest([user_path(path)])
    options = {"path": tune.path, "pairs_path": pairs.path}
    return Stage("instructions", 2, given, {"corpus": corpus}, make_instructions, options=options)


def make_instructions(run: StageRun) -> None:
    """Conversations to train on, others held out, and pairs of a better and a worse answer."""
    given, files = run.config, run.options
    held_out = from_templates(read_texts(run.inputs["corpus"], "test"), given["held_out"], SEED)
    number = given["count"] + given["pairs"]
    made = from_templates(read_texts(run.inputs["corpus"], "train"), number, SEED + 1, apart_from=held_out)
    tune, pairs = made[: given["count"]], [_pair(row) for row in made[given["count"] :]]
    if files["path"]:
        rows = read_rows(Path(files["path"]), "instruct.path", TALK)
        tune, held_out = rows[: -given["held_out"]], rows[-given["held_out"] :]
    if files["pairs_path"]:
        pairs = read_rows(Path(files["pairs_path"]), "prefer.path", PAIR)
    _check_counts(given, tune, held_out, pairs)
    for name, rows in ((TRAIN, tune), (TEST, held_out), (PAIRS, pairs)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (run.out / name).write_text("".join(lines), encoding="utf-8")
    constant = by_task(constant_hits(tune, held_out), held_out)
    write_json(run.out / RESULT, {name: share(hits) for name, hits in constant.items()})


def _check_counts(given: Mapping[str, Any], tune: list, held_out: list, pairs: list) -> None:
    if not tune or not held_out or len(tune) < given["count"] or len(pairs) < given["pairs"]:
        raise ConfigError(
            f"found: {len(tune)} conversations to train on, {len(held_out)} held out, {len(pairs)} pairs; requested: "
            f"{given['count']}, {given['held_out']}, {given['pairs']}. Request fewer (instruct.count, "
            "instruct.held_out, prefer.count), or provide more text."
        )


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    *before, answer = row["messages"]
    return {"messages": before, "chosen": answer["content"], "rejected": row["rejected"]}
