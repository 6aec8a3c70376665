"""A sweep for the user's own checkpoints, to be filled in, and a page with the commands that use it."""

import json
import re
import shlex
from pathlib import Path
from string import Template

from capacity_gap.settings.errors import UserError
from capacity_gap.settings.places import IN_CHECKOUT, ROOT, RUN_WORDS, TOOL_WORDS, user_path

SWEEP = Path(__file__).with_name("starter_sweep.yaml")
README = Path(__file__).with_name("starter_readme.md")


def write_starter(folder: Path, name: str) -> tuple[Path, Path]:
    """Writes `sweeps/NAME.yaml` and `README.md` into a folder; returns both.

    Raises:
        UserError: one of them is there already, or the name is none that Hydra reads.
    """
    if not re.fullmatch(r"[A-Za-z_][\w-]*", name, re.ASCII):
        raise UserError(f"--name={name} is not a valid sweep name: use a letter, then letters, digits, _ and -.")
    folder = user_path(folder).absolute()
    texts = {folder / "sweeps" / f"{name}.yaml": SWEEP, folder / "README.md": README}
    if there := [str(file) for file in texts if file.exists()]:
        raise UserError(f"already there: {', '.join(there)}. `init` overwrites nothing: choose another folder.")
    words = _words(folder, name)
    for file, text in texts.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text.read_text(encoding="utf-8")).substitute(words), encoding="utf-8")
    sweep, readme = texts
    return sweep, readme


def _words(folder: Path, name: str) -> dict[str, str]:
    """What the two texts leave open."""
    within = {part: shlex.quote(str(folder / part)) for part in ("store", "figures", "report.html")}
    return {
        "run": shlex.join([*RUN_WORDS, "--config-dir", str(folder), "-m", f"+sweeps={name}"]),
        "tool": shlex.join(TOOL_WORDS),
        "where": f"`{ROOT}`, with its environment active" if IN_CHECKOUT else "any folder",
        "name": name,
        "store": within["store"],
        "store_yaml": json.dumps(str(folder / "store"), ensure_ascii=False),
        "figures": within["figures"],
        "report": within["report.html"],
    }
