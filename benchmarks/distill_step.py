"""Claim: the chunked loss takes a fraction of the time and memory of full logits, and a training step beats TRL's.

    pip install trl
    python -m benchmarks.distill_step [--repeats 3] [--out results/distill_step.csv]    about half an hour on two cores

Interleaved, each measurement in a fresh process: seconds and the rise of its peak memory. `loss`: 2,048 tokens, student
width 256, teacher width 512, forward KL mixed with CE, value and gradients. `step`: a whole optimiser step of a 4-layer
student under a 4-layer teacher, 8 × 256 tokens, pure forward KL (all that GKD has). Ways: ours; `naive`, the full
logits in plain PyTorch; `trl`, GKDTrainer's own loss (lmbda=0, beta=0), its trainer's bookkeeping left out.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

VOCABULARIES = (8_192, 32_768, 131_072)
TOKENS, BATCH, LENGTH, WIDTHS = 2048, 8, 256, (256, 512)
WARM, STEPS = 1, 3


def _model(width: int, vocabulary: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes))


def loss_of(way: str, vocabulary: int):
    """A function that computes the loss and its gradients once, and returns the value."""
    import torch
    from torch.nn import functional as F

    from capacity_gap.distill import distill_loss

    g = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(1, TOKENS, w, generator=g) for w in WIDTHS)
    weight, teacher = (torch.randn(vocabulary, w, generator=g) * w**-0.5 for w in WIDTHS)
    labels = torch.randint(0, vocabulary, (1, TOKENS), generator=g)
    hidden.requires_grad_(), weight.requires_grad_()

    def ours():
        return distill_loss(hidden, weight, labels, teacher_hidden=taught, teacher_weight=teacher)[0]

    def naive():
        z, zt = hidden @ weight.T, taught @ teacher.T
        ce = F.cross_entropy(z.flatten(0, 1), labels.flatten())
        log_q, log_p = z.log_softmax(-1).flatten(0, 1), zt.log_softmax(-1).flatten(0, 1)
        return 0.5 * ce + 0.5 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def trl():
        loss = _gkd().generalized_jsd_loss((hidden @ weight.T), (taught @ teacher.T), labels, beta=0.0)
        return 0.5 * F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten()) + 0.5 * loss

    def once():
        hidden.grad = weight.grad = None
        value = {"ours": ours, "naive": naive, "trl": trl}[way]()
        value.backward()
        return float(value.detach())

    return once


def _gkd():
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer


def step_of(way: str, vocabulary: int):
    """A function that takes one optimiser step, and returns the loss before it."""
    import torch
    from torch.nn import functional as F

    from capacity_gap.distill import distill_loss
    from capacity_gap.models.loading import hidden_states, output_weight

    torch.manual_seed(0)
    student, teacher = (_model(w, vocabulary) for w in WIDTHS)
    teacher.eval()
    tokens = torch.randint(0, vocabulary, (BATCH, LENGTH + 1))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def ours():
        inputs = tokens[:, :-1]
        with torch.no_grad():
            taught = hidden_states(teacher, inputs), output_weight(teacher)
        return distill_loss(
            hidden_states(student, inputs),
            output_weight(student),
            tokens[:, 1:],
            teacher_hidden=taught[0],
            teacher_weight=taught[1],
            kd_weight=1.0,
        )[0]

    def naive():
        inputs = tokens[:, :-1]
        with torch.no_grad():
            log_p = teacher(inputs).logits.log_softmax(-1).flatten(0, 1)
        log_q = student(inputs).logits.log_softmax(-1).flatten(0, 1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def trl():
        gkd = _gkd()
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        trainer = SimpleNamespace(teacher_model=teacher, beta=0.0, generalized_jsd_loss=gkd.generalized_jsd_loss)
        return gkd.compute_loss(trainer, student, given)

    def once():
        value = {"ours": ours, "naive": naive, "trl": trl}[way]()
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    return once


def measure(what: str, way: str, vocabulary: int) -> dict:
    """Seconds a call, and the peak memory above what the inputs take, in this process."""
    warnings.simplefilter("ignore")
    once = {"loss": loss_of, "step": step_of}[what](way, vocabulary)
    if way == "trl":
        _gkd()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values = [once() for _ in range(WARM)]
    began = time.perf_counter()
    values += [once() for _ in range(STEPS)]
    seconds = (time.perf_counter() - began) / STEPS
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "MB": rise, "loss": values[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="CSV for the summary")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only[0], given.only[1], int(given.only[2]))))
        return
    rows = []
    for repeat in range(given.repeats):
        for what in ("loss", "step"):
            for vocabulary in VOCABULARIES if what == "loss" else VOCABULARIES[:2]:
                for way in ("ours", "naive", "trl")[:: 1 if repeat % 2 else -1]:
                    command = [sys.executable, "-m", "benchmarks.distill_step", "--only", what, way, str(vocabulary)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    row = {"repeat": repeat, "what": what, "vocabulary": vocabulary, "way": way}
                    rows.append({**row, **json.loads(done.stdout.splitlines()[-1])})
                    print(rows[-1], flush=True)
    wide = pd.DataFrame(rows).pivot(
        index=["what", "vocabulary", "repeat"], columns="way", values=["seconds", "MB", "loss"]
    )
    assert ((wide["loss"]["ours"] - wide["loss"]["naive"]).abs() < 1e-4).all(), "the losses disagree"
    summary = []
    for (what, vocabulary), group in wide.groupby(level=[0, 1]):
        for peer in ("naive", "trl"):
            ratios = {k: group[k]["ours"] / group[k][peer] for k in ("seconds", "MB")}
            row = {"what": what, "vocabulary": vocabulary, "ours against": peer}
            row |= {"time": ratios["seconds"].median(), "time, from": ratios["seconds"].min()}
            summary.append(row | {"time, to": ratios["seconds"].max(), "memory": ratios["MB"].median()})
    table = pd.DataFrame(summary)
    print(table.to_string(index=False, float_format="{:.2f}".format))
    import torch
    import trl

    versions = f"torch {torch.__version__}, trl {trl.__version__}, {torch.get_num_threads()} threads"
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {versions}")
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.3g")


if __name__ == "__main__":
    main()
