"""The stages after distillation: instructions, fine-tuning, preferences, answers; `pipeline.py` puts them in order.

Every function takes a `StageRun` and writes its result to `run.out`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from capacity_gap.data.corpus import read_texts
from capacity_gap.errors import ConfigError
from capacity_gap.instruct.templates import instructions as from_templates
from capacity_gap.stage import StageRun, write_json
from capacity_gap.steps import METRICS, RESULT

TRAIN, TEST, PAIRS = "instruct.jsonl", "test.jsonl", "pairs.jsonl"
SEED = 20240611  # of the instructions, which all cells share
TUNED = ("epochs", "batch_size", "learning_rate", "warmup", "max_length", "lora_rank")


def instructions(run: StageRun) -> None:
    """Conversations to train on, others held out, and pairs of a better and a worse answer."""
    given, files = run.config, run.options
    held_out = from_templates(read_texts(run.inputs["corpus"], "test"), given["held_out"], SEED)
    number = given["count"] + given["pairs"]
    made = from_templates(read_texts(run.inputs["corpus"], "train"), number, SEED + 1, apart_from=held_out)
    tune, pairs = made[: given["count"]], [_pair(row) for row in made[given["count"] :]]
    if files["path"]:
        rows = read_rows(Path(files["path"]), "instruct.path", ("messages",))
        tune, held_out = rows[: -given["held_out"]], rows[-given["held_out"] :]
    if files["pairs_path"]:
        pairs = read_rows(Path(files["pairs_path"]), "prefer.path", ("messages", "chosen", "rejected"))
    _check_counts(given, tune, held_out, pairs)
    for name, rows in ((TRAIN, tune), (TEST, held_out), (PAIRS, pairs)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (run.out / name).write_text("".join(lines), encoding="utf-8")


def _check_counts(given: Mapping[str, Any], tune: list, held_out: list, pairs: list) -> None:
    if not tune or not held_out or len(tune) < given["count"] or len(pairs) < given["pairs"]:
        raise ConfigError(
            f"found: {len(tune)} conversations to train on, {len(held_out)} held out, {len(pairs)} pairs; asked for: "
            f"{given['count']}, {given['held_out']}, {given['pairs']}. Ask for fewer (instruct.count, "
            "instruct.held_out, prefer.count), or give more text."
        )


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    *before, answer = row["messages"]
    return {"messages": before, "chosen": answer["content"], "rejected": row["rejected"]}


def read_rows(file: Path, key: str, fields: Iterable[str]) -> list[dict[str, Any]]:
    """The rows of a `.jsonl` file, each of which must have these fields."""
    with file.expanduser().open(encoding="utf-8") as lines:
        return [_row(line, f"{key}={file}, line {number}", fields) for number, line in enumerate(lines, 1)]


def _row(line: str, place: str, fields: Iterable[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place} is no JSON: {error}. Each line is one object.") from error
    if not isinstance(row, dict) or (lacking := [f for f in fields if f not in row]):
        said = ", ".join(lacking) if isinstance(row, dict) else "fields"
        raise ConfigError(f"{place} has no {said}. Each needs {', '.join(fields)}.")
    roles = [turn.get("role") for turn in row["messages"]]
    if set(roles) - {"user", "assistant"} or (roles[-1:] == ["user"]) != ("chosen" in row):
        raise ConfigError(
            f"{place} has the roles {roles}. Allowed are user and assistant; a conversation ends with the assistant's "
            "turn, the messages of a pair with the user's."
        )
    return row


def instruct(run: StageRun) -> None:
    """The student, fine-tuned on conversations."""
    from capacity_gap.instruct.chat import chat_tokenizer
    from capacity_gap.instruct.tuning import fine_tune
    from capacity_gap.models.loading import load_model

    given, tokenizer = run.config, chat_tokenizer(run.inputs["tokenizer"])
    model, points = fine_tune(
        load_model(run.inputs["model"], device=run.runtime.device),
        tokenizer,
        read_rows(run.inputs["instructions"] / TRAIN, "instruct.path", ("messages",)),
        _tuning(run),
        packing=given["packing"],
        neftune=given["neftune"],
        runtime=run.runtime,
        scratch=run.checkpoint,
    )
    _save(run, model, tokenizer, points)


def prefer(run: StageRun) -> None:
    """The fine-tuned student, optimised on pairs of answers."""
    from capacity_gap.instruct.chat import chat_tokenizer
    from capacity_gap.instruct.tuning import prefer as optimise
    from capacity_gap.models.loading import load_model

    rows = read_rows(run.inputs["instructions"] / PAIRS, "prefer.path", ("messages", "chosen", "rejected"))
    pairs = [
        {"prompt": row["messages"], **{k: [{"role": "assistant", "content": row[k]}] for k in ("chosen", "rejected")}}
        for row in rows
    ]
    tokenizer = chat_tokenizer(run.inputs["model"])
    model, points = optimise(
        load_model(run.inputs["model"], device=run.runtime.device),
        load_model(run.inputs["model"], device=run.runtime.device),
        tokenizer,
        pairs,
        _tuning(run),
        beta=run.config["beta"],
        runtime=run.runtime,
        scratch=run.checkpoint,
    )
    _save(run, model, tokenizer, points)


def _tuning(run: StageRun) -> Any:
    from capacity_gap.errors import StageError
    from capacity_gap.instruct.tuning import Tuning

    if run.runtime.ranks.size > 1:
        raise StageError(
            f"{run.digest}: instruction tuning runs in one process, and here are {run.runtime.ranks.size} ranks. Start "
            "the same command without torchrun: the stages before it are in the store."
        )
    given = run.config
    return Tuning(
        **{name: given[name] for name in TUNED},
        seed=given["seed"],
        precision=given["precision"],
        micro_batch=run.options["micro_batch_size"] or given["batch_size"],
    )


def _save(run: StageRun, model: Any, tokenizer: Any, points: list[dict]) -> None:
    from capacity_gap.models.loading import save_model

    save_model(model, run.out)
    tokenizer.save_pretrained(run.out)
    (run.out / METRICS).write_text("".join(json.dumps(point) + "\n" for point in points))
    write_json(run.out / RESULT, {"steps": points[-1]["step"], **_margins(points)})


def _margins(points: list[dict]) -> dict[str, float]:
    """Mean reward margins of the first and last tenth of the logged points, of a run that has any."""
    margins = [p["rewards/margins"] for p in points if "rewards/margins" in p]
    part = max(1, len(margins) // 10)
    ends = {"margin_start": margins[:part], "margin_end": margins[-part:]}
    return {name: sum(found) / len(found) for name, found in ends.items() if found}


def answers(run: StageRun) -> None:
    """How one model answers the held-out instructions: exactly; and whether it prefers the right answer."""
    from capacity_gap.instruct import chat
    from capacity_gap.models.loading import load_model

    rows = read_rows(run.inputs["instructions"] / TEST, "instruct.path", ("messages",))
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
    found = {"exact_match": chat.share(hits)}
    for task in sorted({row["task"] for row in rows if "task" in row}):
        mine = [hit for hit, row in zip(hits, rows, strict=True) if row.get("task") == task]
        found[f"exact_match/{task}"] = chat.share(mine)
    if all("rejected" in row for row in rows):
        right = chat.answer_logprobs(model, tokenizer, [row["messages"] for row in rows])
        wrong = chat.answer_logprobs(model, tokenizer, [_with_answer(row, row["rejected"]) for row in rows])
        found["preference"] = chat.share((right > wrong).tolist())
        gap = (right - wrong).double()
        stderr = float(gap.std() / len(gap) ** 0.5)
        found["log_ratio"] = {"value": float(gap.mean()), "stderr": stderr, "shots": 0}
    write_json(run.out / RESULT, found)
    samples = [
        {"prompt": row["messages"][-2]["content"], "answer": row["messages"][-1]["content"], "said": given}
        for row, given in zip(rows[:50], said, strict=False)
    ]
    write_json(run.out / "samples.json", samples)


def _with_answer(row: Mapping[str, Any], answer: str) -> list[dict[str, str]]:
    return [*row["messages"][:-1], {"role": "assistant", "content": answer}]


def scores(inputs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What a record's `metrics` say of the answers of each model of a cell (`inputs`: those of its record)."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("base", "instruct", "prefer"):
        if folder := inputs.get(f"answers_{name}"):
            for metric, score in json.loads((folder / RESULT).read_text()).items():
                found[f"{metric}/{name}"] = score
    if folder := inputs.get("prefer"):
        ends = json.loads((folder / RESULT).read_text())
        for end in ("start", "end"):
            found[f"reward_margin/{end}"] = {"value": ends[f"margin_{end}"], "stderr": None, "shots": 0}
    return found
