"""What a config file may not do: run code, set the environment, read secrets. Files are passed from hand to hand.

Hydra imports and calls whatever a config names as a callback, as `_target_`, as a class of its logging or through
`${oc.create:…}`. So of `hydra.*` a file may set only what is listed here. The command line is the user's own: it may
set everything, and a file that it names as `hydra/launcher=NAME` may set all of a launcher.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import ConfigError, shown
from capacity_gap.settings.places import CONF

INSTALLED = ("pkg://", "structured://")  # how the places of configs begin that came with a package
PARAMS = "hydra.sweeper.params"
MAY_SET = ("hydra.sweeper.max_batch_size", "hydra.mode", "hydra.job.name")
LAUNCHER = "hydra.launcher"
COMMANDS = ("setup", "container", "srun_args", "sbatch", "address")  # of a launcher: shell lines, programs, machines
OPT_IN = ("evaluate.allow_code_execution",)
RESOLVER = re.compile(r"\$\{\s*([\w.]*)\s*:")  # also one inside the argument of another
VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*(\w+)\s*(?:,[\w./~ -]*)?\}")  # with its default, if it has one
SECRET = re.compile("token|key|secret|passw|credential", re.IGNORECASE)
# Groups of the folder that --config-dir names. Hydra would take every folder in it for one: also a store, or `data`.
GROUPS = ("sweeps", "hydra", "family", "corpus", "prune", "evaluate", "train", "tracking")
ON_COMMAND_LINE = "Pass it on the command line if it is intended."


def guard(words: Sequence[str]) -> None:
    """Lets Hydra read no file that does what a file may not.

    Args:
        words: of the command line.
    """
    from hydra._internal.config_repository import ConfigRepository
    from hydra._internal.core_plugins.file_config_source import FileConfigSource

    # Of an earlier run in this process, what it wrapped.
    load = getattr(ConfigRepository.load_config, "__wrapped__", ConfigRepository.load_config)
    is_group = getattr(FileConfigSource.is_group, "__wrapped__", FileConfigSource.is_group)

    @functools.wraps(load)
    def checked(self: Any, config_path: str) -> Any:
        found = load(self, config_path)
        if found is not None and not _is_installed(found.path):
            check_file(config_path, found, words)
        return found

    @functools.wraps(is_group)
    def known_group(self: Any, config_path: str) -> bool:
        ours = self.provider != "command-line" or config_path.partition("/")[0] in ("", *GROUPS)
        return ours and is_group(self, config_path)

    ConfigRepository.load_config = checked
    FileConfigSource.is_group = known_group


def _is_installed(path: str) -> bool:
    return path.startswith(INSTALLED) or Path(path.removeprefix("file://")).resolve() == CONF.resolve()


def check_file(config_path: str, found: Any, words: Sequence[str]) -> None:
    """Raises `ConfigError` if a config file sets what no file may.

    Args:
        config_path: its group and name, such as `sweeps/mine`.
        found: what Hydra read: `config`, `header` and `defaults_list`.
        words: of the command line.
    """
    from omegaconf import OmegaConf

    group, _, name = config_path.rpartition("/")
    named = f"{group}={name}" in words
    placed = [str(getattr(entry, "package", None) or "") for entry in found.defaults_list or ()]
    if elsewhere := [package for package in placed if "hydra" in package.split(".")]:
        raise _refused(config_path, f"places another file at {elsewhere[0]}")
    values = OmegaConf.to_container(found.config, resolve=False)
    for key, value in _leaves(values, _package(found.header.get("package"), group)):
        if why := _wrong(key, value, named=named):
            raise _refused(config_path, why)


def _refused(config_path: str, why: str) -> ConfigError:
    return ConfigError(f"{config_path} {why}, which a config file may not. {ON_COMMAND_LINE}")


def _package(header: str | None, group: str) -> str:
    """Where in the config a file's content goes."""
    given = group.replace("/", ".") if header in (None, "_group_") else str(header)
    return given.removeprefix("_global_").strip(".")


def _wrong(key: str, value: Any, *, named: bool) -> str | None:
    """What is wrong with one value that a file sets, if something is; `named`: the command line names the file."""
    if "_target_" in key.split("."):
        return f"names code to run ({key})"
    text = str(value)
    if other := [name for name in RESOLVER.findall(text) if name != "oc.env"]:
        return f"computes {key} by {other[0] or 'a resolver'}"
    read = VARIABLE.findall(text)
    if len(read) < len(RESOLVER.findall(text)):
        return f"reads a variable whose name is computed ({key})"
    if secret := [name for name in read if SECRET.search(name)]:
        return f"reads the variable {shown(secret[0])}"
    if key in OPT_IN and value is not False:
        return f"sets {key}"
    if key.split(".")[0] != "hydra" or key in MAY_SET or key.startswith(f"{PARAMS}."):
        return None
    if key.startswith(f"{LAUNCHER}.") and (named or key.split(".")[2] not in COMMANDS):
        return None
    return f"sets {key}"


def _leaves(values: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every value that is no section, with its key; empty sections set nothing."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _leaves(value, f"{where}.{key}" if where else str(key))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from _leaves(value, f"{where}.{number}")
    else:
        yield where, values
