"""Claim: a checkpoint is cut with a fraction of its size in memory, and a 7B is planned to 3B in a moment.

    python -m benchmarks.surgery [--out results/surgery.csv]      about a minute; 2.4 GB of disk meanwhile

Random weights of a Llama of 0.6 billion parameters (fp32, shards of 200 MB), cut to about half in a fresh process whose
peak memory is measured, libraries included. And LLaMA2-7B's shape, on no device, shrunk to 3 billion parameters.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 18,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "tie_word_embeddings": False,
}
SHARD = 200e6


def write_checkpoint(folder: Path) -> int:
    """Random weights in shards; returns their bytes."""
    import torch
    from safetensors.torch import save_file

    from capacity_gap.models.axes import architecture, dims

    table, sizes = architecture(CONFIG), dims(CONFIG)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    listing, shard, total = {}, {}, 0

    def flush() -> None:
        file = f"model-{len(list(folder.glob('*.safetensors'))):05d}.safetensors"
        save_file(shard, folder / file)
        listing.update(dict.fromkeys(shard, file))
        shard.clear()

    for pattern, axes in table.parameters.items():
        for layer in range(sizes.layers) if "{i}" in pattern else (0,):
            tensor = torch.randn([sizes.axis(a) for a in axes])
            shard[pattern.replace("{i}", str(layer))] = tensor
            total += tensor.nbytes
            if sum(t.nbytes for t in shard.values()) > SHARD:
                flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listing}))
    return total


def cut(folder: Path, out: Path) -> dict:
    """Cuts the checkpoint in this process; returns seconds and peak bytes."""
    import torch

    from capacity_gap.models.axes import dims
    from capacity_gap.pruning.scores import Scores
    from capacity_gap.pruning.shape import choose_shape
    from capacity_gap.pruning.surgery import prune_checkpoint

    sizes = dims(CONFIG)
    shapes = ((sizes.layers, sizes.kv_heads), (sizes.layers, sizes.neurons), (sizes.hidden,))
    scores = Scores(*(torch.rand(s) for s in shapes), method="random")
    shape = choose_shape(CONFIG, 300_000_000)
    began = time.perf_counter()
    out.mkdir()
    prune_checkpoint(folder, scores, shape, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - began, "peak": peak, "student_params": shape.params}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV for the row")
    parser.add_argument("--cut", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cut:
        print(json.dumps(cut(*given.cut)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "teacher"
        size = write_checkpoint(folder)
        command = [sys.executable, "-m", "benchmarks.surgery", "--cut", str(folder), str(Path(place) / "student")]
        done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    from capacity_gap.models.ladders import FAMILIES
    from capacity_gap.pruning.shape import choose_shape

    began = time.perf_counter()
    planned = choose_shape(FAMILIES["llama2"].rungs["7b"], 3_000_000_000, depth=24)
    row = {
        "checkpoint, GB": size / 1e9,
        "student, parameters": done["student_params"],
        "seconds": done["seconds"],
        "peak memory, GB": done["peak"] / 1e9,
        "peak / checkpoint": done["peak"] / size,
        "7B to 3B planned, s": time.perf_counter() - began,
        "3B, parameters": planned.params,
        "3B, shape": f"{planned.layers}x{planned.hidden}x{planned.heads}x{planned.neurons}",
    }
    table = pd.DataFrame([row])
    print(table.T.to_string(header=False))
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
