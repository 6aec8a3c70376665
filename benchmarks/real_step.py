"""Claim: on a real model our training step is as fast as a bare loop, faster than TRL's, and takes less memory.

    pip install trl
    python -m benchmarks.real_step [--rounds 10] [--out results/real_step.csv]      about ten minutes of one core

The cell of `sweeps/real.yaml`: a student of 110M parameters (23 of 30 layers) under SmolLM2-135M, 4 × 256 tokens a
step, fp32, one thread; the shapes with random weights, on which speed does not depend. Pure forward KL, which is all
that GKD has. `ours` is `training.loop.train` with its logs, clipping and checks. `trl` is GKDTrainer.train()
off-policy (lmbda=0, beta=0). `bare` is a loop of forward passes, full logits, F.kl_div, clipping and fused AdamW, with
nothing else in it. None writes checkpoints.

The three run in one process and take turns, a step each, so that whatever else the machine does meets all alike: the
ratios are of steps of one round, in CPU seconds. Peak memory is that of a process of its own for each.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.distill_step import _gkd

VOCABULARY, LENGTH, BATCH, RATE = 49_152, 256, 4, 1e-4
WARM = 1  # steps of each way that are not timed
TEACHER = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
STUDENT = {**TEACHER, "num_hidden_layers": 23}


def tokens_of(steps: int) -> np.ndarray:
    """The sequences of so many steps."""
    return np.random.default_rng(0).integers(0, VOCABULARY, (BATCH * steps, LENGTH + 1))


class Clock:
    """CPU and wall seconds of one way's steps; several ways take turns, a step each."""

    def __init__(self, turns: "Turns | None" = None) -> None:
        self.steps: list[tuple[float, float]] = []
        self.turns = turns
        self.began = (0.0, 0.0)

    def begin(self) -> None:
        """Waits for this way's turn."""
        if self.turns:
            self.turns.wait(self)
        self.began = (time.process_time(), time.perf_counter())

    def tick(self) -> None:
        """A step has ended: the next way takes one."""
        now = (time.process_time(), time.perf_counter())
        self.steps.append((now[0] - self.began[0], now[1] - self.began[1]))
        if self.turns:
            self.turns.end(self)
        self.begin()


class Turns:
    """Lets several threads run one after another, in a fixed order."""

    def __init__(self) -> None:
        self.order: list[Clock] = []
        self.changed = threading.Condition()

    def wait(self, who: Clock) -> None:
        """Until it is this one's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.order[0] is who)

    def end(self, who: Clock) -> None:
        """This one goes to the end of the line."""
        with self.changed:
            self.order.append(self.order.pop(0))
            self.changed.notify_all()

    def leave(self, who: Clock) -> None:
        """This one takes no further turn."""
        with self.changed:
            self.order.remove(who)
            self.changed.notify_all()


def ours(student: Any, teacher: Any, rows: np.ndarray, clock: Clock) -> float:
    """Steps of our loop; returns the loss of the first."""
    from capacity_gap.distill.distill_config import DistillConfig
    from capacity_gap.runtime.process import Runtime
    from capacity_gap.training.loop import Plan, train
    from capacity_gap.training.train_config import OptimConfig

    class Text:
        sequence_length = LENGTH

        def __len__(self) -> int:
            return len(rows)

        def batch(self, indices: np.ndarray) -> np.ndarray:
            return rows[indices]

    class Ticking(Runtime):
        def report(self, done: float, total: float, unit: str = "tokens", **extra: Any) -> None:
            clock.tick()

    plan = Plan(np.arange(len(rows)), OptimConfig(batch_size=BATCH), DistillConfig(kd_weight=1.0), RATE, BATCH)
    with tempfile.TemporaryDirectory() as folder:
        runtime = Ticking(checkpoint_minutes=1e6)  # the others write none
        done = train(student, Text(), plan, runtime=runtime, checkpoints=Path(folder), teacher=teacher)
    return float(done.history[0]["kl"])


def trl(student: Any, teacher: Any, rows: np.ndarray, clock: Clock) -> float:
    """Steps of GKDTrainer, on sequences that are packed already; returns the loss of the first."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    gkd = _gkd()
    from trl.experimental.gkd import GKDConfig

    losses: list[float] = []

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    def collate(items: list[dict]) -> dict[str, Any]:
        tokens = torch.tensor([item["tokens"] for item in items])
        labels = tokens.clone()
        labels[:, 0] = -100  # nothing predicts it, and the trainer divides by the labels that count
        mask, none = torch.ones_like(tokens), tokens[:, :0]
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels, "prompts": none, "prompt_mask": none}

    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    with tempfile.TemporaryDirectory() as folder:
        settings = GKDConfig(
            output_dir=folder,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=BATCH,
            max_steps=len(rows) // BATCH,
            learning_rate=RATE,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = gkd(
            student,
            teacher_model=teacher,
            args=settings,
            data_collator=collate,
            train_dataset=Dataset.from_dict({"tokens": rows}),
            processing_class=tokenizer,
            callbacks=[Ticks()],
        )
        trainer._get_train_sampler = lambda *_: None  # in order, as the others take them
        trainer.train()
    return losses[0]


def bare(student: Any, teacher: Any, rows: np.ndarray, clock: Clock) -> float:
    """The same steps in a dozen lines of PyTorch; returns the loss of the first."""
    import torch
    from torch.nn import functional as F

    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, fused=True)
    losses = []
    for batch in rows.reshape(-1, BATCH, LENGTH + 1):
        inputs = torch.from_numpy(batch[:, :-1])
        with torch.no_grad():
            log_p = teacher(inputs).logits.log_softmax(-1).flatten(0, 1)
        log_q = student(inputs).logits.log_softmax(-1).flatten(0, 1)
        loss = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        clock.tick()
    return losses[0]


WAYS: dict[str, Callable[[Any, Any, np.ndarray, Clock], float]] = {"ours": ours, "trl": trl, "bare": bare}


def models() -> tuple[Any, Any]:
    """A student and its teacher."""
    from capacity_gap.models.loading import new_model

    return new_model(STUDENT, 0), new_model(TEACHER, 1).eval()


def prepare() -> None:
    """One thread, no warnings; TRL is imported whatever runs, so that all begin with the same memory."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _gkd()


def memory(way: str) -> dict[str, Any]:
    """The rise of this process's peak memory above what imports take, over three steps; and the first loss."""
    prepare()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = WAYS[way](*models(), tokens_of(3), Clock())
    return {"GB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, "loss": first}


def interleaved(rounds: int) -> pd.DataFrame:
    """Seconds of each round's step by way: columns (cpu, wall) × way."""
    prepare()
    turns, failed = Turns(), []
    clocks = {way: Clock(turns) for way in WAYS}
    turns.order = list(clocks.values())
    made = {way: models() for way in WAYS}  # before any thread: they share one generator of random numbers

    def run(way: str) -> None:
        try:
            clocks[way].begin()
            WAYS[way](*made[way], tokens_of(WARM + rounds), clocks[way])
        except BaseException as error:
            failed.append(error)
        finally:
            turns.leave(clocks[way])

    threads = [threading.Thread(target=run, args=(way,)) for way in WAYS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    steps = {way: np.array(clock.steps[WARM:]) for way, clock in clocks.items()}
    return pd.DataFrame({(kind, way): s[:, i] for i, kind in enumerate(("cpu", "wall")) for way, s in steps.items()})


def summary(steps: pd.DataFrame, peaks: pd.DataFrame) -> pd.DataFrame:
    """Each way's medians, and how many times as fast ours is in the same round: median and quartiles."""
    import torch
    import trl as peer

    found = []
    for way in WAYS:
        ratio, mine = steps["cpu"][way] / steps["cpu"]["ours"], steps["cpu"][way]
        found.append(
            {
                "way": way,
                "rounds": len(steps),
                "tokens per CPU s": BATCH * LENGTH / mine.median(),
                "tokens per s": BATCH * LENGTH / steps["wall"][way].median(),
                "peak GB": peaks["GB"][way],
                "ours faster": ratio.median(),
                "quartile 1": ratio.quantile(0.25),
                "quartile 3": ratio.quantile(0.75),
                "our memory": peaks["GB"]["ours"] / peaks["GB"][way],
                "losses apart": abs(peaks["loss"]["ours"] - peaks["loss"][way]),
            }
        )
    table = pd.DataFrame(found)
    assert (table["losses apart"] < 1e-4).all(), f"the losses disagree:\n{table}"
    versions = f"torch {torch.__version__}, trl {peer.__version__}"
    return table.assign(machine=f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, {versions}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="CSV for the summary")
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        print(json.dumps(memory(given.memory)))
        return
    peaks = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.real_step", "--memory", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[way] = json.loads(done.stdout.splitlines()[-1])
        print(way, peaks[way], flush=True)
    steps = interleaved(given.rounds)
    print(steps.to_string(float_format="{:.2f}".format))
    table = summary(steps, pd.DataFrame(peaks).T)
    print(table.to_string(index=False, float_format="{:.4g}".format))
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
