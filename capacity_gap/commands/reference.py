"""The pages of the docs that are made from the code: `python -m capacity_gap.commands.reference docs` writes them."""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from capacity_gap.commands import cli
from capacity_gap.commands.settings_help import settings_page
from capacity_gap.models.axes import count_params, dims
from capacity_gap.models.ladders import FAMILIES, Family, licence_of
from capacity_gap.records.record import Column, columns
from capacity_gap.settings.places import default_store

NAME = "capacity-gap"
BY_HYDRA = "It takes settings as `key=value`: [Settings](settings.md) lists them."
Options = argparse.ArgumentParser


def commands_page() -> str:
    """docs/commands.md: every command with what it takes, from the parser."""
    text = [
        "# Commands",
        "",
        "Generated from the parser by `make docs`. In a checkout a command is `python -m capacity_gap COMMAND`, and "
        "`python run.py` is `python -m capacity_gap run`. Installed as a package, all are `capacity-gap COMMAND`.",
    ]
    for heading, group in cli.GROUPS.items():
        added = Options(prog=NAME).add_subparsers(prog=NAME)
        group.add(added)
        text += ["", f"## {heading.capitalize()}"]
        for parser in added.choices.values():
            text += _command(parser, "###")
    return "\n".join(text) + "\n"


def _command(parser: Options, level: str) -> Iterator[str]:
    """A heading, what the command does, and a table of what it takes; then its actions, if it has any."""
    yield from ["", f"{level} {parser.prog.removeprefix(NAME).strip()}", "", str(parser.description)]
    actions = _subparsers(parser)
    taken = [a for a in parser._actions if a.dest != "help" and not isinstance(a, argparse._SubParsersAction)]
    if [a.nargs for a in taken] == [argparse.REMAINDER]:
        yield from ["", BY_HYDRA]
    elif taken:
        yield from ["", "| argument | meaning |", "|---|---|", *(f"| {_name(a)} | {_meaning(a)} |" for a in taken)]
    for action in actions.values():
        yield from _command(action, f"{level}#")


def _subparsers(parser: Options) -> dict[str, Options]:
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def _name(action: argparse.Action) -> str:
    """An argument as it is typed."""
    values = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar
    if not action.option_strings:
        needed = f"{values or action.dest}".replace("_", "-").upper()
        return f"`[{needed}]`" if action.nargs == "?" else f"`{needed} …`" if action.nargs else f"`{needed}`"
    values = values or ("" if action.choices else action.dest.upper().replace("_", "-"))
    return f"`{action.option_strings[-1]}{f' {values}' if values and action.nargs != 0 else ''}`"


def _meaning(action: argparse.Action) -> str:
    """Its help, with its default and its choices."""
    said = (action.help or "") % vars(action) if action.help else ""
    said = said.replace(default_store(), "`$CAPACITY_GAP_STORE`, else `store` beside `run.py`")
    if action.choices:
        said += f"{'; one of ' if said else 'one of '}{', '.join(f'`{choice}`' for choice in action.choices)}"
    if action.option_strings and action.required:
        said += "; must be given"
    said = re.sub(r"docs/(\w+\.md)", r"[\1](\1)", said)
    return said.replace("|", "\\|").replace("<", "&lt;")


def columns_page() -> str:
    """docs/columns.md: every column of a record."""
    text = [
        "# Columns of a record",
        "",
        "Generated from the declarations by `make docs`. A record has one row per cell. Null means not measured, or "
        "for some settings their default. Losses are nats per token.",
        "",
        "The fit parts curves by the columns marked yes. Those marked *repeats* part only cells that agree in "
        "everything else, their seeds too.",
        "",
        "| column | type | meaning | from | parts curves |",
        "|---|---|---|---|---|",
        *(f"| `{c.name}` | {_kind(c.kind)} | {c.meaning} | {_source(c)} | {_parts(c)} |" for c in columns().values()),
    ]
    return "\n".join(text) + "\n"


def _source(column: Column) -> str:
    return f"`{column.source}`" if column.source else ""


def _parts(column: Column) -> str:
    return "repeats" if column.parts_repeats is not None else "yes" if column.parts is not None else ""


def _kind(kind: str) -> str:
    return kind.replace("typing.", "").replace("|", "or")


def families_page() -> str:
    """docs/families.md: every ladder of teachers, rung by rung."""
    text = [
        "# Families and their rungs",
        "",
        "Generated from the ladders by `make docs`. `family=NAME` chooses a ladder and `teacher=RUNG` a rung of it. "
        "Sizes are counted from the shapes, to the parameter, and agree with the models of transformers.",
        "",
        "Rungs without a checkpoint are trained when first needed. Your own checkpoints need no ladder: "
        "[Your own checkpoints](checkpoints.md).",
    ]
    for name, family in FAMILIES.items():
        if FAMILIES.entry(name).is_ours:
            text += _family(family)
    return "\n".join(text) + "\n"


def _family(family: Family) -> Iterator[str]:
    kinds = ", ".join(f"`{kind}`" for kind in dict.fromkeys(str(s["model_type"]) for s in family.rungs.values()))
    held = FAMILIES.entry(family.name).traits["dtype"]
    made = "published checkpoints" if family.published else "trained when first needed"
    yield from ["", f"## `{family.name}`", ""]
    yield f"Architecture {kinds}, {made}. Teachers use {held} unless `family.dtype` is set."
    yield from ["", "| rung | parameters | non-embedding | layers | hidden | heads | of size | neurons | vocabulary |"]
    yield "|---|---|---|---|---|---|---|---|---|"
    for rung, shape in family.rungs.items():
        d, total, inner = dims(shape), family.params[rung], count_params(shape, non_embedding=True)
        heads = f"{d.heads}" if d.heads == d.kv_heads else f"{d.heads} on {d.kv_heads}"
        output = "tied" if d.tied else "untied"
        yield (
            f"| {rung} | {total:,} | {inner:,} | {d.layers} | {d.hidden:,} | {heads} | {d.head_dim} | "
            f"{d.neurons:,} | {d.vocab:,}, {output} |"
        )
    if family.added:
        added = ", ".join(rung for rung in family.rungs if rung in family.added)
        yield f"\nAdded later: {added}. These can teach the common students but do not affect their shape."
    if family.published:
        yield from ["", *_checkpoints(family)]
    yield from (f"\nNot a rung: {why}" for why in dict.fromkeys(family.left_out.values()))


def _checkpoints(family: Family) -> Iterator[str]:
    yield from ["| rung | checkpoint | licence |", "|---|---|---|"]
    yield from (f"| {rung} | `{at}` | {licence_of(at) or 'see its page'} |" for rung, at in family.published.items())


PAGES = {
    "commands.md": commands_page,
    "settings.md": settings_page,
    "columns.md": columns_page,
    "families.md": families_page,
}


def main(folder: Path) -> None:
    """Writes every generated page into a folder."""
    for name, page in PAGES.items():
        (folder / name).write_text(re.sub(r"[ \t]+\n", "\n", page()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
