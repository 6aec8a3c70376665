"""Question: is a score a reliable sign of what losing a unit costs? Rank correlation of each with the measured loss.

    python -m benchmarks.unit_removal STORE [--out results/unit_removal.csv]     about fifteen minutes on one core

Takes the teachers of `sweeps/pruning_methods.yaml` from the store. Each head, each hidden dimension and 160 neurons
drawn at random are removed by a mask, one at a time; the rise of the loss on held-out text is correlated (Spearman)
with every score, layer by layer for heads and neurons as the scores are used, and averaged over layers.
"""

import argparse
import contextlib
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from benchmarks.grid import compose
from capacity_gap.cell import pipeline
from capacity_gap.data import packing
from capacity_gap.models.axes import architecture, dims
from capacity_gap.models.loading import load_model
from capacity_gap.pruning.hooks import layers_of
from capacity_gap.pruning.lm_loss import lm_loss
from capacity_gap.pruning.methods import SCORES
from capacity_gap.runtime.process import Runtime
from capacity_gap.store.stage import Store

FAMILIES, TEACHER, SEEDS = ("pico", "pico_neox"), "270k", (0, 1, 2)
NEURONS = 40  # a layer
SEQUENCES, BATCHES = 48, 32


@contextlib.contextmanager
def without(model, axis: str, layer: int, unit: int):
    """The model as if the unit were not there: its activations are zero wherever they are read."""
    table, sizes = architecture(model.config), dims(model.config)
    hooks = []
    width = {"heads": sizes.head_dim * sizes.group, "neurons": 1, "hidden": 1}[axis]
    gone = slice(unit * width, (unit + 1) * width)

    def zero(tensor):
        tensor = tensor.clone()
        tensor[..., gone] = 0
        return tensor

    def after(_m, _i, output):
        return (zero(output[0]), *output[1:]) if isinstance(output, tuple) else zero(output)

    if axis == "hidden":
        norms = [m for n, m in model.named_modules() if type(m).__name__.endswith("Norm")]
        (stack,) = table.stacks
        layers = layers_of(model, table, sizes)
        sublayers = [m.get_submodule(s.module) for m in layers for s in (*stack.attentions, stack.mlp)]
        hooks = [m.register_forward_hook(after) for m in [model.get_input_embeddings(), *norms, *sublayers]]
    else:
        inside = model.get_submodule(table.unit_maps(axis, sizes.layers)[layer].removesuffix(".weight"))
        hooks = [inside.register_forward_pre_hook(lambda _m, inputs: (zero(inputs[0]), *inputs[1:]))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def losses(model, tokens) -> float:
    return float(lm_loss(model, tokens))


def measure(model, held_out, batches, seed: int) -> dict[tuple[str, str], float]:
    """Spearman's ρ of every score with the rise of the loss, by (score, axis)."""
    sizes = dims(model.config)
    rng = np.random.default_rng(seed)
    units = {
        "heads": [(layer, u) for layer in range(sizes.layers) for u in range(sizes.kv_heads)],
        "neurons": [
            (layer, int(u))
            for layer in range(sizes.layers)
            for u in rng.choice(sizes.neurons, min(NEURONS, sizes.neurons), replace=False)
        ],
        "hidden": [(0, u) for u in range(sizes.hidden)],
    }
    whole = losses(model, held_out)
    rise: dict[str, dict[tuple[int, int], float]] = {}
    for axis, which in units.items():
        rise[axis] = {}
        for layer, unit in which:
            with without(model, axis, layer, unit):
                rise[axis][layer, unit] = losses(model, held_out) - whole
    found = {}
    for method, score in SCORES.items():
        scores = score(model, batches, seed=seed)
        for axis, which in rise.items():
            rhos = []
            for layer in sorted({at for at, _ in which}):
                mine = [u for at, u in which if at == layer]
                given = getattr(scores, axis)
                values = given[mine] if axis == "hidden" else given[layer][mine]
                rhos.append(spearmanr(values.numpy(), [which[layer, u] for u in mine]).statistic)
            found[method, axis] = float(np.mean(rhos))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--out", type=Path, help="CSV for the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    store, rows = Store(given.store), []
    for family in FAMILIES:
        for seed in SEEDS:
            sweep = ["family.teacher_data=1m", "student=135k", f"teacher={TEACHER}", f"family={family}"]
            cell = pipeline.resolve(compose([*sweep, f"teacher_seed={seed}", f"store={store.root}"]))
            model = load_model(store.compute(cell.teacher, Runtime()))
            folder = store.path(cell.tokens)
            text = {s: packing.Packed(folder / s, 128) for s in ("train", "validation")}
            held_out = torch.from_numpy(text["validation"].batch(np.arange(SEQUENCES)))
            chosen = packing.subset(text["train"], BATCHES * 8 * 128).reshape(BATCHES, 8)
            batches = [torch.from_numpy(text["train"].batch(part)) for part in chosen]
            for (method, axis), rho in measure(model, held_out, batches, seed).items():
                rows.append({"family": family, "teacher_seed": seed, "score": method, "axis": axis, "rho": rho})
            print(family, seed, flush=True)
    frame = pd.DataFrame(rows)
    table = frame.groupby(["family", "axis", "score"])["rho"].agg(["mean", "min", "max"]).reset_index()
    print(table.to_string(index=False, float_format="{:.2f}".format))
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.3f")


if __name__ == "__main__":
    main()
