"""One paragraph instead of a traceback for everything that a user can mend."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import get_type_hints

from capacity_gap.cell.config import RunConfig
from capacity_gap.runtime.process import Interrupted, in_pool
from capacity_gap.settings.errors import Stopped, UserError, nearest
from capacity_gap.settings.places import RUN_WORDS

RUN = " ".join(RUN_WORDS)


@contextlib.contextmanager
def ends_single_run() -> Iterator[list[str] | None]:
    """Inside a job: what a single run was given on the command line, or None for a job of a grid.

    A single run's error ends it, as one paragraph; in a grid the error goes to the sweeper.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    single = HydraConfig.get().mode == RunMode.RUN
    try:
        yield list(HydraConfig.get().overrides.task) if single else None
    except UserError as error:
        if not single:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except (Interrupted, KeyboardInterrupt) as error:
        if single or not in_pool():
            raise
        raise Stopped("it was asked to stop; a checkpoint was left where the stage keeps one") from error


def explained(main: Callable[[], object]) -> int:
    """Runs `main`; prints a user's error as one paragraph and returns the exit status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, so that we can say more
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has had enough: `python run.py --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Interrupted, KeyboardInterrupt) as error:
        print(
            "interrupted: finished work and checkpoints are kept; the same command goes on from there", file=sys.stderr
        )
        return error.exit_status if isinstance(error, Interrupted) else 130
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {_plain(error)}", file=sys.stderr)
        return 2
    return 0


def _plain(error: BaseException) -> str:
    """Hydra's and OmegaConf's own errors, with what is allowed and what to do."""
    text = f"{error}\n{error.__cause__ or ''}"
    if found := re.search(r"Key '(\S+)' (?:is )?not in", text) or re.search(r"Could not override '(\S+?)'", text):
        full = re.search(r"full_key: (\S+)", text)
        return _unknown_key(full[1] if full else found[1])
    if found := re.search(r"Could not find '(\S+)/(\S+)'.*?Available options in '\S+':\n((?:\t.*\n)+)", text, re.S):
        options = found[3].split("Config search path")[0].split()
        return f"{found[1]}={found[2]} is not known{nearest(found[2], options)}. Allowed: {', '.join(options)}."
    if found := re.search(r"Ambiguous value for argument '(.+?)'", text):
        return f"{found[1]} gives several values: a grid wants -m, `{RUN} -m {found[1]} …`."
    if found := re.search(r"Value '(.*?)' .*?(?:could not be converted to|is not a valid) (\w+)", text, re.S):
        key = re.search(r"full_key: (\S+)", text)
        where = f"{key[1]}={found[1]}" if key else f"the value {found[1]!r}"
        kind = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}.get(found[2], found[2])
        return f"{where} has the wrong type: it should be {kind}."
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _unknown_key(key: str) -> str:
    keys = list(setting_names(RunConfig))
    section = key.rpartition(".")[0]
    siblings = [k for k in keys if k.rpartition(".")[0] == section] or [k for k in keys if "." not in k]
    return (
        f"{key} is no setting{nearest(key, siblings)}. Settings {'of ' + section if section else 'at the top'}: "
        f"{', '.join(siblings)}. `{RUN} --help` lists all."
    )


def setting_names(kind: type, prefix: str = "") -> Iterator[str]:
    """Every key of a config dataclass, nested ones with dots."""
    hints = get_type_hints(kind)
    for f in fields(kind):
        name = prefix + f.name
        if is_dataclass(hints[f.name]):
            yield name
            yield from setting_names(hints[f.name], f"{name}.")
        else:
            yield name
