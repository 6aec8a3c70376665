"""Scores of any other model, for tables of comparison: what `python -m capacity_gap evaluate MODEL` does."""

import argparse
import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capacity_gap.evaluate.task_scores import Score
from capacity_gap.evaluate.tasks import Task, check_tasks, folder_tasks, forbid_code, paper_tasks, parse_tasks
from capacity_gap.records.tables import as_given, cells, no_formula
from capacity_gap.settings.errors import UserError, choose, first_line, shown
from capacity_gap.settings.places import ON_HUB

# Of a table of scores: which model, how it was scored, what came out.
SETTINGS = ("model", "params", "train_flops", "dtype", "batch_size", "limit", "lm_eval")
COLUMNS = (*SETTINGS, *(f.name for f in dataclasses.fields(Score)))


def score_other(given: argparse.Namespace) -> int:
    """Scores the model that the command line names, prints its table, adds it to a CSV if asked."""
    from capacity_gap.models.loading import DTYPES
    from capacity_gap.runtime.process import resolve_device

    _check_names(given.model, given.tokenizer)
    tasks = chosen(given.tasks, given.task_folder, allow_code=given.allow_code_execution)
    choose("--dtype", given.dtype, DTYPES)
    for name, value in (("--limit", given.limit), ("--batch-size", given.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} is out of range. Allowed: 1 or more.")
    if given.out:
        check_table(given.out)  # scoring may take hours
    device = resolve_device(given.device)
    model, tokenizer = _load(given.model, given.tokenizer or given.model, device=device, dtype=DTYPES[given.dtype])
    from capacity_gap.evaluate.harness import harness_version, score_tasks

    params = sum(p.numel() for p in model.parameters())
    same = {"model": given.model, "params": params, "train_flops": _spent(model, given.train_tokens, params)}
    same |= {"dtype": given.dtype, "batch_size": given.batch_size, "limit": given.limit, "lm_eval": harness_version()}
    scores = score_tasks(
        model,
        tokenizer,
        tasks,
        folder=given.task_folder,
        batch_size=given.batch_size,
        limit=given.limit,
        allow_code=given.allow_code_execution,
    )
    print(f"{given.model}: {params:,} parameters, lm_eval {harness_version()}\n" + "\n".join(lines(scores)))
    if given.out:
        add_rows(given.out, [same | score.to_dict() for score in scores])
    return 0


def _check_names(model: str, tokenizer: str | None) -> None:
    """Raises for a path where no folder is; what could be a name on the hub is looked for there."""
    for option, name in (("MODEL", model), ("--tokenizer", tokenizer)):
        if name and not Path(name).is_dir() and not ON_HUB.fullmatch(name):
            raise UserError(f"{option} {shown(name)}: no such folder, and not a valid name on the hub.")


def _spent(model: Any, tokens: str | None, params: int) -> float | None:
    """The FLOPs of the model's own training by our convention (6·N·D); None if the number of tokens was not given."""
    from capacity_gap.models.accounting import train_flops
    from capacity_gap.settings.scales import parse_tokens

    if tokens is None:
        return None
    return train_flops(model.config.to_dict(), parse_tokens(tokens, params=params, key="--train-tokens"))


def chosen(named: str | None, folder: Path | None, *, allow_code: bool) -> list[Task]:
    """The tasks that were named; else all that the folder defines; else the paper's."""
    if named:
        tasks = parse_tasks(named.split(","), key="--tasks")
    elif folder:
        tasks = [Task(name) for name in folder_tasks(folder)]
    else:
        tasks = paper_tasks(allow_code=allow_code)
    forbid_code(tasks, allowed=allow_code, flag="--allow-code-execution", folder=folder)
    check_tasks(tasks, folder)
    return tasks


def _load(model: str, tokenizer: str, *, device: str, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from capacity_gap.models.loading import NO_CODE, whole_model

    logging.disable_progress_bar()
    try:
        found = whole_model(AutoModelForCausalLM, model, dtype=dtype, **NO_CODE)
        return found.to(device).eval(), AutoTokenizer.from_pretrained(tokenizer, **NO_CODE)
    except UserError:
        raise
    except Exception as error:  # a broken folder raises errors of many libraries
        said = first_line(error)
        raise UserError(
            f"{model} cannot be loaded as a causal language model with the tokenizer of {tokenizer}: {said} Pass a "
            "model folder or a hub repository, and --tokenizer if the tokenizer is elsewhere."
        ) from error


def lines(scores: Sequence[Score]) -> list[str]:
    """The scores as a table of text."""
    rows = [f"{'task':<32}{'shots':>6}  {'metric':<32}{'score':>10}{'± s.e.':>10}"]
    for s in scores:
        stderr, shots = ("–" if v is None else v for v in (s.stderr and f"{s.stderr:.4f}", s.shots))
        rows.append(f"{s.task:<32}{shots!s:>6}  {s.metric:<32}{s.value:>10.4f}{stderr:>10}")
    return rows


def check_table(file: Path) -> None:
    """Raises if `file` is there and is not a table of scores."""
    if file.exists():
        score_rows(file)


def score_rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows of a table of scores as text, each with its line of the file. Lines of nothing but commas are left out.

    Raises:
        UserError: it is no table that can be read, or another one.
    """
    header, rows = cells(file)
    if header != list(COLUMNS):
        raise UserError(
            f"{file} is a different table (columns {', '.join(header)}) than `evaluate --out` writes (columns "
            f"{', '.join(COLUMNS)}). Name another file."
        )
    return [(line, dict(zip(header, map(as_given, row), strict=True))) for line, row in rows if any(row)]


def add_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows to a table of scores, or begins one."""
    check_table(file)
    fresh = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    ended = fresh or file.read_bytes().endswith((b"\n", b"\r"))  # an editor may have cut the last line's end
    with file.open("a", encoding="utf-8", newline="") as stream:
        stream.write("" if ended else "\r\n")
        writer = csv.DictWriter(stream, fieldnames=COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows({name: no_formula(value) for name, value in row.items()} for row in rows)
