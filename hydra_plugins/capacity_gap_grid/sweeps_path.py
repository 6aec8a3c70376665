"""Makes `+sweeps=NAME` find the project's `sweeps/` folder from any working directory."""

from hydra._internal.core_plugins import file_config_source
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.search_path_plugin import SearchPathPlugin

from capacity_gap.settings.places import SWEEPS

GROUP = SWEEPS.name


class SweepsSource(file_config_source.FileConfigSource):
    """A folder of which only the group `sweeps` is seen: it is a project's root, where virtual environments, stores and
    figures are too, and Hydra's help walks through every group that there is.
    """

    @staticmethod
    def scheme() -> str:
        """What a search path begins with to be read by this class."""
        return "sweeps"

    def is_group(self, config_path: str) -> bool:
        """Whether it is the root or `sweeps`."""
        return config_path in ("", GROUP) and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        """Whether it is a file of `sweeps`."""
        return config_path.startswith(f"{GROUP}/") and super().is_config(config_path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The files of `sweeps`, or `sweeps` itself; nothing else."""
        if config_path == GROUP:
            return super().list(config_path, results_filter)
        return [GROUP] if config_path == "" and results_filter != ObjectType.CONFIG else []


class SweepsPath(SearchPathPlugin):
    """Adds the folder that holds `sweeps/` to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends that folder; a relative path would silently find nothing from elsewhere."""
        if SWEEPS.is_dir():
            search_path.append(provider="capacity_gap", path=f"{SweepsSource.scheme()}://{SWEEPS.parent}")
