"""Checks of what a user gave that a setting's declaration cannot say, each failure one sentence."""

import unicodedata
from typing import Any

from capacity_gap.settings.errors import ConfigError, shown

LONGEST_TEXT = 4096  # bytes of a path on Linux
LONGEST_NAME = 255  # bytes of a file's name


def need(given: bool, key: str, value: Any, allowed: str) -> None:
    """Raises a `ConfigError` that names the setting and what it may be, unless `given`."""
    if not given:
        raise ConfigError(f"{key}={shown(value)} is out of range. Allowed: {allowed}.")


def check_text(key: str, text: str) -> None:
    """Checks that a text can be a name, a path or part of one, which every text among the settings is.

    Raises:
        ConfigError: it is too long, or holds characters that no file system and no terminal takes.
    """
    if bad := [c for c in text if unicodedata.category(c) in ("Cc", "Cs")]:
        raise ConfigError(
            f"{key}={shown(text)} holds the character {bad[0]!a}, which is not allowed in names. Remove it."
        )
    longest = max(len(part.encode()) for part in text.split("/"))
    if len(text.encode()) > LONGEST_TEXT or longest > LONGEST_NAME:
        raise ConfigError(
            f"{key}={shown(text)} is too long: {len(text.encode()):,} bytes, {longest:,} of them without a slash. "
            f"Allowed: {LONGEST_TEXT:,}, and {LONGEST_NAME} between two slashes."
        )
