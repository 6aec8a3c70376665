"""The stage `answers`: a model's answers to the held-out instructions, and their scores in a record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.shared import RESULT, read_result
from capacity_gap.instruct.rows import TALK, TEST, by_task, read_rows, share
from capacity_gap.store.files import write_json
from capacity_gap.store.stage import Stage, StageRun


def answers_stage(cell: ResolvedCell, model: Stage, tokenizer: Stage, instructions: Stage) -> Stage:
    """A model's answers to the held-out instructions."""
    given = {"answer_tokens": cell.config.instruct.answer_tokens, "threads": cell.config.train.threads}
    inputs = {"model": model, "tokenizer": tokenizer, "instructions": instructions}
    return Stage("answers", 1, given, inputs, answer_questions)


def answer_questions(run: StageRun) -> None:
    """How one model answers the held-out instructions: exactly; and whether it prefers the right answer."""
    from capacity_gap.instruct import chat
    from capacity_gap.models.loading import load_model

    rows = read_rows(run.inputs["instructions"] / TEST, "instruct.path", TALK)
    model, tokenizer = (
        load_model(run.inputs["model"], device=run.runtime.device),
        chat.chat_tokenizer(run.inputs["tokenizer"]),
    )
    said = chat.answers(
        model,
        tokenizer,
        [row["messages"][:-1] for row in rows],
        most=run.config["answer_tokens"],
        on_batch=lambda done, total: run.runtime.report(done, total, "answers"),
    )
    hits = [given == row["messages"][-1]["content"].strip() for given, row in zip(said, rows, strict=True)]
    found = {name: share(mine) for name, mine in by_task(hits, rows).items()}
    if all("rejected" in row for row in rows):
        right = chat.answer_logprobs(model, tokenizer, [row["messages"] for row in rows])
        wrong = chat.answer_logprobs(model, tokenizer, [_with_answer(row, row["rejected"]) for row in rows])
        found["preference"] = share((right > wrong).tolist())
        found["log_ratio"] = chat.mean((right - wrong).double())
    write_json(run.out / RESULT, found)
    samples = [
        {"prompt": row["messages"][-2]["content"], "answer": row["messages"][-1]["content"], "said": given}
        for row, given in zip(rows[:50], said, strict=False)
    ]
    write_json(run.out / "samples.json", samples)


def _with_answer(row: Mapping[str, Any], answer: str) -> list[dict[str, str]]:
    return [*row["messages"][:-1], {"role": "assistant", "content": answer}]


def answer_scores(inputs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The entries of a record's `metrics` on the answers of each model of a cell (`inputs`: those of its record)."""
    found: dict[str, dict[str, Any]] = {}
    models = {"constant": "instructions"} | {m: f"answers_{m}" for m in ("base", "instruct", "prefer")}
    for model, name in models.items():
        if folder := inputs.get(name):
            for metric, score in read_result(folder).items():
                found[f"{metric}/{model}"] = score
    for stage in ("instruct", "prefer"):
        if folder := inputs.get(stage):
            said = read_result(folder)
            names = {"shortened": f"rows_shortened/{stage}", "dropped": f"rows_dropped/{stage}"}
            names |= {f"margin_{end}": f"reward_margin/{end}" for end in ("start", "end")}
            found |= {names[k]: {"value": said[k], "stderr": None, "shots": 0} for k in names if k in said}
    return found
