"""Errors that a user can correct. They say what was given, what is allowed and what to do, in one paragraph."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from capacity_gap.settings.places import RUN_WORDS

SHOWN = 120  # characters of what was given that an error repeats


class UserError(Exception):
    """A user's request cannot be carried out; only the message is shown, without a traceback."""


class ConfigError(UserError, ValueError):
    """A setting is wrong. Raised before any compute, with nothing written."""


class StoreError(UserError, OSError):
    """The store cannot be read or written as asked."""


class Damaged(StoreError):
    """A file of a store is not what was written there."""

    def __init__(self, file: Path, why: str) -> None:
        self.file, self.why = file, why
        super().__init__(
            f"{file} is damaged: it {why}. `python -m capacity_gap store verify STORE --repair` sets aside what is "
            "damaged; run the same run.py command to recompute it."
        )

    def __reduce__(self) -> tuple:
        return Damaged, (self.file, self.why)  # workers send their errors to the grid


class StageError(UserError, RuntimeError):
    """A stage could not be computed; the store holds nothing of it but its checkpoints."""


def shown(given: Any, most: int = SHOWN) -> str:
    """What a user gave, in `most` characters and with nothing in it that a terminal would act on."""
    text = str(given)
    text = text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 4 :]}"
    return text if text.isprintable() else ascii(text)[1:-1]


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or its type if it has no message."""
    return shown((str(error) or type(error).__name__).splitlines()[0])


def several_values(key: str) -> str:
    """How a grid gives a setting several values."""
    command = f"{' '.join(RUN_WORDS)} -m {key}=A,B"
    return f"Several values need a grid: `{command}`, or a sweep file with them under `hydra.sweeper.params`."


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the allowed name closest to the given one, or nothing."""
    if len(str(given)) > SHOWN:
        return ""
    close = difflib.get_close_matches(str(given), [str(a) for a in allowed], n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def choose(kind: str, given: str, allowed: Iterable[str]) -> None:
    """Raises a `ConfigError` that lists what is allowed, unless `given` is."""
    allowed = list(allowed)
    if given not in allowed:
        known = f"Allowed: {', '.join(allowed)}." if allowed else "There is none yet."
        raise ConfigError(f"{kind}={shown(given)!r} is not known{nearest(given, allowed)}. {known}")


class ImpossibleCell(ConfigError):
    """Student and teacher cannot go together: an error alone, a note in a grid.

    `note` is what a grid says of it: the first sentence, or all of it where the rest is a way out for the whole grid.
    """

    def __init__(self, said: str, *, whole: bool = False) -> None:
        super().__init__(said)
        self.note = said if whole else f"{said.split('. ')[0].removesuffix('.')}."


class Busy(Exception):
    """Another process is at work on a stage that this one needs, and this one was told not to wait for it."""


class Stopped(Exception):
    """A worker of a grid was asked to end: it left a checkpoint, and its grid starts nothing more."""


class Lost(BaseException):
    """This process was stopped for so long that another one took over the stage that it was at."""
