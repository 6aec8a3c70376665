"""A grid as one W&B run: all its cells in a table, reused ones included, its figures, and the law."""

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capacity_gap.records.load import sweep_frame
from capacity_gap.store.contents import sweep_id
from capacity_gap.store.stage import Store
from capacity_gap.tracking.tracking_config import TrackingConfig
from capacity_gap.tracking.wandb_runs import end, open_run

if TYPE_CHECKING:
    import pandas as pd

    from capacity_gap.fit import LawFit
    from capacity_gap.fit.optimum import Located


def mirror_sweep(store: Store, name: str, tracking: TrackingConfig, *, changed: bool) -> None:
    """Writes the run of a grid that has ended, unless nothing changed since the last time.

    Whatever goes wrong here is one line of warning: the records are written, and they are the truth.
    """
    folder, run_id = store.root / "wandb", f"sweep-{sweep_id(store, name)}"
    there = any((folder / "wandb").glob(f"*run-*-{run_id}*"))
    if tracking.mode == "disabled" or (there and not changed):
        return
    try:
        _mirror(sweep_frame(store, name), folder, run_id, name, tracking)
    except Exception as error:
        print(f"warning: the grid is not mirrored to W&B ({type(error).__name__}: {error})", file=sys.stderr)


def _mirror(frame: "pd.DataFrame", folder: Path, run_id: str, name: str, tracking: TrackingConfig) -> None:

    from capacity_gap.fit.frame import curves
    from capacity_gap.fit.law import law_from
    from capacity_gap.fit.optimum import locate

    with tempfile.TemporaryDirectory() as scratch:
        counts = {str(k): int(n) for k, n in frame["status"].value_counts().items()}
        found, notes = curves(frame) if counts.get("done") else ([], [])
        located = locate(found) if found else None
        law = law_from(located, axis="total", notes=notes) if located else None
        run = open_run(
            tracking, folder, sweeps=[name], id=run_id, name=f"sweep {name}", config=constants(frame), job_type="sweep"
        )
        run.log({"records": table(frame)})
        if law is not None and located is not None:
            run.log({"optima": table(_optima(law)), **_figures(located, law, Path(scratch))})
            run.summary.update(_law_summary(law))
        run.summary.update({"sweep": name, "cells": len(frame), **{f"cells/{k}": n for k, n in counts.items()}})
        end(run, failed=bool(counts.get("failed")))


def constants(frame: "pd.DataFrame") -> dict[str, Any]:
    """The settings that all cells of a grid share."""
    skipped = ("cell", "error", "created", "status")
    shared = {c: frame[c].dropna().unique() for c in frame.columns if c not in skipped}
    return {c: _plain(v[0]) for c, v in shared.items() if len(v) == 1}


def table(frame: "pd.DataFrame") -> Any:
    """A DataFrame as a W&B table, with None for what is missing."""
    import wandb

    rows = [[_plain(v) for v in row] for row in frame.itertuples(index=False)]
    return wandb.Table(columns=list(frame.columns), data=rows, allow_mixed_types=True)


def _plain(value: Any) -> Any:
    """A cell of a DataFrame as JSON knows it."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and value != value else value


def _optima(law: "LawFit") -> "pd.DataFrame":
    import pandas as pd

    rows = [json.loads(json.dumps(o.to_dict())) | {"ratio": o.ratio} for o in law.optima]
    return pd.DataFrame([{k: str(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows])


def _figures(located: "Located", law: "LawFit", folder: Path) -> dict[str, Any]:
    import wandb

    from capacity_gap.report.plots import plot_curves, plot_law, save_figure

    made = {"curves": plot_curves(located), "law": plot_law(law)}
    return {f"figures/{k}": wandb.Image(str(save_figure(figure, folder / k)[0])) for k, figure in made.items()}


def _law_summary(law: "LawFit") -> dict[str, Any]:
    low, high = law.ratio_interval or (None, None)
    given = {"law/ratio": law.ratio, "law/ratio_low": low, "law/ratio_high": high, "law/slope": law.slope}
    return {"law/status": law.status, "law/verdict": law.verdict(), **{k: v for k, v in given.items() if v is not None}}
