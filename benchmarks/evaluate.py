"""Claim: the harness adds a small part of what it adds when called with its defaults.

    python -m benchmarks.evaluate [--repeats 5] [--out results/evaluate.csv]      about five minutes

A cell is scored on the embedded suite twice, in turn: with our calls (only the folder of its tasks is indexed;
`evaluate`), and with `simple_evaluate` and its defaults (all task files are indexed; the environment is collected). The
questions are few and the model tiny, so that what is measured is the overhead; the scores of both ways are compared.
Every way runs once before it is measured, since caches of the data sets and imports are the same for both.
"""

import argparse
import contextlib
import io
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import pandas as pd

from capacity_gap.data.tokenizer import load_tokenizer, train_tokenizer
from capacity_gap.evaluate.harness import score_tasks
from capacity_gap.evaluate.suite import build_suite
from capacity_gap.evaluate.tasks import GENERATED, Task
from capacity_gap.models.ladders import family
from capacity_gap.models.loading import new_model

QUESTIONS = 10


def prose() -> list[dict[str, str]]:
    """Python's own language reference, in documents of six paragraphs."""
    from pydoc_data.topics import topics

    parts = "\n\n".join(topics[t] for t in sorted(topics)[:40]).split("\n\n")
    texts = [" ".join(" ".join(parts[i : i + 6]).split()) for i in range(0, len(parts), 6)]
    return [{"text": text, "group": f"part {i % 3}"} for i, text in enumerate(texts)]


def ours(model: Any, tokenizer: Any, folder: Path) -> list[float]:
    found = score_tasks(model, tokenizer, [Task(n) for n in GENERATED], folder=folder, batch_size=8, limit=QUESTIONS)
    return [s.value for s in found]


def usual(model: Any, tokenizer: Any, folder: Path) -> list[float]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.chdir(folder), contextlib.redirect_stderr(io.StringIO()):
        manager = TaskManager(include_path=str(folder))
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        found = simple_evaluate(lm, tasks=list(GENERATED), task_manager=manager, limit=QUESTIONS)
    rows = [found["results"][name] for name in GENERATED]
    return [next(v for k, v in row.items() if "," in k) for row in rows]


def timed(way: Callable[..., list[float]], *arguments: Any) -> tuple[float, list[float]]:
    began = time.perf_counter()
    scores = way(*arguments)
    return time.perf_counter() - began, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="CSV for the summary")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, documents = Path(scratch), prose()
        build_suite(documents, folder, items=60)
        train_tokenizer([d["text"] for d in documents], 1024, folder / "tokenizer")
        model, tokenizer = new_model(family("pico").rungs["55k"], 0).eval(), load_tokenizer(folder / "tokenizer")
        arguments, rows = (model, tokenizer, folder), []
        assert ours(*arguments) == usual(*arguments), "both ways give the same scores"
        for _ in range(given.repeats):
            (mine, _), (theirs, _) = timed(ours, *arguments), timed(usual, *arguments)
            rows.append({"ours": mine, "simple_evaluate": theirs, "ratio": theirs / mine})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows).agg(["median", "min", "max"]).T
    table.index = ["ours, s a cell", "simple_evaluate with defaults, s a cell", "ratio"]
    print(table.to_string(float_format="{:.2f}".format))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}")
    if given.out:
        table.to_csv(given.out, float_format="%.3g")


if __name__ == "__main__":
    main()
