"""Answers of instructed models, graded by another model behind any OpenAI-compatible endpoint.

Single answers get 1 to 10; pairs are shown twice, each answer first once, and won only if both showings agree (Zheng et
al. 2023, arXiv 2306.05685, who found judges to favour a position). What it would cost is said before anything is asked.
Every judgement is appended to a file under a hash of what was asked, so a judge that was interrupted goes on and the
same question is never paid for twice. The key is read from the environment and goes nowhere but to the endpoint.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_gap.errors import UserError
from capacity_gap.fingerprint import fingerprint

QUESTIONS = Path(__file__).with_name("questions.jsonl")
MAX_TOKENS = 512  # of a judgement
CHARACTERS_PER_TOKEN = 4.0  # of English, for the estimate of the cost
SINGLE = """You grade the answers of an assistant. Judge whether they are correct, helpful, complete and as short
as the questions allow; where a reference is given, what contradicts it is wrong. Say in two sentences what is
good and what is not. Then end with one line: SCORE: n, where n is a whole number from 1 (useless) to 10 (could
not be better)."""
PAIR = """You compare two assistants, A and B, who answered the same questions. Judge correctness first, then
helpfulness, completeness and brevity; where a reference is given, what contradicts it is wrong. Neither the order
in which they are shown nor their length is a reason. Say in two sentences what decides. Then end with one line:
VERDICT: A, or VERDICT: B, or VERDICT: TIE."""
_SCORE = re.compile(r"SCORE:\s*\**\s*(10|[1-9])\b")
_VERDICT = re.compile(r"VERDICT:\s*\**\s*(A|B|TIE)\b")

Ask = Callable[[list[dict[str, str]]], tuple[str, int, int]]  # messages → text, tokens read, tokens written


@dataclass(frozen=True)
class Question:
    """One question of two or more turns, with a reference where there is a right answer."""

    id: str
    category: str
    turns: tuple[str, ...]
    reference: str | None = None


@dataclass(frozen=True)
class Request:
    """One thing to ask the judge; `swapped`: the second model's answer is shown first."""

    question: Question
    messages: tuple[dict[str, str], ...]
    swapped: bool = False

    def key(self, judge: str) -> str:
        """What the judgement is kept under: the judge, and every word that it is shown."""
        return fingerprint({"judge": judge, "messages": list(self.messages), "max_tokens": MAX_TOKENS})


@dataclass(frozen=True)
class Cost:
    """What is still to be asked, and what it comes to."""

    asked: int
    cached: int
    tokens_in: int
    tokens_out: int  # at most
    price: float  # at most, in the currency of the prices

    def __str__(self) -> str:
        return (
            f"{self.asked} judgements to ask, {self.cached} in the cache; about {self.tokens_in:,} tokens in, at most "
            f"{self.tokens_out:,} out, at most {self.price:.2f} at the prices given"
        )


def read_questions(file: Path = QUESTIONS) -> list[Question]:
    """Questions from JSON lines: `id, category, turns, reference`."""
    return [
        Question(row["id"], row["category"], tuple(row["turns"]), row.get("reference"))
        for row in _read_lines(file, ("id", "category", "turns"))
    ]


def read_answers(file: Path) -> dict[str, list[str]]:
    """Answers from JSON lines `{"id", "answers": [one a turn]}`, by question."""
    return {row["id"]: row["answers"] for row in _read_lines(file, ("id", "answers"))}


def _read_lines(file: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    if not file.is_file():
        raise UserError(f"{file} is no file. Give JSON lines with the fields {', '.join(needed)}.")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(row | {n: row[n] for n in needed})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number}: not a JSON object with {', '.join(needed)}.") from error
    return rows


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
        self.file, self.found = file, {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.found[row["key"]] = row

    def add(self, row: dict[str, Any]) -> None:
        """Appends one judgement, and makes sure that it is on the disk: it was paid for."""
        whole = not self.file.exists() or self.file.read_bytes()[-1:] in (b"\n", b"")
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(("" if whole else "\n") + json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.found[row["key"]] = row


def cost(asked: Sequence[Request], judge: str, cache: Cache, price: Sequence[float] = (0.0, 0.0)) -> Cost:
    """What the requests that are not in the cache come to; `price` is per million tokens, in and out."""
    left = [r for r in asked if r.key(judge) not in cache.found]
    tokens_in = sum(math.ceil(len(m["content"]) / CHARACTERS_PER_TOKEN) for r in left for m in r.messages)
    tokens_out = MAX_TOKENS * len(left)
    return Cost(
        len(left), len(asked) - len(left), tokens_in, tokens_out, (tokens_in * price[0] + tokens_out * price[1]) / 1e6
    )


def judge_all(asked: Sequence[Request], judge: str, cache: Cache, ask: Ask) -> list[str]:
    """The judge's words on every request, asking only for those that the cache lacks."""
    for request in asked:
        if (key := request.key(judge)) not in cache.found:
            text, tokens_in, tokens_out = ask(list(request.messages))
            cache.add(
                {
                    "key": key,
                    "question": request.question.id,
                    "swapped": request.swapped,
                    "judge": judge,
                    "text": text,
                    "tokens_in": tokens_in,
                    "tokens_out": tokens_out,
                }
            )
    return [cache.found[r.key(judge)]["text"] for r in asked]


def grade(text: str) -> int | None:
    """The last `SCORE: n` of a judgement; None if it gives none."""
    found = _SCORE.findall(text.upper())
    return int(found[-1]) if found else None


def verdict(text: str, *, swapped: bool) -> str | None:
    """`first`, `second` or `tie`, whichever way they were shown; None if the judgement names none."""
    found = _VERDICT.findall(text.upper())
    if not found:
        return None
    if found[-1] == "TIE":
        return "tie"
    return "first" if (found[-1] == "A") != swapped else "second"


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


def endpoint(url: str, model: str, key_env: str) -> Ask:
    """A function that asks the judge; greedy, so that it says the same again.

    Raises:
        UserError: the client is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise UserError("judging needs the openai client: pip install 'capacity_gap[judge]'.") from error
    client = openai.OpenAI(base_url=url, api_key=os.environ.get(key_env) or "none", max_retries=3, timeout=120.0)

    def ask(messages: list[dict[str, str]]) -> tuple[str, int, int]:
        try:
            said = client.chat.completions.create(
                model=model,
                messages=messages,
                temperature=0.0,
                max_tokens=MAX_TOKENS,
            )
        except openai.OpenAIError as error:
            raise UserError(
                f"the judge {model} at {url} does not answer: {type(error).__name__}. What it has said so far is kept; "
                f"check --endpoint, --model and the key in ${key_env}, and start the same command again."
            ) from None  # the client's own message may quote the key
        used = said.usage
        return (
            said.choices[0].message.content or "",
            used.prompt_tokens if used else 0,
            used.completion_tokens if used else 0,
        )

    return ask


def run(given: Any) -> int:
    """What the command does: answers, then the cost, then with --yes the judge, then the summary."""
    from capacity_gap.stage import write_json

    if len(given.answers) > 2:
        raise UserError(f"{len(given.answers)} models are given. Allowed: one (single grades) or two (pairs).")
    questions = read_questions(given.questions or QUESTIONS)
    given.out.mkdir(parents=True, exist_ok=True)
    answers = [_answers(Path(a), questions, given.out) for a in given.answers]
    asked, cache = requests(questions, answers), Cache(given.out / "judgements.jsonl")
    print(cost(asked, given.model, cache, given.price))
    if not given.yes:
        print("Nothing was asked: add --yes.")
        return 0
    summary = summarise(
        asked, judge_all(asked, given.model, cache, endpoint(given.endpoint, given.model, given.key_env))
    )
    write_json(given.out / "summary.json", {"judge": given.model, "answers": given.answers, **summary})
    print(_report(summary))
    return 0


def _answers(source: Path, questions: Sequence[Question], out: Path) -> dict[str, list[str]]:
    """Answers from a file, or a model folder's, which are kept so that they are not generated again."""
    if source.suffix == ".jsonl":
        return read_answers(source)
    from capacity_gap.evaluate.answers import answer_all

    return answer_all(source, questions, out)


def _report(summary: Mapping[str, Any]) -> str:
    rows = [("all", summary), *summary["by_category"].items()]
    lines = [f"{summary['kind']:<16}{'value':>8}{'± s.e.':>8}{'n':>5}"]
    for name, row in rows:
        value, stderr = ("–" if v is None else f"{v:.3f}" for v in (row["value"], row["stderr"]))
        lines.append(f"{name:<16}{value:>8}{stderr:>8}{row['count']:>5}")
    if summary["unreadable"]:
        lines.append(f"{summary['unreadable']} questions left out: the judge gave no readable verdict")
    return "\n".join(lines)
