"""Claim: expressive scores cost no more time and memory than Torch-Pruning's Taylor importance on the same model.

    pip install torch-pruning
    python -m benchmarks.pruning [--repeats 5] [--out results/pruning_speed.csv]      about five minutes on two cores

A Llama of 32M parameters, 8 batches of 4 × 256 tokens. Each measurement is a fresh process, the two in turn: seconds of
scoring, and how far the process's peak memory rises above the loaded model. Theirs: gradients of every batch, the
dependency graph, and the importance of every group; ours: gradients of masks, a batch at a time.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
VOCABULARY, BATCHES, BATCH, LENGTH = 8192, 8, 4, 256


def _setting():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **SIZES)).eval()
    return model, torch.randint(0, VOCABULARY, (BATCHES, BATCH, LENGTH + 1))


def ours(model, batches) -> int:
    """Expressive scores; returns how many units were scored."""
    from capacity_gap.pruning import expressive_scores

    scores = expressive_scores(model, batches)
    return scores.heads.numel() + scores.neurons.numel() + scores.hidden.numel()


def theirs(model, batches) -> int:
    """Taylor importance of every group that Torch-Pruning finds."""
    import torch
    import torch_pruning

    for tokens in batches:
        logits = model(tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    model.config.use_cache = False
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs={"input_ids": batches[0][:1, :8]}, output_transform=lambda out: out.logits
    )
    importance = torch_pruning.importance.GroupTaylorImportance()
    scored = 0
    for group in graph.get_all_groups(root_module_types=[torch.nn.Linear]):
        scored += len(importance(group))
    return scored


def measure(name: str) -> dict:
    """Seconds and megabytes of one way, in this process."""
    model, batches = _setting()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    units = {"ours": ours, "theirs": theirs}[name](model, batches)
    seconds = time.perf_counter() - began
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"way": name, "seconds": seconds, "MB": rise, "units": units}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="CSV for the summary")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only)))
        return
    rows = []
    for repeat in range(given.repeats):
        for name in ("ours", "theirs") if repeat % 2 else ("theirs", "ours"):
            command = [sys.executable, "-m", "benchmarks.pruning", "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"repeat": repeat, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    wide = pd.DataFrame(rows).pivot(index="repeat", columns="way", values=["seconds", "MB"])
    ratios = pd.DataFrame({k: wide[k]["ours"] / wide[k]["theirs"] for k in ("seconds", "MB")})
    table = ratios.agg(["median", "min", "max"]).T.rename(index={"seconds": "time, ours / theirs", "MB": "peak memory"})
    print(table.to_string(float_format="{:.2f}".format))
    import torch
    import torch_pruning

    versions = f"torch {torch.__version__}, torch-pruning {torch_pruning.__version__}"
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {versions}")
    if given.out:
        table.to_csv(given.out, float_format="%.3g")


if __name__ == "__main__":
    main()
