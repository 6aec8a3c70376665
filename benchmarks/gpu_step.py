"""Claim: on a GPU a distillation step takes less time and memory than with full logits, plain or by TRL's GKD loss.

    pip install trl liger-kernel
    python -m benchmarks.gpu_step [--repeats 5] [--out results/gpu_step.csv]    about two minutes on an H200

Models of SmolLM2-135M's shape (30 layers, 49,152 tokens) over a student of 80M, and of the `small` ladder (8 layers,
8,192 tokens) over one of 5M, all random; 64 × 256 tokens a step, bf16 autocast, forward KL mixed with CE. `ours` is
`training.loop.train` itself, with its logs, clipping and checks; `+liger` and `+compile` are its options. The peers are
bare loops without any of it: `naive`, full logits in plain PyTorch; `trl`, the loss of GKDTrainer (lmbda=0, beta=0) and
CE. `loss` is distill_loss alone at 16,384 tokens, by the largest number of logits in a chunk. Interleaved, in one
process; tokens a second and the peak of torch's allocator, by their medians and ranges over repeats.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from capacity_gap.distill import distill_loss, fused, losses
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.models.building import auto_class
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.runtime.process import Runtime
from capacity_gap.training.loop import Plan, train
from capacity_gap.training.train_config import OptimConfig

LENGTH, BATCH, STEPS, WARM = 256, 64, 12, 3
SMOL = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
CASES = {
    "80M under 135M": (
        {**SMOL, "hidden_size": 448, "intermediate_size": 1088, "num_attention_heads": 7, "num_key_value_heads": 7},
        SMOL,
    ),
    "5M under 20M": (FAMILIES["small"].rungs["5m"], FAMILIES["small"].rungs["20m"]),
}
CHUNKS = (2**22, 2**24, 2**26, 2**28)


class Text:
    """Random tokens."""

    sequence_length = LENGTH

    def __init__(self, vocabulary: int) -> None:
        self.tokens = np.random.default_rng(0).integers(0, vocabulary, (BATCH * STEPS, LENGTH + 1))

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of some sequences."""
        return self.tokens[indices]


def model_of(shape: Any) -> Any:
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape)
    return auto_class(config).from_config(config).cuda()


@contextmanager
def liger(on: bool):
    """Whether our loss takes Liger's kernels."""
    was = fused.installed
    fused.installed = lambda: on  # type: ignore[assignment]
    yield
    fused.installed = was


def ours(student: Any, teacher: Any, text: Text, *, compile: bool = False, kernels: bool = False) -> float:
    """Seconds of `STEPS` − `WARM` steps of our loop."""
    ends: dict[int, float] = {}

    class Clock(Runtime):
        def report(self, done: int, total: int, unit: str) -> None:
            torch.cuda.synchronize()
            ends[done] = time.perf_counter()

    plan = Plan(np.arange(len(text)), OptimConfig(batch_size=BATCH), DistillConfig(), 1e-4, BATCH, compile=compile)
    with tempfile.TemporaryDirectory() as folder, liger(kernels):
        clock = Clock(device="cuda:0")
        train(student, text, plan, runtime=clock, checkpoints=Path(folder), teacher=teacher, precision="bf16")
    return ends[STEPS] - ends[WARM]


def bare(loss: Callable[..., torch.Tensor], student: Any, teacher: Any, text: Text) -> float:
    """The same steps of a loop with nothing else in it."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    student.train()
    for step in range(STEPS):
        if step == WARM:
            torch.cuda.synchronize()
            began = time.perf_counter()
        tokens = torch.from_numpy(text.batch(np.arange(step * BATCH, (step + 1) * BATCH))).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            with torch.no_grad():
                taught = teacher(tokens[:, :-1]).logits
            loss(student(tokens[:, :-1]).logits, taught, tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def naive(z: torch.Tensor, zt: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    z, zt = z.float().flatten(0, 1), zt.float().flatten(0, 1)
    kl = F.kl_div(z.log_softmax(-1), zt.log_softmax(-1), log_target=True, reduction="batchmean")
    return 0.5 * F.cross_entropy(z, labels.flatten()) + 0.5 * kl


def trl(z: torch.Tensor, zt: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    kl = GKDTrainer.generalized_jsd_loss(z.float(), zt.float(), labels, beta=0.0)
    return 0.5 * F.cross_entropy(z.float().flatten(0, 1), labels.flatten()) + 0.5 * kl


WAYS: dict[str, Callable[..., float]] = {
    "ours": ours,
    "ours+liger": lambda *given: ours(*given, kernels=True),
    "ours+compile": lambda *given: ours(*given, compile=True),
    "naive": lambda *given: bare(naive, *given),
    "trl": lambda *given: bare(trl, *given),
}


def steps(case: str, way: str) -> dict[str, float]:
    """Tokens a second and peak memory of one way."""
    shapes = CASES[case]
    student, teacher = (model_of(shape) for shape in shapes)
    text = Text(shapes[0]["vocab_size"])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = WAYS[way](student, teacher.eval(), text)
    rate = (STEPS - WARM) * BATCH * LENGTH / seconds
    return {"tokens_per_s": rate, "GB": torch.cuda.max_memory_allocated() / 1e9}


def loss_alone(elements: int) -> dict[str, float]:
    """The loss and its gradients, with chunks of so many logits."""
    shapes = CASES["80M under 135M"]
    g = torch.Generator("cuda").manual_seed(0)
    count, vocabulary = BATCH * LENGTH, shapes[0]["vocab_size"]
    hidden, taught = (
        torch.randn(1, count, s["hidden_size"], device="cuda", generator=g, dtype=torch.bfloat16) for s in shapes
    )
    weight, theirs = (
        torch.randn(vocabulary, s["hidden_size"], device="cuda", generator=g, dtype=torch.bfloat16) * 0.05
        for s in shapes
    )
    labels = torch.randint(0, vocabulary, (1, count), device="cuda", generator=g)
    hidden.requires_grad_(), weight.requires_grad_()
    was, losses.DEVICE_ELEMENTS = losses.DEVICE_ELEMENTS, elements
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with liger(False):
        for call in range(6):
            if call == 2:
                torch.cuda.synchronize()
                began = time.perf_counter()
            distill_loss(hidden, weight, labels, teacher_hidden=taught, teacher_weight=theirs)[0].backward()
            hidden.grad = weight.grad = None
        torch.cuda.synchronize()
    losses.DEVICE_ELEMENTS = was
    rate = 4 * count / (time.perf_counter() - began)
    return {"tokens_per_s": rate, "GB": torch.cuda.max_memory_allocated() / 1e9}


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="CSV for the summary")
    parser.add_argument("--without", nargs="*", default=[], help="ways that are left out")
    given = parser.parse_args()
    ways = [way for way in WAYS if way not in given.without]
    rows: list[dict] = []
    for repeat in range(given.repeats):
        for case in CASES:
            for way in ways[:: 1 if repeat % 2 else -1]:
                rows.append({"case": case, "way": way, **steps(case, way)})
                print(rows[-1], flush=True)
        for elements in CHUNKS:
            rows.append({"case": "loss", "way": f"2^{elements.bit_length() - 1} logits", **loss_alone(elements)})
    grouped = pd.DataFrame(rows).groupby(["case", "way"], sort=False)
    table = grouped.agg(
        repeats=("GB", "size"),
        tokens_per_s=("tokens_per_s", "median"),
        lowest=("tokens_per_s", "min"),
        highest=("tokens_per_s", "max"),
        GB=("GB", "median"),
    ).reset_index()
    versions = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    table = table.assign(machine=versions)
    print(table.to_string(index=False, float_format="{:.4g}".format))
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
