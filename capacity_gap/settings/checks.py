"""What config dataclasses check when they are made, each failure one sentence."""

from dataclasses import field
from typing import Any

from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.hashing import RUNTIME


def runtime(default: Any) -> Any:
    """A field that says how a result is made, not which one."""
    return field(default=default, metadata=RUNTIME)


def need(given: bool, key: str, value: Any, allowed: str) -> None:
    """Raises a `ConfigError` that names the setting and what it may be, unless `given`."""
    if not given:
        raise ConfigError(f"{key}={value} is out of range. Allowed: {allowed}.")


def positive(section: str, config: Any, *names: str) -> None:
    """Needs every named setting to be more than zero."""
    for name in names:
        value = getattr(config, name)
        need(value > 0, f"{section}.{name}", value, "more than zero")


def share(section: str, config: Any, *names: str) -> None:
    """Needs every named setting to be from 0 to 1."""
    for name in names:
        value = getattr(config, name)
        need(0 <= value <= 1, f"{section}.{name}", value, "0 to 1")
