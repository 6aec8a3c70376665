"""What `python run.py` and `capacity-gap run` do: one cell, or with -m a grid of cells, through Hydra."""

import itertools
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

try:
    import hydra
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: {error.name} is not installed for {sys.executable}. `make demo` installs everything into .venv: "
        "`source .venv/bin/activate`, or `.venv/bin/python run.py …`."
    ) from None

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore

from capacity_gap.cell import config
from capacity_gap.commands.explain import ends_single_run, explained
from capacity_gap.commands.hydra_guard import guard
from capacity_gap.commands.settings_help import settings_help
from capacity_gap.settings import extension
from capacity_gap.settings.errors import ConfigError, shown
from capacity_gap.settings.places import CONF, RUN_WORDS


def job(composed: object) -> str:
    """One job of Hydra's: everything it does is in `capacity_gap.cell.pipeline`. Workers import it by its name."""
    from capacity_gap.runner import single
    from capacity_gap.runner.run_cell import run_config

    with ends_single_run() as overrides:
        if overrides is not None:
            check_is_no_grid()
        settings = config.from_hydra(composed)
        return run_config(settings) if overrides is None else single.run_alone(settings, overrides)


def main(arguments: Sequence[str]) -> int:
    """Runs Hydra on these words of a command line; returns the exit status."""
    if {"--help", "-h"} & set(arguments):
        return explained(lambda: _help(arguments))
    ordered = options_first(arguments)
    sys.argv = [sys.argv[0], *ordered]  # where Hydra reads them
    # Hydra copies its sources for every question it asks of them, and with them all our settings: 90 ms each time, 90
    # times for a help text. What the store loads is a copy anyhow.
    ConfigStore.__deepcopy__ = lambda store, memo: store
    return explained(lambda: _run(ordered))


def _run(arguments: Sequence[str]) -> None:
    check_words(arguments)
    extension.load_named_on(arguments)
    config.register()
    guard(arguments)
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()


def options_first(arguments: Sequence[str]) -> list[str]:
    """The words with all options, each with its value, before all overrides: Hydra reads them in this order only."""
    known = get_args_parser()._actions
    takes_value = {name for action in known if action.nargs is None for name in action.option_strings}
    options: list[str] = []
    overrides: list[str] = []
    for before, word in itertools.pairwise(["", *arguments]):
        (options if word.startswith("-") or before in takes_value else overrides).append(word)
    return [*options, *overrides]


def check_words(arguments: Sequence[str]) -> None:
    """Raises `ConfigError` for words that mean nothing: unknown options, a launcher without a grid, huge numbers."""
    parser = get_args_parser()
    parser.error = _refuse  # Hydra's own prints its usage
    multirun = parser.parse_args(arguments).multirun or "hydra.mode=MULTIRUN" in arguments
    names = ("hydra/launcher=", "hydra.launcher.")
    launcher = [w for w in arguments if w.lstrip("+").startswith(names) and w != "hydra/launcher=basic"]  # runs here
    if launcher and not multirun:
        raise ConfigError(
            f"{shown(launcher[0])} applies only to grids: without -m the cell would run here. Add -m: "
            f"`{' '.join(RUN_WORDS)} -m …`. A grid may have one cell."
        )
    for word in arguments:
        if found := re.search(r"\d{1000,}", word):
            raise ConfigError(f"{shown(word)} holds a number of {len(found[0]):,} digits. No setting accepts that.")


def check_is_no_grid() -> None:
    """Raises `ConfigError` if a sweep file of several cells is given without -m."""
    from hydra.core.hydra_config import HydraConfig

    params = HydraConfig.get().sweeper.get("params")
    if params:
        raise ConfigError(
            f"the sweep file gives {', '.join(params)} several values: a grid needs -m, `{' '.join(RUN_WORDS)} -m …`."
        )


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{shown(message)}. `{' '.join(RUN_WORDS)} --help` lists what it takes.")


def _help(arguments: Sequence[str]) -> None:
    """The help on all settings, with the entries of modules named on the command line."""
    extension.load_named_on(arguments)
    print(settings_help(" ".join(RUN_WORDS)))
