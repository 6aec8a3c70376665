"""What a cached teacher costs in held-out loss, and saves in time: the table of docs/distillation.md.

    python -m benchmarks.signals STORE [--repeats 3] [--out results/signals.csv]

Losses are read from the records of `sweeps/signals.yaml` (its header has the commands); times are measured here: CPU
seconds, one thread, interleaved, of 60 steps of 4 × 128 tokens of the same student under an online teacher and under
each cached signal, and of writing the signal once.
"""

import argparse
import os
import platform
import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.loop import BATCH, STEPS, Text, cpu_seconds
from benchmarks.losses import against
from capacity_gap import records
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.distill.signals import Signal, write_signal
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.loading import new_model
from capacity_gap.pruning.common_shape import student_config
from capacity_gap.runtime.process import Runtime
from capacity_gap.training.loop import Plan, train
from capacity_gap.training.train_config import OptimConfig

RUNGS = FAMILIES["pico"].rungs
STUDENT, TEACHERS = 45_000, ("80k", "180k", "400k")


def losses(frame: pd.DataFrame) -> pd.DataFrame:
    """Difference of final held-out loss to the online cell of the same teacher and seed, with its 95 % interval."""
    wanted = (frame["status"] == "done") & (frame["student"] == "45k") & (frame["data_tokens"] == 150_000)
    wanted &= (frame["loss"] == "forward_kl") & (frame["kd_weight"] == 0.5) & (frame["temperature"] == 1)
    wanted &= (frame["init"] == "pruned") & (frame["teacher_data"] == "400k")
    rows = []
    for (teacher, size), group in frame[wanted].groupby(["teacher", "teacher_params"]):
        by_seed = {signal: g.drop_duplicates("seed").set_index("seed") for signal, g in group.groupby("signal")}
        online = by_seed.pop("online")["student_loss"]
        for signal, cells in by_seed.items():
            row = {"teacher": teacher, "ratio": size / cells["student_params"].iloc[0], "signal": signal}
            row["online loss"] = online.mean()
            rows.append(row | against(cells["student_loss"], online))
    return pd.DataFrame(rows).sort_values(["ratio", "signal"])


def times(teacher_name: str, signals: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """For each signal: time of a cell, and of writing the signal, over that of an online cell; bytes a token."""
    shape = student_config(RUNGS, RUNGS[teacher_name], STUDENT, policy="common", multiple=1)
    teacher = new_model(RUNGS[teacher_name], 1).eval()
    order = np.arange(STEPS * BATCH)
    with tempfile.TemporaryDirectory() as folder:

        def write(name: str) -> Signal:
            kind, _, size = name.partition("-")
            given = {"kind": kind, "size": int(size), "temperature": 1.0, "seed": 0, "batch_size": 32}
            write_signal(teacher, Text(), order, Path(folder) / name, autocast=nullcontext, **given)  # type: ignore[arg-type]
            return Signal(Path(folder) / name)

        writing = {name: cpu_seconds(lambda name, _: write(name), name, None) for name in signals}
        sources: dict[str, Any] = {"online": teacher} | {name: Signal(Path(folder) / name) for name in signals}

        def cell(student: Any, source: Any) -> None:
            plan = Plan(order, OptimConfig(batch_size=BATCH), DistillConfig(), 1e-3, BATCH)
            with tempfile.TemporaryDirectory() as checkpoints:
                train(student, Text(), plan, runtime=Runtime(), checkpoints=Path(checkpoints), teacher=source)

        took: dict[str, list[float]] = {name: [] for name in sources}
        for repeat in range(repeats + 1):
            for name in list(sources)[:: 1 if repeat % 2 else -1]:
                took[name].append(cpu_seconds(cell, new_model(shape, 0), sources[name]))
        online = took.pop("online")[1:]
        return {
            name: {
                "time": median(a / b for a, b in zip(mine[1:], online, strict=True)),
                "writing": writing[name] / median(online),
                "bytes a token": sources[name].bytes_per_token,
            }
            for name, mine in took.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = losses(records.load(given.store))
    measured = []
    for teacher, group in table.groupby("teacher"):
        found = times(str(teacher), list(group["signal"]), given.repeats)
        measured += [{"teacher": teacher, "signal": name, **values} for name, values in found.items()]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, torch {torch.__version__}"
    table = table.merge(pd.DataFrame(measured), on=["teacher", "signal"]).assign(machine=machine)
    print(table.drop(columns="machine").to_string(index=False, float_format="{:.4f}".format))
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
