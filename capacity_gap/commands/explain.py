"""One paragraph instead of a traceback for everything that a user can correct."""

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator

from capacity_gap.cell.config import RunConfig, unknown_key
from capacity_gap.runtime.process import Interrupted, in_pool
from capacity_gap.settings.declare import allowed_text, walk
from capacity_gap.settings.errors import Stopped, UserError, nearest, several_values, shown
from capacity_gap.settings.places import RUN_WORDS

RUN = " ".join(RUN_WORDS)
MESSAGE = 400  # characters of a message of Hydra's that none of ours replaces
READERS = ("hydra", "omegaconf", "antlr4", "yaml")


@contextlib.contextmanager
def ends_single_run() -> Iterator[list[str] | None]:
    """Inside a job: what a single run was given on the command line, or None for a job of a grid.

    A single run's error ends it, as one paragraph; in a grid the error goes to the sweeper.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    single = HydraConfig.get().mode == RunMode.RUN
    given = OmegaConf.to_container(HydraConfig.get().overrides.task)  # as typed: `${…}` stays
    assert isinstance(given, list)
    try:
        yield given if single else None
    except (UserError, OmegaConfBaseException) as error:
        if not single:
            raise
        print(f"error: {paragraph(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    except (Interrupted, KeyboardInterrupt) as error:
        if single or not in_pool():
            raise
        raise Stopped("stopped by a signal; stages that write checkpoints left one") from error


def explained(main: Callable[[], object]) -> int:
    """Runs `main`; prints a user's error as one paragraph and returns the exit status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, so that we can say more

    try:
        main()
    except BrokenPipeError:
        leave_output()
    except (Interrupted, KeyboardInterrupt) as error:
        print("interrupted: finished work and checkpoints are kept; run the same command to continue", file=sys.stderr)
        return error.exit_status if isinstance(error, Interrupted) else 130
    except Exception as error:
        if (said := paragraph(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
    return 0


def leave_output() -> None:
    """Handles a closed output pipe: `python run.py --help | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def paragraph(error: BaseException) -> str | None:
    """What a user did wrong, in one paragraph; None for an internal error, whose traceback is needed."""
    if isinstance(error, UserError):
        # A name that was given may hold what a terminal would act on.
        return "".join(sign if sign.isprintable() or sign == "\n" else ascii(sign)[1:-1] for sign in str(error))
    if isinstance(error, OSError) and error.filename is not None:
        return f"{shown(error.filename)}: {error.strerror}."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of the output itself
        return f"{error.strerror}."
    if not _is_hydras(error):
        return None
    return f"a config file is not UTF-8 text: {error}." if isinstance(error, UnicodeError) else _plain(error)


def _is_hydras(error: BaseException) -> bool:
    """Whether Hydra, OmegaConf or YAML raised it: they read nothing but what the user gave."""
    tops = [
        frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    known = [top for top in tops if top in (*READERS, "capacity_gap", "hydra_plugins")]
    return bool(known) and known[-1] in READERS


def _plain(error: BaseException) -> str:
    """Hydra's and OmegaConf's own errors, with what is allowed and what to do."""
    if (mark := getattr(error, "problem_mark", None)) is not None:  # YAML's
        return (
            f"{mark.name}, line {mark.line + 1}: {getattr(error, 'problem', 'it is not valid YAML')}. Check the "
            "indentation (spaces only), brackets and quotes up to that line."
        )
    cause = str(error.__cause__ or "")
    text = f"{error}\n{cause}"
    override = re.search(r"(?:Error merging|Could not) override '?([^\n']+)", text)
    if unknown := re.search(r"Key '(\S+)' (?:is )?not in", text):
        full = re.search(r"full_key: (\S+)", text)
        key = full[1] if full else unknown[1]
        if override and not override[1].startswith(key):  # inside a list: its own key is not said
            return f"{override[1]} has no {shown(key)}. `{RUN} --help` lists what it takes."
        return unknown_key(key)
    if override and "Could not override" in text:
        return unknown_key(override[1])
    if found := re.search(r"Could not find '(\S+)/(\S+)'.*?Available options in '\S+':\n((?:\t.*\n)+)", text, re.S):
        options = found[3].split("Config search path")[0].split()
        return f"{found[1]}={found[2]} is not known{nearest(found[2], options)}. Allowed: {', '.join(options)}."
    if found := re.search(r"Ambiguous value for argument '(.+?)'", text):
        return f"{found[1]} gives several values: a grid needs -m, `{RUN} -m {found[1]} …`."
    if found := re.search(r"Sweep parameters '(.+?)' requires --multirun", text):
        return f"{found[1]} stands for several values: a grid needs -m, `{RUN} -m {found[1]} …`."
    if type(error).__name__ == "OverrideParseException":
        given = str(getattr(error, "override", None) or "what was given")
        return (
            f"{shown(given)} cannot be read. Write KEY=VALUE, and quote values with characters other than letters, "
            "digits and -_./: inside the shell's quotes, such as \"sweep='my sweep'\"."
        )
    if found := re.search(r"Cannot convert '(?:List|Dict)Config'.*?full_key: (\S+)", text, re.S):
        return f"{found[1]} takes one value. {several_values(found[1])}"
    if found := re.search(r"Value '(.*?)' .*?(?:could not be converted to|is not a valid) (\w+)", text, re.S):
        key = re.search(r"full_key: (\S+)", text)
        where = f"{key[1]}={shown(found[1])}" if key else f"the value {shown(found[1])!r}"
        kind = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}.get(found[2], found[2])
        allowed = _allowed(key[1]) if key else ""
        return f"{where} has the wrong type: it should be {kind}{allowed}."
    if override:
        why = "it may not be null" if "is not Optional" in cause else shown(cause.partition("\n")[0].rstrip("."))
        return f"{shown(override[1])} has the wrong type: {why}. `{RUN} --help` lists what it takes."
    return shown(" ".join(line.strip() for line in str(error).splitlines() if line.strip()), most=MESSAGE)


def _allowed(key: str) -> str:
    """The range of a setting, behind its type; empty where the type says it all."""
    here = next((d for d in walk(RunConfig) if d.key == key), None)
    if here is None or not (text := allowed_text(here.setting)):
        return ""
    return f", {text}{', or null' if here.default is None else ''}"
