"""What `status` says of the curves of a grid that has ended, kept in the store so that it is fitted once.

Looking a fit up costs nothing; making one loads pandas and scipy. Imports neither by itself, and never torch.
"""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from capacity_gap import __version__
from capacity_gap.settings.errors import UserError
from capacity_gap.settings.hashing import fingerprint
from capacity_gap.store.files import write_json
from capacity_gap.store.stage import Store

KEPT = "answers.json"  # of a store: by grid, the cells that were fitted and what was said of them
MOST = 300  # cells that `status` fits by itself: a second or two
WORDS = 1  # raise it with the sentences: what was said before is said anew


def standing(store: Store, name: str, done: Sequence[str], *, room: int = MOST) -> tuple[list[str] | None, int]:
    """A sentence for each curve of a grid, and how many cells were fitted for it.

    None in place of the sentences where they are not kept and would take more than `room` cells.

    Args:
        store: of the grid.
        name: the grid.
        done: the keys of its finished records.
        room: how many cells may be fitted now.
    """
    cells = fingerprint([WORDS, __version__, sorted(done)])
    kept = _kept(store)
    if kept.get(name, {}).get("cells") == cells:
        return list(kept[name]["said"]), 0
    if len(done) > room:
        return None, 0
    said = _sentences(store, name)
    with contextlib.suppress(OSError):  # a store that may only be read is fitted again
        write_json(store.root / KEPT, {**kept, name: {"cells": cells, "said": said}})
    return said, len(done)


def _kept(store: Store) -> dict[str, Any]:
    """What was said before; nothing where that cannot be read."""
    try:
        kept = json.loads((store.root / KEPT).read_text(encoding="utf-8"))
        return {name: {"cells": str(k["cells"]), "said": [str(s) for s in k["said"]]} for name, k in kept.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _sentences(store: Store, name: str) -> list[str]:
    from capacity_gap.cell.outdated import without_outdated
    from capacity_gap.fit.frame import curves
    from capacity_gap.fit.law import law_from
    from capacity_gap.fit.optimum import locate
    from capacity_gap.records.load import sweep_frame

    try:
        frame, _ = without_outdated(sweep_frame(store, name), store.root)
        found, notes = curves(frame)
        return law_from(locate(found), axis="total", notes=notes).sentences() if found else []
    except (ValueError, UserError) as error:
        return [f"nothing can be fitted: {error}"]
