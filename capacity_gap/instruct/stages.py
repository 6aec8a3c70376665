"""The stages after distillation: instructions, fine-tuning, preferences, answers; `pipeline.py` puts them in order.

Every function takes a `StageRun` and writes its result to `run.out`.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capacity_gap.data.corpus import read_texts
from capacity_gap.errors import ConfigError
from capacity_gap.instruct.checks import check_lengths
from capacity_gap.instruct.rows import PAIR, TALK, by_task, constant_hits, read_rows, share
from capacity_gap.instruct.templates import instructions as from_templates
from capacity_gap.stage import StageRun, write_json
from capacity_gap.steps import METRICS, RESULT

log = logging.getLogger(__name__)
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
        rows = read_rows(Path(files["path"]), "instruct.path", TALK)
        tune, held_out = rows[: -given["held_out"]], rows[-given["held_out"] :]
    if files["pairs_path"]:
        pairs = read_rows(Path(files["pairs_path"]), "prefer.path", PAIR)
    _check_counts(given, tune, held_out, pairs)
    for name, rows in ((TRAIN, tune), (TEST, held_out), (PAIRS, pairs)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (run.out / name).write_text("".join(lines), encoding="utf-8")
    constant = by_task(constant_hits(tune, held_out), held_out)
    write_json(run.out / RESULT, {name: share(hits) for name, hits in constant.items()})


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


def instruct(run: StageRun) -> None:
    """The student, fine-tuned on conversations."""
    from capacity_gap.instruct.chat import chat_tokenizer, encoded
    from capacity_gap.instruct.tuning import fine_tune
    from capacity_gap.models.loading import load_model

    given, tokenizer = run.config, chat_tokenizer(run.inputs["tokenizer"])
    talks = [row["messages"] for row in read_rows(run.inputs["instructions"] / TRAIN, "instruct.path", TALK)]
    found = encoded(tokenizer, talks, given["max_length"])
    check_lengths(found.dropped, len(talks), "instruct", given["max_length"])
    model, points = fine_tune(
        load_model(run.inputs["model"], device=run.runtime.device),
        tokenizer,
        [*found.rows, *_replayed(run, found.rows)],
        _tuning(run),
        packing=given["packing"],
        neftune=given["neftune"],
        runtime=run.runtime,
        scratch=run.checkpoint,
    )
    _save(run, model, tokenizer, points, {"shortened": found.shortened, "dropped": found.dropped})


def _replayed(run: StageRun, rows: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """Sequences of the corpus, `replay` tokens for each token of the conversations: what keeps general language."""
    if not (replay := run.config.get("replay", 0.0)):
        return []
    from capacity_gap.data.packing import Packed, subset

    length = run.config["max_length"]
    packed = Packed(run.inputs["tokens"] / "train", length)
    tokens = round(replay * sum(len(row["input_ids"]) for row in rows))
    ids = packed.batch(subset(packed, tokens, key="instruct.replay, in tokens"))[:, :-1].tolist()
    return [{"input_ids": sequence, "labels": sequence} for sequence in ids]


def prefer(run: StageRun) -> None:
    """The fine-tuned student, optimised on pairs of answers."""
    from capacity_gap.instruct.chat import chat_tokenizer, pairs_that_fit
    from capacity_gap.instruct.tuning import prefer as optimise
    from capacity_gap.models.loading import load_model

    given, tokenizer = run.config, chat_tokenizer(run.inputs["model"])
    rows = read_rows(run.inputs["instructions"] / PAIRS, "prefer.path", PAIR)
    kept = pairs_that_fit(tokenizer, rows, given["max_length"])
    check_lengths(len(rows) - len(kept), len(rows), "prefer", given["max_length"])
    model, reference = (
        load_model(run.inputs["model"], device=run.runtime.device) if wanted else None
        for wanted in (True, not given["lora_rank"])  # with adapters the model without them is the reference
    )
    model, points = optimise(
        model,
        reference,
        tokenizer,
        [
            {"prompt": row["messages"], **{k: [{"role": "assistant", "content": row[k]}] for k in PAIR[1:]}}
            for row in kept
        ],
        _tuning(run),
        beta=given["beta"],
        runtime=run.runtime,
        scratch=run.checkpoint,
    )
    _save(run, model, tokenizer, points, {"dropped": len(rows) - len(kept)})


def _tuning(run: StageRun) -> Any:
    from capacity_gap.errors import StageError
    from capacity_gap.instruct.tuning import Tuning

    if run.runtime.ranks.size > 1:
        raise StageError(
            f"{run.digest}: instruction tuning runs in one process, and here are {run.runtime.ranks.size} ranks. Start "
            "the same command without torchrun: the stages before it are in the store."
        )
    if run.runtime.sharding != "none":
        log.warning("train.sharding=%s is for distillation: tuning keeps the model whole", run.runtime.sharding)
    given = run.config
    return Tuning(
        **{name: given[name] for name in TUNED},
        seed=given["seed"],
        precision=given["precision"],
        micro_batch=run.options["micro_batch_size"] or given["batch_size"],
        activation_checkpointing=run.options["activation_checkpointing"],
    )


def _save(run: StageRun, model: Any, tokenizer: Any, points: list[dict], lost: Mapping[str, int]) -> None:
    from capacity_gap.models.loading import save_model

    save_model(model, run.out)
    tokenizer.save_pretrained(run.out)
    (run.out / METRICS).write_text("".join(json.dumps(point) + "\n" for point in points))
    write_json(run.out / RESULT, {"steps": points[-1]["step"], **lost, **_margins(points)})


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


def scores(inputs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What a record's `metrics` say of the answers of each model of a cell (`inputs`: those of its record)."""
    found: dict[str, dict[str, Any]] = {}
    models = {"constant": "instructions"} | {m: f"answers_{m}" for m in ("base", "instruct", "prefer")}
    for model, name in models.items():
        if folder := inputs.get(name):
            for metric, score in json.loads((folder / RESULT).read_text()).items():
                found[f"{metric}/{model}"] = score
    for stage in ("instruct", "prefer"):
        if folder := inputs.get(stage):
            said = json.loads((folder / RESULT).read_text())
            names = {"shortened": f"rows_shortened/{stage}", "dropped": f"rows_dropped/{stage}"}
            names |= {f"margin_{end}": f"reward_margin/{end}" for end in ("start", "end")}
            found |= {names[k]: {"value": said[k], "stderr": None, "shots": 0} for k in names if k in said}
    return found
