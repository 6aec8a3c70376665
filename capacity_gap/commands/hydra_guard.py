"""What a sweep file may not do: name code. It says which cells to run, and files are passed from hand to hand.

Hydra imports and calls whatever a config names as a callback, as `_target_` or as a class of its logging. A user's own
code comes in by `extend=[MODULE]` on the command line or by CAPACITY_GAP_EXTEND, and nowhere else.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from capacity_gap.settings.errors import ConfigError, shown

OURS = "hydra_plugins."  # sweepers and launchers: Hydra itself refuses any other for these two
PLUGINS = ("sweeper", "launcher")
LOGGING = ("job_logging", "hydra_logging")
CALLS = ("()", "class", "factory")  # keys by which Python's logging names something to import


def guard() -> None:
    """Lets Hydra compose nothing that names code; once is enough for a process."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    load = ConfigLoaderImpl.load_configuration
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def checked(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        check_names_no_code(found)
        return found

    ConfigLoaderImpl.load_configuration = checked


def check_names_no_code(composed: Any) -> None:
    """Raises `ConfigError` if a composed config names code to import or call."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(values, dict)
    hydra = values.get("hydra") or {}
    named = list(_targets(values))
    named += [f"hydra.callbacks.{name}" for name in hydra.get("callbacks") or {}]
    named += [f"hydra.{kind}.{key}" for kind in LOGGING for key in _named_by_logging(hydra.get(kind) or {})]
    if named:
        raise ConfigError(
            f"{shown(named[0])} names code to run, which a config may not. Code of your own is given as "
            "extend=[MODULE] on the command line, and registers its entries."
        )


def _targets(values: Any, where: str = "") -> Iterator[str]:
    """Every place that holds `_target_`, but those of the sweeper and the launcher themselves."""
    for key, value in _items(values):
        here = f"{where}.{key}" if where else key
        if key == "_target_" and not (
            where in [f"hydra.{kind}" for kind in PLUGINS] and str(value).startswith((OURS, "hydra._internal."))
        ):
            yield here
        yield from _targets(value, here)


def _named_by_logging(values: Any, where: str = "") -> Iterator[str]:
    """Places in the settings of Python's logging that name something which is not of that module."""
    for key, value in _items(values):
        here = f"{where}.{key}" if where else key
        text = str(value)
        imports = key in CALLS and not (key == "class" and text.startswith(("logging.", "colorlog.")))
        if imports or (text.startswith("ext://") and not text.startswith("ext://sys.std")):
            yield here
        yield from _named_by_logging(value, here)


def _items(values: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        yield from ((str(key), value) for key, value in values.items())
    elif isinstance(values, list):
        yield from ((str(number), value) for number, value in enumerate(values))
