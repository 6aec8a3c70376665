"""A small suite for models too small for public benchmarks: two tasks made from held-out text.

* `pico_cloze`: which of four words of about the same frequency stands in the gap? A choice is the word and the rest of
  its sentence, so what comes after the gap counts too.
* `pico_next`: how does the next sentence go on? Its first words are given; the wrong endings, of about the same length,
  are those of sentences from elsewhere in the same group of documents (the same service's documentation, the same
  file), so the subject alone gives nothing away.

Chance is 25 % in both. The tasks are ordinary task files of the lm-evaluation-harness beside their data: a folder that
any of its users can run. They are made of text, not of tokens, so models of all tokenizers answer the same questions.
Equal corpora give equal files.
"""

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import StageError

ITEMS = 500  # questions a task: a standard error of about 2 points
LEAST_ITEMS = 50
CHOICES = 4
CONTEXT = 220  # characters before the question at most: with the choice, under 128 tokens of a vocabulary of 1,024
SENTENCE = (40, 140)  # characters of a sentence that is asked about
REST = 50  # characters of a sentence after its gap that a choice repeats
NEAR = 1.3  # choices of `pico_next` differ in length by no more than this factor
BAND = 40  # a gap's wrong words are among so many neighbours in the order of frequency, on either side
SEED = 20231107

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n+")
_WORD = re.compile(r"(?<!\S)[A-Za-z]{4,}(?![\w'’-])")


@dataclass(frozen=True)
class Sentence:
    """One sentence of held-out text with what came before it in its document."""

    text: str
    before: str
    group: str
    document: int


def build_suite(documents: Sequence[dict[str, Any]], out: Path, *, items: int = ITEMS) -> dict[str, int]:
    """Writes `pico_cloze` and `pico_next` (a YAML and a JSON-lines file each) to `out`; returns how many questions.

    Args:
        documents: held-out texts, each `{"text", "group"}`.
        out: an existing folder.
        items: questions a task, at most.

    Raises:
        StageError: the text holds too few sentences that can be asked about.
    """
    found = list(sentences(documents))
    random.Random(SEED).shuffle(found)
    counts = {}
    for task, questions in (("pico_cloze", cloze(found)), ("pico_next", next_sentence(found))):
        kept = list(itertools.islice(questions, items))
        if len(kept) < LEAST_ITEMS:
            raise StageError(
                f"the held-out text yields only {len(kept)} questions for {task} (at least {LEAST_ITEMS} are needed). "
                "Give more text or a larger corpus.test, or evaluate with evaluate=perplexity."
            )
        _write(task, kept, out)
        counts[task] = len(kept)
    return counts


def sentences(documents: Sequence[dict[str, Any]]) -> Iterator[Sentence]:
    """The sentences of a fitting length that follow another one in their document."""
    for number, document in enumerate(documents):
        parts = [p.strip() for p in _SENTENCE_END.split(document["text"]) if p.strip()]
        for i, text in enumerate(parts):
            before = " ".join(parts[:i])[-CONTEXT:]
            if i and SENTENCE[0] <= len(text) <= SENTENCE[1] and len(before) >= SENTENCE[0]:
                yield Sentence(
                    text, before.partition(" ")[2] if len(before) == CONTEXT else before, document["group"], number
                )


def cloze(found: Sequence[Sentence]) -> Iterator[dict[str, Any]]:
    """One gap a sentence: a lower-case word beyond its first, with wrong words about as frequent as the right one."""
    frequency = Counter(w for s in found for w in _WORD.findall(s.text) if w.islower())
    ranked = [w for w, n in sorted(frequency.items(), key=lambda p: (-p[1], p[0])) if n > 1]
    rank = {w: i for i, w in enumerate(ranked)}
    rng = random.Random(SEED)
    for s in found:
        gaps = [m for m in _WORD.finditer(s.text) if m.start() > 0 and m[0] in rank]
        if not gaps:
            continue
        gap = rng.choice(gaps)
        at, right = rank[gap[0]], gap[0]
        near = [w for w in ranked[max(0, at - BAND) : at + BAND + 1] if w != right]
        if len(near) < CHOICES - 1:
            continue
        head, rest = s.text[: gap.start()].rstrip(), s.text[gap.end() :][:REST]
        yield _question(f"{s.before} {head}", right, rng.sample(near, CHOICES - 1), rng, rest=rest)


def next_sentence(found: Sequence[Sentence]) -> Iterator[dict[str, Any]]:
    """Each sentence's ending against three endings of its length, from other documents of its group."""
    rng = random.Random(SEED)
    groups: dict[str, list[tuple[int, str]]] = {}
    for s in found:
        groups.setdefault(s.group, []).append((s.document, _parted(s.text)[1]))
    for s in found:
        head, ending = _parted(s.text)
        others = {
            other
            for document, other in groups[s.group]
            if document != s.document and other != ending and 1 / NEAR <= len(other) / len(ending) <= NEAR
        }
        if len(others) >= CHOICES - 1:
            yield _question(f"{s.before} {head}", ending, rng.sample(sorted(others), CHOICES - 1), rng)


def _parted(text: str) -> tuple[str, str]:
    """A sentence's first third of words, and the rest."""
    words = text.split()
    cut = max(1, len(words) // 3)
    return " ".join(words[:cut]), " ".join(words[cut:]) or text


def _question(context: str, right: str, wrong: list[str], rng: random.Random, *, rest: str = "") -> dict[str, Any]:
    answer = rng.randrange(CHOICES)
    choices = [*wrong[:answer], right, *wrong[answer:]]
    return {"context": context, "choices": [c + rest for c in choices], "answer": answer}


# Whole sentences differ in how likely they are in themselves: what counts is how much the context adds.
METRICS = {"pico_cloze": "acc", "pico_next": "acc_mutual_info"}
TASK_FILE = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {task}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
num_fewshot: 0
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def _write(task: str, questions: list[dict[str, Any]], out: Path) -> None:
    lines = (json.dumps(q, ensure_ascii=False) + "\n" for q in questions)
    (out / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    task_file = TASK_FILE.format(task=task, metric=METRICS[task])
    (out / f"{task}.yaml").write_text(task_file, encoding="utf-8")
