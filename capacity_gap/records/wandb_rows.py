"""The records behind a W&B project's runs, by W&B's public API."""

import json
import os
import sys
from typing import Any

from capacity_gap.records.record import Record, columns
from capacity_gap.settings.errors import UserError

PREFIX = "wandb:"


TIMEOUT_S = 30


def connect() -> Any:
    """W&B's API, with the key that is in its own places; never asks for one.

    Raises:
        UserError: there is no key, or no answer.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    try:
        if wandb.login(prompt=False, timeout=TIMEOUT_S):
            return wandb.Api(timeout=TIMEOUT_S)
    except wandb.errors.Error as error:
        raise UserError(f"W&B cannot be reached: {error}") from error
    raise UserError("W&B needs an API key: `wandb login` stores one, or set WANDB_API_KEY.")


def load_rows(source: str) -> list[dict[str, Any]]:
    """The records of all cells mirrored to `wandb:entity/project`, as their runs' summaries hold them.

    Raises:
        UserError: there is no such project, or nothing of ours in it.
    """
    path = source.removeprefix(PREFIX)
    if path.count("/") != 1 or not all(path.split("/")):
        raise UserError(f"{source} is not a project. Write wandb:entity/project.")
    api = connect()
    try:
        runs = api.runs(path, filters={"jobType": "cell"}, order="+created_at", per_page=200, lazy=False)
        found = [(run.id, _row(run)) for run in runs]
    except Exception as error:  # the client raises what its transport raises
        raise UserError(f"{source} cannot be read: {error}") from error
    foreign = [f"{name} ({row})" for name, row in found if isinstance(row, str)]
    if foreign:
        print(f"note: not records of this package, left out: {_some(foreign)}.", file=sys.stderr)
    rows = [row for _, row in found if isinstance(row, dict)]
    if not rows:
        raise UserError(
            f"{source} contains no cells. Upload them with `tracking=online` or `python -m capacity_gap sync`."
        )
    return rows


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _row(run: Any) -> dict[str, Any] | str | None:
    """The record in one run's summary; None while its cell is neither done nor failed; an error text, if the
    run is not one of ours.
    """
    found = dict(run.summary)
    if found.get("status") not in ("done", "failed"):
        return None
    kinds = {c.name: c.kind for c in columns().values()}
    try:
        kept = {k: _typed(json.loads(json.dumps(v, default=dict)), kinds[k]) for k, v in found.items() if k in kinds}
        return Record.of(kept).to_dict()
    except (TypeError, ValueError) as error:
        return str(error).removeprefix("Record.__init__() ")


def _typed(value: Any, kind: str) -> Any:
    """A value of the summary as the record has it: on its way 1.0 has become 1."""
    if value is None or kind.startswith("str"):
        return value
    if kind.startswith("float"):
        return float(value)
    if not kind.startswith("dict"):
        return value
    if "Any" in kind and not all(isinstance(score, dict) and "value" in score for score in dict(value).values()):
        raise ValueError("a score without a value")
    return dict(value)
