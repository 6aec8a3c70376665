"""Answers of instructed models, graded by another model behind any OpenAI-compatible endpoint.

Single answers get 1 to 10; pairs are shown twice, each answer first once, and won only if both showings agree (Zheng et
al. 2023, arXiv 2306.05685, who found judges to favour a position). The cost is shown before any request is sent.
Every whole judgement is appended to a file under a hash of what was asked, so a judge that was interrupted goes on and
no judgement is paid for twice; a reply that is empty or was cut off is none, and is asked again.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_gap.judge import jsonl
from capacity_gap.judge.endpoint import MAX_TOKENS, Ask, endpoint
from capacity_gap.judge.questions import QUESTIONS, Question, read_answers, read_questions
from capacity_gap.settings.errors import UserError
from capacity_gap.settings.hashing import fingerprint

CHARACTERS_PER_TOKEN = 4.0  # of English, for the estimate of the cost
SINGLE = """You grade the answers of an assistant. Judge whether they are correct, helpful, complete and as short
as the questions allow; where a reference is given, what contradicts it is wrong. Say in two sentences what is
good and what is not. Then end with one line: SCORE: n, where n is a whole number from 1 (useless) to 10 (could
not be better)."""
PAIR = """You compare two assistants, A and B, who answered the same questions. Judge correctness first, then
helpfulness, completeness and brevity; where a reference is given, what contradicts it is wrong. Neither the order
in which they are shown nor their length is a reason. Say in two sentences what decides. Then end with one line:
VERDICT: A, or VERDICT: B, or VERDICT: TIE."""
_MARKUP = re.compile(r"\\boxed|[*_`#\"{}\[\]]")
_IN_BRACKETS = re.compile(r"\[\[([^\[\]]*)\]\]")  # MT-Bench's own form
_SCORE = re.compile(r"(10|[1-9])(?:\.0)?(?:\s*(?:/|OUT OF)\s*10)?")
_VERDICT = re.compile(r"(?:ASSISTANT\s+)?(A|B)|(?:A\s+)?(TIE)|(C)")  # C: a tie, in MT-Bench


@dataclass(frozen=True)
class Request:
    """One thing to ask the judge; `swapped`: the second model's answer is shown first."""

    question: Question
    messages: tuple[dict[str, str], ...]
    swapped: bool = False

    def key(self, judge: str, max_tokens: int = MAX_TOKENS) -> str:
        """What the judgement is kept under: the judge, and every word that it is shown."""
        return fingerprint({"judge": judge, "messages": list(self.messages), "max_tokens": max_tokens})


@dataclass(frozen=True)
class Cost:
    """The requests that remain, and their cost."""

    asked: int
    cached: int
    tokens_in: int
    tokens_out: int  # at most
    price: float  # at most, in the currency of the prices

    def __str__(self) -> str:
        return (
            f"{self.asked} judgements to request, {self.cached} in the cache; about {self.tokens_in:,} tokens in, at "
            f"most {self.tokens_out:,} out, at most {self.price:.2f} at the given prices"
        )


def requests(questions: Sequence[Question], answers: Sequence[Mapping[str, list[str]]]) -> list[Request]:
    """What to ask: a grade a question for one model's answers, two showings a question for those of two.

    Raises:
        UserError: a question has no answer.
    """
    for number, given in enumerate(answers, 1):
        if missing := [q.id for q in questions if len(given.get(q.id, [])) != len(q.turns)]:
            raise UserError(f"model {number} lacks answers (one a turn) to: {', '.join(missing)}.")
    if len(answers) == 1:
        return [Request(q, _messages(SINGLE, q, {"the assistant": answers[0][q.id]})) for q in questions]
    first, second = answers
    found = []
    for q in questions:
        found.append(Request(q, _messages(PAIR, q, {"A": first[q.id], "B": second[q.id]})))
        found.append(Request(q, _messages(PAIR, q, {"A": second[q.id], "B": first[q.id]}), swapped=True))
    return found


def _messages(task: str, question: Question, answers: Mapping[str, list[str]]) -> tuple[dict[str, str], ...]:
    parts = []
    for turn, asked in enumerate(question.turns):
        parts.append(f"### Question {turn + 1}\n{asked}")
        parts += [f"### Answer {turn + 1} of {who}\n{given[turn]}" for who, given in answers.items()]
    if question.reference:
        parts.append(f"### Reference\n{question.reference}")
    return ({"role": "system", "content": task}, {"role": "user", "content": "\n\n".join(parts)})


class Cache:
    """Judgements in a file, one JSON object a line; a line that a crash cut off is as if never written."""

    def __init__(self, file: Path) -> None:
        self.file = file
        whole = jsonl.read_whole(file, ("key", "text"))
        self.found = {row["key"]: row for row in whole if str(row["text"] or "").strip()}

    def add(self, row: dict[str, Any]) -> None:
        """Appends one judgement."""
        jsonl.append(self.file, row)
        self.found[row["key"]] = row


def cost(
    asked: Sequence[Request],
    judge: str,
    cache: Cache,
    price: Sequence[float] = (0.0, 0.0),
    *,
    max_tokens: int = MAX_TOKENS,
) -> Cost:
    """The cost of the requests that are not in the cache; `price` is per million tokens, in and out."""
    left = [r for r in asked if r.key(judge, max_tokens) not in cache.found]
    tokens_in = sum(math.ceil(len(m["content"]) / CHARACTERS_PER_TOKEN) for r in left for m in r.messages)
    tokens_out = max_tokens * len(left)
    return Cost(
        len(left), len(asked) - len(left), tokens_in, tokens_out, (tokens_in * price[0] + tokens_out * price[1]) / 1e6
    )


def judge_all(
    asked: Sequence[Request], judge: str, cache: Cache, ask: Ask, *, max_tokens: int = MAX_TOKENS
) -> list[str]:
    """The judge's words on every request, asking only for those that the cache lacks; "" where it gave none whole."""
    for request in asked:
        key = request.key(judge, max_tokens)
        if key in cache.found or not (reply := ask(list(request.messages))).whole:
            continue
        cache.add(
            {
                "key": key,
                "question": request.question.id,
                "swapped": request.swapped,
                "judge": judge,
                "text": reply.text,
                "tokens_in": reply.tokens_in,
                "tokens_out": reply.tokens_out,
            }
        )
    return [cache.found.get(r.key(judge, max_tokens), {"text": ""})["text"] for r in asked]


def grade(text: str) -> int | None:
    """The last `SCORE: n` of a judgement; None if it gives none, or anything but a whole number from 1 to 10."""
    found = _SCORE.fullmatch(_stated(text, "SCORE"))
    return int(found[1]) if found else None


def verdict(text: str, *, swapped: bool) -> str | None:
    """`first`, `second` or `tie`, whichever way they were shown; None if the judgement names none."""
    found = _VERDICT.fullmatch(_stated(text, "VERDICT"))
    if not found:
        return None
    return "tie" if not found[1] else "first" if (found[1] == "A") != swapped else "second"


def _stated(text: str, what: str) -> str:
    """What follows the last `what:` up to the end of its line, else stands in the last `[[…]]`; without markup."""
    _, found, after = re.sub(rf"{what}\s*[:=]", f"{what}:", _MARKUP.sub("", text).upper()).rpartition(f"{what}:")
    if not found:
        return (_IN_BRACKETS.findall(text) or [""])[-1].strip().upper()
    return after.strip().partition("\n")[0].strip(" .\r")


def summarise(asked: Sequence[Request], texts: Sequence[str]) -> dict[str, Any]:
    """Grades, or wins, in numbers: over all questions and by category, each with its count and standard error."""
    if any(r.swapped for r in asked):
        points = _pair_points(asked, texts)
        kind = "win_rate"  # of the first model: a tie is half a win
    else:
        points = [(r.question, grade(t)) for r, t in zip(asked, texts, strict=True)]
        kind = "rating"
    kept = [(q, float(p)) for q, p in points if p is not None]
    by = {c: [p for q, p in kept if q.category == c] for c in dict.fromkeys(q.category for q, _ in kept)}
    return {
        "kind": kind,
        **_mean([p for _, p in kept]),
        "unreadable": len(points) - len(kept),
        "by_category": {c: _mean(values) for c, values in by.items()},
    }


def _pair_points(asked: Sequence[Request], texts: Sequence[str]) -> list[tuple[Question, float | None]]:
    """1 for a win of the first model in both showings, 0 for a loss in both, ½ for anything else."""
    showings: dict[str, list[str | None]] = {}
    questions = {r.question.id: r.question for r in asked}
    for request, text in zip(asked, texts, strict=True):
        showings.setdefault(request.question.id, []).append(verdict(text, swapped=request.swapped))
    worth = {("first", "first"): 1.0, ("second", "second"): 0.0}
    return [
        (questions[i], None if None in v else worth.get((v[0] or "", v[1] or ""), 0.5)) for i, v in showings.items()
    ]


def _mean(values: Sequence[float]) -> dict[str, Any]:
    n = len(values)
    if not n:
        return {"value": None, "stderr": None, "count": 0}
    mean = sum(values) / n
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    return {"value": mean, "stderr": spread, "count": n}


def run(given: Any) -> int:
    """What the command does: the cost; then with --yes the answers that are missing, the judge and the summary."""
    from capacity_gap.store.files import write_json

    if len(given.answers) > 2:
        raise UserError(f"{len(given.answers)} models were given. Allowed: one (single grades) or two (pairs).")
    questions = read_questions(given.questions or QUESTIONS)
    cache = Cache(given.out / "judgements.jsonl")
    said = {"judge": given.model, "cache": cache, "max_tokens": given.max_tokens}
    known = [_known(Path(a), questions, given.out) for a in given.answers]
    print(cost(requests(questions, [a for a, _ in known]), price=given.price, **said))
    if left := sum(missing for _, missing in known):
        print(f"{left} answers must be generated here ({given.device}), counted above at their maximum length.")
    if not given.yes:
        print("No request was sent: add --yes.")
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    ask = endpoint(given.endpoint, given.model, given.key_env, max_tokens=given.max_tokens)
    asked = requests(questions, [_answers(Path(a), questions, given) for a in given.answers])
    if left:
        print(cost(asked, price=given.price, **said))
    texts = judge_all(asked, ask=ask, **said)
    summary = summarise(asked, texts)
    write_json(given.out / "summary.json", {"judge": given.model, "answers": given.answers, **summary})
    print(_report(summary))
    if cut := texts.count(""):
        print(
            f"{cut} replies were empty or cut off and are not kept. A reasoning judge needs more than --max-tokens "
            f"{given.max_tokens}."
        )
    return 0


def _known(source: Path, questions: Sequence[Question], out: Path) -> tuple[dict[str, list[str]], int]:
    """The answers that are there, those of a model that are not in the longest form they may take, and how many."""
    if source.suffix == ".jsonl":
        return read_answers(source), 0
    from capacity_gap.judge.answers import MAX_NEW_TOKENS, answers_file, kept_answers

    longest = "x" * round(MAX_NEW_TOKENS * CHARACTERS_PER_TOKEN)
    found = kept_answers(answers_file(source, questions, out))
    missing = {q.id: [longest] * len(q.turns) for q in questions if q.id not in found}
    return missing | found, len(missing)


def _answers(source: Path, questions: Sequence[Question], given: Any) -> dict[str, list[str]]:
    """Answers from a file, or a model folder's, which are kept so that they are not generated again."""
    if source.suffix == ".jsonl":
        return read_answers(source)
    from capacity_gap.judge.answers import answer_all
    from capacity_gap.runtime.process import resolve_device

    return answer_all(source, questions, given.out, device=resolve_device(given.device))


def _report(summary: Mapping[str, Any]) -> str:
    rows = [("all", summary), *summary["by_category"].items()]
    lines = [f"{summary['kind']:<16}{'value':>8}{'± s.e.':>8}{'n':>5}"]
    for name, row in rows:
        value, stderr = ("–" if v is None else f"{v:.3f}" for v in (row["value"], row["stderr"]))
        lines.append(f"{name:<16}{value:>8}{stderr:>8}{row['count']:>5}")
    if summary["unreadable"]:
        lines.append(f"{summary['unreadable']} questions left out: the verdict could not be parsed")
    return "\n".join(lines)
