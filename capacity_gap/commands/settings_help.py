"""The meaning of every setting, from the declarations: the help of `run.py`, and the page docs/settings.md."""

import textwrap
from collections.abc import Iterator
from typing import Any

from capacity_gap.cell.config import TUNING, RunConfig, choices
from capacity_gap.settings.declare import Declared, allowed_text, walk
from capacity_gap.settings.places import CONF

WIDTH = 46  # of the column of keys
EXAMPLES = """Runs one cell (teacher, scores, student, distillation, record), or with -m a grid of cells.

  {run} student=60k teacher=120k data=1m
  {run} -m student=60k,90k teacher=120k,180k,270k data=1m,4m seed=0,1,2
  {run} -m +sweeps=quick               run a named grid of sweeps/
  {run} -m ... plan=true               print what would run and its cost; start nothing

Scales are written 60k, 0.5b or 60000. `--cfg job` prints the composed settings; `--hydra-help` is
about Hydra's own flags; flags such as -m come before settings. A choice `group=name` sets all settings of that group:
"""
LAUNCHERS = "basic (one after another), joblib (processes), slurm, ray"


def settings_help(run: str) -> str:
    """The help of the command that runs cells: examples, choices, then every setting by section."""
    lines = [EXAMPLES.format(run=run)]
    lines += [_choice(group, names) for group, names in _choices().items()]
    lines += [f"  hydra/launcher={LAUNCHERS}", ""]
    for known in walk(RunConfig):
        lines += _heading(known) if known.section else [_line(known)]
    return "\n".join(lines)


def _choices() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for group, name, _ in choices():
        found.setdefault(group, []).append(name)
    for file in sorted(CONF.glob("*/*.yaml")):
        found.setdefault(file.parent.name, []).append(file.stem)
    return found


def _choice(group: str, names: list[str]) -> str:
    return textwrap.fill(", ".join(names), 118, initial_indent=f"  {group + '=':<12}", subsequent_indent=" " * 14)


def _heading(known: Declared) -> list[str]:
    return ["", f"{known.key}: {known.setting.meaning}"]


def _line(known: Declared) -> str:
    allowed = allowed_text(known.setting)
    text = f"{known.setting.meaning}{f' [{allowed}]' if allowed else ''}"
    key = f"  {f'{known.key}={shown(known.default)}':<{WIDTH}} "
    return textwrap.fill(text, 118, initial_indent=key, subsequent_indent=" " * (WIDTH + 3))


def shown(value: Any) -> str:
    """A default as the command line spells it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) or "''"


def settings_page() -> str:
    """docs/settings.md: every setting, whether it decides the result, and its place in a record."""
    text = [
        "# Settings",
        "",
        "Generated from the declarations by `make docs`. A setting that decides the result is part of the identity of "
        "the stages that it affects. The record has it in the column named, or, where it is not the default, in the "
        "column `settings`. The other settings determine how, where or whether something runs.",
        "",
        "What a record holds: [Columns of a record](columns.md).",
        "",
        *_tables(),
    ]
    return "\n".join(text).rstrip() + "\n"


def _tables() -> Iterator[str]:
    head = ["", "| setting | default | meaning | allowed | decides | record |", "|---|---|---|---|---|---|"]
    yield from ["## The cell", *head]
    for known in walk(RunConfig):
        if known.section:
            yield from ["", f"## `{known.key}`: {known.setting.meaning}", *head]
        else:
            yield _row(known)
    yield ""


def _row(known: Declared) -> str:
    s = known.setting
    return (
        f"| `{known.key}` | `{shown(known.default)}` | {s.meaning} | {allowed_text(s)} | "
        f"{'yes' if s.decides else 'no'} | {_told(known)} |".replace("||", "| |")
    )


def _told(known: Declared) -> str:
    """Where a record holds a setting."""
    s = known.setting
    if s.column or s.untold:
        return f"`{s.column}`" if s.column else str(s.untold)
    text = "`instruct_settings`" if known.key.split(".")[0] in TUNING else "`settings`"
    return f"{text} by content" if s.content else text if s.decides else ""
