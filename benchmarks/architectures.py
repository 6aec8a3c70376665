"""Claim: decoders of these types are cut along every axis from tables that are proved, not believed.

    python -m benchmarks.architectures [--out results/architectures.csv] [--only gemma3_text]     about a minute

For each type, with tied and untied embeddings, `capacity_gap.pruning.proof.prove` builds a small model of its structure
and tries every claim of its table (docs/decoders.md says which). A type whose table cannot be derived is listed with
the reason. The exit status is 1 if a check fails that is not listed in `KNOWN`.
"""

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from capacity_gap.models.axes import architecture
from capacity_gap.models.defaults import completed
from capacity_gap.settings.errors import ConfigError

TYPES = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo"),
    *("olmo2", "olmo3", "smollm3", "granite", "starcoder2", "stablelm", "cohere", "cohere2", "glm", "glm4", "exaone4"),
    *("nemotron", "helium", "arcee", "seed_oss", "hunyuan_v1_dense", "ernie4_5", "apertus", "internlm3", "nanochat"),
    *("persimmon", "gpt2", "gpt_neox", "gptj", "codegen", "opt", "bloom", "mpt", "gpt_bigcode", "biogpt"),
    *("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe"),
)
# What published models of a type say and its class does not assume.
PUBLISHED: Mapping[str, dict[str, Any]] = {
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 128},
    "cohere": {"use_qk_norm": True},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
    "stablelm": {"use_qkv_bias": True},
}
CHECKS = ("hidden", "heads", "neurons", "experts", "layers", "sites", "permuted", "head", "reload", "generation")
COLUMNS = ("type", "tied", "table", "count", *CHECKS, "why")
KNOWN: dict[tuple[str, str], str] = {}  # (type, check) → why it does not hold


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the table goes")
    parser.add_argument("--only", help="one type")
    given = parser.parse_args(words)
    table = pd.DataFrame(rows([given.only] if given.only else TYPES), columns=COLUMNS)
    print(table.to_string(index=False))
    if given.out:
        table.to_csv(given.out, index=False)
    failed = {(row["type"], name) for _, row in table.iterrows() for name, held in row.items() if held == "fails"}
    return int(bool(failed - KNOWN.keys()))


def rows(types: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each type and each way to have its output matrix."""
    from capacity_gap.models.axes import is_written
    from capacity_gap.pruning.proof import prove

    for kind in types:
        for tied in (False, True):
            config = completed({"model_type": kind, **PUBLISHED.get(kind, {}), "tie_word_embeddings": tied})
            row = {"type": kind, "tied": tied, "table": "written" if is_written(config) else "derived"}
            table = architecture(config)
            if table.uncut:
                yield row | {"table": "none", "why": table.uncut}
                break
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found = prove(config)
                except ConfigError as error:
                    yield row | {"why": str(error)}
                    continue
            why = "; ".join(f"{c.name}: {KNOWN.get((kind, c.name)) or c.said}" for c in found if not c.held)
            yield row | {c.name: "holds" if c.held else "fails" for c in found} | {"why": why}


if __name__ == "__main__":
    raise SystemExit(main())
