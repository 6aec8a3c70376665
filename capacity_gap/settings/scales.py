"""Scales in short form: `0.5b`, `350m`, `40k`, 60000; and token budgets, which may also be `20x` parameters."""

import math
import re
from decimal import Decimal

from capacity_gap.settings.errors import ConfigError, several_values, shown

LONGEST = 40  # characters
LARGEST = 10**18  # parameters or tokens: beyond every model and every text
SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_SCALE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", re.IGNORECASE)
_PER_PARAMETER = re.compile(r"(\d+(?:\.\d+)?)x", re.IGNORECASE)


def parse_scale(given: str | int | float, *, key: str, allow_zero: bool = False) -> int:
    """Returns a count of parameters or tokens from `0.5b`, `350m`, `40k` or a whole number.

    Raises:
        ConfigError: if it cannot be read, is negative, not whole, too large, or zero where zero means nothing.
    """
    match = _SCALE.fullmatch(str(given).strip()) if len(str(given)) <= LONGEST else None
    value = Decimal(match[1]) * SUFFIXES[match[2].lower()] if match else Decimal(0)
    if not match or value != int(value) or (value == 0 and not allow_zero):
        least = "zero or more" if allow_zero else "more than zero"
        raise ConfigError(
            f"{key}={shown(given)} cannot be read as a scale. Write a whole number, {least}, or one with a suffix: "
            "k (thousand), m (million), b (billion), t (trillion), such as 40k, 350m or 0.5b."
            + (f" {several_values(key)}" if "," in str(given) else "")
        )
    return _within(int(value), key, given)


def _within(value: int, key: str, given: str | int | float) -> int:
    if value > LARGEST:
        raise ConfigError(f"{key}={shown(given)} is too large. Allowed: up to {format_scale(LARGEST)}.")
    return value


def format_scale(count: int) -> str:
    """Returns the shortest exact spelling: 60000 → `60k`, 1300000 → `1.3m`, 12345 → `12.345k`."""
    for suffix in ("t", "b", "m", "k"):
        unit = SUFFIXES[suffix]
        if count >= unit:
            return f"{Decimal(count) / unit:f}{suffix}"
    return str(count)


def short_scale(count: float) -> str:
    """A parameter count in as few digits as name it to 0.5 %, three at most: 119873 → `120k`, 124439808 → `124m`."""
    if count <= 0 or not math.isfinite(count):
        return ""
    short = [round(count, digits - 1 - math.floor(math.log10(count))) for digits in (1, 2, 3)]
    return format_scale(round(next((s for s in short if abs(s / count - 1) < 0.005), short[-1])))


def is_scale(given: str) -> bool:
    """Whether it is written as a scale is."""
    return bool(_SCALE.fullmatch(given.strip()))


def parse_tokens(given: str | int, *, params: int, key: str) -> int:
    """Returns a token budget: a scale (`1.5m`), or `20x`, that many tokens per parameter."""
    match = _PER_PARAMETER.fullmatch(str(given).strip()) if len(str(given)) <= LONGEST else None
    if match and float(match[1]) > 0:
        return _within(round(float(match[1]) * params), key, given)
    return parse_scale(given, key=key)


def counted(count: int, name: str) -> str:
    """A number with its noun."""
    return f"{count:,} {name}{'s' * (count != 1)}"
