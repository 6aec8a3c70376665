"""Claim: the chunked loss takes a fraction of the time and memory of full logits, and a training step beats TRL's.

    pip install trl
    python -m benchmarks.distill_step [--repeats 3] [--out results/distill_step.csv]    about six minutes a repeat

Interleaved, each measurement in a fresh process with one thread: CPU seconds (other programs then hardly matter) and
the rise of its peak memory. `loss`: 2,048 tokens, student width 64 and teacher width 128, forward KL mixed with CE,
value and gradients. `step`: a whole optimiser step of 4-layer models of these widths, 8 × 256 tokens, pure forward KL
(all that GKD has). `wide`: the same at 256 and 512, where matrix products that every way needs take most of the time.
Ways: ours; `naive`, the full logits in plain PyTorch; `trl`, GKDTrainer's own loss (lmbda=0, beta=0), its trainer's
bookkeeping left out.
"""

import argparse
import functools
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
TOKENS, BATCH, LENGTH = 2048, 8, 256
NARROW, WIDTHS = (64, 128), (256, 512)
CASES = (
    *(("loss", v) for v in VOCABULARIES),
    ("loss, wide", 32_768),
    ("step", 32_768),
    *(("step, wide", v) for v in VOCABULARIES[:2]),
)
WARM = 1
CALLS = {8_192: 3, 32_768: 1, 131_072: 1}  # timed, after the warm one


def _model(width: int, vocabulary: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 4, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes))


def loss_of(way: str, vocabulary: int, widths: tuple[int, int] = NARROW):
    """A function that computes the loss and its gradients once, and returns the value."""
    import torch
    from torch.nn import functional as F

    from capacity_gap.distill import distill_loss

    g = torch.Generator().manual_seed(0)
    hidden, taught = (torch.randn(1, TOKENS, w, generator=g) for w in widths)
    weight, teacher = (torch.randn(vocabulary, w, generator=g) * w**-0.5 for w in widths)
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
        z = hidden @ weight.T
        loss = _gkd().generalized_jsd_loss(z, taught @ teacher.T, labels, beta=0.0)
        return 0.5 * F.cross_entropy(z.flatten(0, 1), labels.flatten()) + 0.5 * loss

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


def step_of(way: str, vocabulary: int, widths: tuple[int, int] = NARROW):
    """A function that takes one optimiser step, and returns the loss before it."""
    import torch
    from torch.nn import functional as F

    from capacity_gap.distill import distill_loss
    from capacity_gap.models.loading import hidden_states, output_weight

    torch.manual_seed(0)
    student, teacher = (_model(w, vocabulary) for w in widths)
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
    import torch

    torch.set_num_threads(1)
    makers = {"loss": loss_of, "loss, wide": functools.partial(loss_of, widths=WIDTHS)}
    makers |= {"step": step_of, "step, wide": functools.partial(step_of, widths=WIDTHS)}
    once = makers[what](way, vocabulary)
    if way == "trl":
        _gkd()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values = [once() for _ in range(WARM)]
    began = time.process_time()
    values += [once() for _ in range(CALLS[vocabulary])]
    seconds = (time.process_time() - began) / CALLS[vocabulary]
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "MB": rise, "loss": values[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="CSV for the summary")
    parser.add_argument("--what", nargs="*", default=sorted({what for what, _ in CASES}), help="some of the cases")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only[0], given.only[1], int(given.only[2]))))
        return
    rows: list[dict] = []
    for repeat in range(given.repeats):
        rows += one_repeat(repeat, given.what)
        table = summary(pd.DataFrame(rows))
        if given.out:
            table.to_csv(given.out, index=False, float_format="%.3g")
    print(table.to_string(index=False, float_format="{:.2f}".format))


def one_repeat(repeat: int, cases: list[str]) -> list[dict]:
    rows = []
    for what, vocabulary in (case for case in CASES if case[0] in cases):
        for way in ("ours", "naive", "trl")[:: 1 if repeat % 2 else -1]:
            command = [sys.executable, "-m", "benchmarks.distill_step", "--only", what, way, str(vocabulary)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = {"repeat": repeat, "what": what, "vocabulary": vocabulary, "way": way}
            rows.append({**row, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    return rows


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Ratios of ours to each peer: median and spread over repeats of the time, median of the memory."""
    import torch
    import trl

    wide = rows.pivot(index=["what", "vocabulary", "repeat"], columns="way", values=["seconds", "MB", "loss"])
    found = []
    for (what, vocabulary), group in wide.groupby(level=[0, 1]):
        for peer in ("naive", "trl"):
            time_, memory = (group[k]["ours"] / group[k][peer] for k in ("seconds", "MB"))
            row = {
                "what": what,
                "vocabulary": vocabulary,
                "ours against": peer,
            }
            row |= {
                "repeats": time_.count(),
                "time": time_.median(),
                "time, from": time_.min(),
                "time, to": time_.max(),
            }
            row |= {"memory": memory.median(), "ours, s": group["seconds"]["ours"].median()}
            apart = (group["loss"]["ours"] - group["loss"][peer]).abs().max()
            found.append(row | {"losses apart": apart})
    table = pd.DataFrame(found)
    assert (table["losses apart"] < 1e-4).all(), "the losses disagree"
    versions = f"torch {torch.__version__}, trl {trl.__version__}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, {versions}"
    return table.assign(machine=machine)


if __name__ == "__main__":
    main()
