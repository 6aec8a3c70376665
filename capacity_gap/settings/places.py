"""Where configs, sweeps and published fits are, and how the commands are called. Imports no torch.

In a checkout they are beside the package. An installed wheel holds copies of them inside it.
"""

import os
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
IN_CHECKOUT = not (PACKAGE / "conf").is_dir()
ROOT = PACKAGE.parent if IN_CHECKOUT else PACKAGE  # holds conf, sweeps and results
CONF = ROOT / "conf"
SWEEPS = ROOT / "sweeps"
RESULTS = ROOT / "results"

ON_HUB = re.compile(r"\w[\w.-]*(/[\w.-]+)?")  # how a name on the Hugging Face hub is written

# What a user types before overrides, and before any other command.
RUN_WORDS = ("python", "run.py") if IN_CHECKOUT else ("capacity-gap", "run")
TOOL_WORDS = ("python", "-m", "capacity_gap") if IN_CHECKOUT else ("capacity-gap",)


def user_path(given: str | os.PathLike) -> Path:
    """A path as a user wrote it, with `~` for a home; that of an unknown user stays as it is."""
    return Path(os.path.expanduser(given))


def run_command() -> list[str]:
    """What starts a run from another process, in any working directory and without a PATH."""
    script = [str(ROOT / "run.py")] if IN_CHECKOUT else ["-m", "capacity_gap", "run"]
    return [sys.executable, *script]


def default_store() -> str:
    """`$CAPACITY_GAP_STORE`, else `store`: beside `run.py` in a checkout, in the working directory from a wheel."""
    given = os.environ.get("CAPACITY_GAP_STORE")
    return given or str((ROOT if IN_CHECKOUT else Path.cwd()) / "store")
