"""Checks that a setting's declaration cannot say, each failure one sentence."""

from typing import Any

from capacity_gap.settings.errors import ConfigError


def need(given: bool, key: str, value: Any, allowed: str) -> None:
    """Raises a `ConfigError` that names the setting and what it may be, unless `given`."""
    if not given:
        raise ConfigError(f"{key}={value} is out of range. Allowed: {allowed}.")
