"""Claim: the training loop keeps at least 0.95 of the throughput of a bare PyTorch loop that does the same arithmetic.

    python -m benchmarks.loop [--repeats 5] [--out results/loop.csv]      about three minutes on two cores

Interleaved, one thread, CPU seconds of 60 steps of 4 × 128 tokens: a student of 55k parameters alone, and under a 180k
teacher. The bare loop is forward, the same chunked loss, backward, clipping, fused AdamW, a learning rate set by hand.
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from capacity_gap.distill import distill_loss
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.loading import hidden_states, new_model, output_weight
from capacity_gap.runtime.process import Runtime
from capacity_gap.training.loop import Plan, learning_rate, make_optimizer, train
from capacity_gap.training.train_config import OptimConfig

STEPS, BATCH, LENGTH = 60, 4, 128
RUNGS = FAMILIES["pico"].rungs


class Text:
    """Random tokens in memory."""

    sequence_length = LENGTH
    tokens = np.random.default_rng(0).integers(0, 1024, (STEPS * BATCH, LENGTH + 1))

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """Rows of the text."""
        return self.tokens[indices]


def plan(kd_weight: float) -> Plan:
    optim = OptimConfig(batch_size=BATCH)
    return Plan(np.arange(STEPS * BATCH), optim, DistillConfig(kd_weight=kd_weight), 1e-3, BATCH)


def ours(student: Any, teacher: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kd_weight = 0.0 if teacher is None else 0.5
        train(student, Text(), plan(kd_weight), runtime=Runtime(), checkpoints=Path(folder), teacher=teacher)


def bare(student: Any, teacher: Any) -> None:
    student.train()
    run = plan(0.0)
    optimizer = make_optimizer(student, run.optim)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, run.optim, run.peak)
        tokens = torch.from_numpy(Text.tokens[step * BATCH : (step + 1) * BATCH])
        inputs, taught = tokens[:, :-1], {}
        if teacher is not None:
            with torch.no_grad():
                taught = {"teacher_hidden": hidden_states(teacher, inputs), "teacher_weight": output_weight(teacher)}
        hidden = hidden_states(student, inputs)
        weight = 0.5 if taught else 0.0
        loss, _ = distill_loss(hidden, output_weight(student), tokens[:, 1:], kd_weight=weight, **taught)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def cpu_seconds(run: Any, student: Any, teacher: Any) -> float:
    began = time.process_time()
    run(student, teacher)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    teacher = new_model(RUNGS["180k"], 1).eval()
    rows = []
    for case, taught in (("direct", None), ("distilled", teacher)):
        for run in (ours, bare):
            run(new_model(RUNGS["55k"], 0), taught)  # warm
        ratios = []
        for repeat in range(given.repeats):
            order = (ours, bare) if repeat % 2 else (bare, ours)
            took = {run: cpu_seconds(run, new_model(RUNGS["55k"], 0), taught) for run in order}
            ratios.append(took[bare] / took[ours])
        row = {"case": case, "repeats": len(ratios), "throughput against bare": np.median(ratios)}
        rows.append(
            {**row, "from": min(ratios), "to": max(ratios), "tokens/CPU s": STEPS * BATCH * LENGTH / took[ours]}
        )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, torch {torch.__version__}"
    table = pd.DataFrame(rows).assign(machine=machine)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
