"""Modules of the user's that register entries: `extend=[my_module]` on the command line, or `CAPACITY_GAP_EXTEND`.

A module is code that runs, so only the command line and the environment may name one: a sweep file that does is
refused (so is Hydra's own `_target_` there: commands/hydra_guard.py). The environment carries
the names to workers, whatever starts them.
"""

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from capacity_gap.settings.errors import ConfigError, shown

VARIABLE = "CAPACITY_GAP_EXTEND"


def named() -> list[str]:
    """The modules that the environment names."""
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]


def load(names: Iterable[str] = ()) -> None:
    """Imports the modules of the environment and those of `names`, and names them all in the environment.

    They are looked for where Python does, and in the working directory.

    Raises:
        ConfigError: a module is not there, or fails while it is imported.
    """
    wanted = list(dict.fromkeys([*named(), *names]))
    if not wanted:
        return
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    for name in wanted:
        _import(name)
    os.environ[VARIABLE] = ",".join(wanted)
    _tell_children(here)


def _import(name: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"extend={shown(name)} is not a module name. Write one such as my_module, without .py.")
    try:
        importlib.import_module(name)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or name.split(".")[0] != error.name.split(".")[0]:
            raise ConfigError(f"extend={name} needs {error.name}, which is not installed.") from error
        raise ConfigError(
            f"extend={name}: no such module in {Path.cwd()} or on Python's path. Write its name without .py, and run "
            "in its folder or add that folder to PYTHONPATH."
        ) from error
    except Exception as error:
        raise ConfigError(f"extend={name} fails when it is imported: {type(error).__name__}: {shown(error)}") from error


def _tell_children(folder: str) -> None:
    """Puts the working directory last in the path of the processes that this one starts."""
    path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if folder not in path:
        os.environ["PYTHONPATH"] = os.pathsep.join([*path, folder])


def environment() -> dict[str, str]:
    """The variables that a worker needs to load the same modules; none where none is named."""
    return {name: os.environ[name] for name in (VARIABLE, "PYTHONPATH")} if named() else {}


def load_named_on(arguments: Sequence[str]) -> None:
    """Loads what the environment and the `extend=` among command-line overrides name."""
    names: list[str] = []
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key == "extend" and not (value.startswith("[") and value.endswith("]") and value.count("[") == 1):
            raise ConfigError(f"extend={shown(value)}: use one list for all cells, such as extend=[my_module].")
        if key == "extend":
            names += listed(value)
    load(names)


def listed(value: str) -> list[str]:
    """The modules of `[first, second]`, as an override spells them."""
    names = (name.strip(" '\"") for name in value.strip("[] ").split(","))
    return [name for name in names if name]


def check(names: Sequence[str]) -> None:
    """Raises `ConfigError` if a module is named that neither the command line nor the environment named."""
    if unasked := [name for name in names if name not in named()]:
        raise ConfigError(
            f"extend={shown(unasked[0])} is named in a config file. Modules are code, so only the command line "
            f"(extend=[{shown(unasked[0])}]) and the environment ({VARIABLE}) may name it."
        )
