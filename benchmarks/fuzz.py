"""Are damaged and hostile files refused in one paragraph?

    python -m benchmarks.fuzz --minutes 10 --out results/fuzz.csv

Each round changes one file that people bring (bytes flipped, cut, doubled; JSON values replaced) and lets the code read
it that a run would read it with. Allowed is that it is read, or that it is refused as a user's error. A seed and a kind
give the same rounds again. Exit status 1 if anything else came out.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from capacity_gap.cell.config import from_dict
from capacity_gap.cell.pipeline import resolve
from capacity_gap.commands import cli
from capacity_gap.commands.explain import paragraph
from capacity_gap.data.documents import text_documents
from capacity_gap.evaluate.tasks import folder_tasks, foreign_members, foreign_metrics, unsafe_names
from capacity_gap.instruct.rows import PAIR, TALK, read_rows
from capacity_gap.judge.jsonl import read_given
from capacity_gap.models.building import check_builds
from capacity_gap.models.folders import checkpoint_family
from capacity_gap.records.load import load

HANG_S = 20
NASTY: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    10**15,
    10**400,
    "",
    "x",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    1e300,
    float("nan"),
    float("-inf"),
    "llama",
    "\u0000",
]


TASK = """\
group: mine
tag: [t]
include: base.yaml
metadata: &a {x: [1, 2], y: 1.5}
doc_to_text: !function own.text
task:
  - task: inner
    metric_list: [{metric: acc}, {metric: other, hf_evaluate: true}]
    metadata: *a
  - group: deeper
    task: [arc_easy, inner]
"""
SWEEP = """\
# @package _global_
defaults:
  - override /prune: magnitude
student: 50k
seed: ${teacher_seed}
train: {batch_size: 8, learning_rate: 1e-3}
corpus: {sequence_length: 64}
hydra:
  sweeper:
    params:
      teacher: 80k,120k
      data: 0,10k
"""


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content of a file with something wrong in it."""
    ways = [_flipped, _cut, _doubled, _spliced, _json_changed, _json_changed, _json_changed]
    for _ in range(rng.randint(1, 3)):
        content = rng.choice(ways)(content, rng)
    return content


def _flipped(content: bytes, rng: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        if found:
            found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _doubled(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[max(0, at - rng.randint(1, 40)) :]


def _spliced(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    odd = [
        b"\xff",
        b"\xef\xbb\xbf",
        b"\0",
        b"[" * 5000,
        b"NaN",
        b"9" * 5000,
        "\u2028é".encode(),
        b'"',
        b"\r",
        b"\x1b[2J",
    ]
    return content[:at] + rng.choice(odd) + content[at:]


def _json_changed(content: bytes, rng: random.Random) -> bytes:
    """One value anywhere in the JSON replaced, or a key lost; files of lines line by line."""
    lines = content.splitlines() if content.count(b"\n{") else [content]
    at = rng.randrange(len(lines)) if lines else 0
    try:
        value = json.loads(lines[at])
    except (ValueError, IndexError, RecursionError):
        return _flipped(content, rng)
    places = list(_places(value))
    if not places:
        return json.dumps(rng.choice(NASTY)).encode()
    part, key = rng.choice(places)
    if isinstance(part, dict) and rng.random() < 0.3:
        del part[key]
    else:
        part[key] = rng.choice(NASTY)
    lines[at] = json.dumps(value).encode()
    return b"\n".join(lines)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(inside)[:200]:
        yield value, key
        yield from _places(part)


def examples(folder: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """The files that are changed, by kind, each with what reads it."""
    from pydoc_data.topics import topics

    from capacity_gap.data.tokenizer import train_tokenizer
    from capacity_gap.models.ladders import family
    from capacity_gap.models.loading import load_model, new_model, published_tokenizer

    texts = [topics[t] for t in sorted(topics)][:20]
    model, tasks = folder / "model", folder / "tasks"
    made = new_model({**family("pico").rungs["55k"], "vocab_size": 512}, seed=0)
    made.save_pretrained(model)
    train_tokenizer(texts, 512, model)

    def read_model() -> None:
        ladder = checkpoint_family([str(model)])
        check_builds(model, ladder.rungs["model"])
        tokenizer = published_tokenizer(str(model))
        tokenizer("some text")
        load_model(model)
        for words in ({"student": "30k", "teacher": str(model)}, {"student": str(model), "teacher": str(model)}):
            resolve(from_dict({**words, "data": "0", "store": str(folder / "store")}))

    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    files = {
        "text.txt": "\n\n".join(texts).encode(),
        "text.jsonl": b"\n".join(json.dumps({"text": t}).encode() for t in texts),
        "rows.jsonl": b"\n".join(json.dumps({"messages": turns}).encode() for _ in range(5)),
        "pairs.jsonl": b"\n".join(
            json.dumps({"messages": turns[:1], "chosen": "a", "rejected": "b"}).encode() for _ in range(5)
        ),
        "runs.csv": b"student_params,teacher_params,loss,seed\n"
        + b"\n".join(
            f"{s},{t},{4 - s / 1e6 + (t / s - 2.5) ** 2 / 50},0".encode()
            for s in (50_000, 90_000)
            for t in (1e5, 2e5, 3e5, 4e5)
        ),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    tasks.mkdir()
    (tasks / "task.yaml").write_text(TASK)
    (folder / "sweeps").mkdir()
    (folder / "sweeps/mine.yaml").write_text(SWEEP)
    (folder / "answers.jsonl").write_text("".join(f'{{"id": "{n}", "answers": ["a", "b"]}}\n' for n in range(5)))

    def read_tasks() -> None:
        folder_tasks(tasks)
        unsafe_names(tasks)
        foreign_metrics(tasks, ["acc"])
        foreign_members(tasks)

    def read_sweep() -> None:
        _command("plan", "--config-dir", str(folder), "+sweeps=mine", f"store={folder / 'store'}")

    (folder / "law.json").write_text(json.dumps(_law(folder / "runs.csv")))
    return {
        **{name: (model / name, read_model) for name in sorted(p.name for p in model.glob("*.json"))},
        "model.safetensors": (model / "model.safetensors", read_model),
        "text.txt": (folder / "text.txt", lambda: list(text_documents(folder / "text.txt"))),
        "text.jsonl": (folder / "text.jsonl", lambda: list(text_documents(folder / "text.jsonl"))),
        "rows.jsonl": (folder / "rows.jsonl", lambda: read_rows(folder / "rows.jsonl", "instruct.path", TALK)),
        "pairs.jsonl": (folder / "pairs.jsonl", lambda: read_rows(folder / "pairs.jsonl", "prefer.path", PAIR)),
        "runs.csv": (
            folder / "runs.csv",
            lambda: (load(folder / "runs.csv"), _command("fit", str(folder / "runs.csv"))),
        ),
        "task.yaml": (tasks / "task.yaml", read_tasks),
        "sweep.yaml": (folder / "sweeps/mine.yaml", read_sweep),
        "answers.jsonl": (folder / "answers.jsonl", lambda: read_given(folder / "answers.jsonl", ("id", "answers"))),
        "law.json": (
            folder / "law.json",
            lambda: _command("recommend", "--student", "60k", "--family", "pico", "--fit", str(folder / "law.json")),
        ),
    }


def _law(table: Path) -> Any:
    from capacity_gap.fit import fit_law

    return json.loads(fit_law(load(table)).to_json())


def _command(*words: str) -> None:
    """A command; its own refusal is as good as an error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        cli.main(list(words))


class Hang(BaseException):
    """A round took too long."""


def outcome(read: Callable[[], object]) -> tuple[str, str]:
    """`read`, `refused`, `traceback` or `hang`, and what was said."""

    def ring(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG_S)
    try:
        read()
    except Hang:
        return "hang", ""
    except Exception as error:
        if (said := paragraph(error)) is not None:
            return "refused", said
        return "traceback", "".join(traceback.format_exception(error)[-4:])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return "read", ""


def rounds(kind: str, file: Path, read: Callable[[], object], *, seed: int, until: Callable[[int], bool]) -> Counter:
    """Changes one file again and again; prints what is not allowed, with the round that shows it."""
    whole, counts = file.read_bytes(), Counter[str]()
    number = 0
    while not until(number):
        rng = random.Random(f"{seed} {kind} {number}")
        file.write_bytes(mutated(whole, rng))
        result, said = outcome(read)
        counts[result] += 1
        if result not in ("read", "refused"):
            print(f"{kind}, seed {seed}, round {number}: {result}\n{said}", flush=True)
        number += 1
    file.write_bytes(whole)
    return counts


def main() -> int:
    """Fuzzes every kind for its share of the time, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rounds", type=int, help="of each kind, instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="capacity_gap-fuzz-"))
    rows = []
    try:
        kinds = {k: v for k, v in examples(folder).items() if given.only in (None, k)}
        for kind, (file, read) in kinds.items():
            end = time.monotonic() + 60 * given.minutes / len(kinds)
            until = (lambda n: n >= given.rounds) if given.rounds else (lambda n, end=end: time.monotonic() > end)
            with contextlib.redirect_stderr(io.StringIO()):
                counts = rounds(kind, file, read, seed=given.seed, until=until)
            rows.append((kind, counts))
            print(f"{kind:<24} {dict(counts)}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    names = ("read", "refused", "traceback", "hang")
    if given.out:
        lines = [
            ",".join(("file", "seed", *names)),
            *(",".join([k, str(given.seed), *(str(c[n]) for n in names)]) for k, c in rows),
        ]
        given.out.write_text("\n".join(lines) + "\n")
    return int(any(c["traceback"] or c["hang"] for _, c in rows))


if __name__ == "__main__":
    sys.exit(main())
