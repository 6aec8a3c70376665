"""Makes `+sweeps=NAME` find the project's `sweeps/` folder from any working directory."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class SweepsPath(SearchPathPlugin):
    """Adds the folder that holds `sweeps/`, beside the package, to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends the project's root; a relative path would silently find nothing from elsewhere."""
        root = Path(__file__).resolve().parents[2]
        if (root / "sweeps").is_dir():
            search_path.append(provider="capacity_gap", path=f"file://{root}")
