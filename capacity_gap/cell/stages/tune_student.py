"""The stages `instruct` (supervised fine-tuning) and `prefer` (DPO), which follow distillation."""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.shared import METRICS, RESULT, ignored_in_training
from capacity_gap.instruct.rows import PAIR, PAIRS, TALK, TRAIN, read_rows
from capacity_gap.instruct.tune_config import TuneConfig
from capacity_gap.instruct.tuning_checks import check_lengths, check_settings
from capacity_gap.settings.errors import StageError
from capacity_gap.settings.hashing import identity_fields
from capacity_gap.store.files import write_json
from capacity_gap.store.stage import Stage, StageRun

log = logging.getLogger(__name__)
TUNED = ("epochs", "batch_size", "learning_rate", "warmup", "max_length", "lora_rank")


def tuning_stages(
    cell: ResolvedCell, student: Stage, tokenizer: Stage, instructions: Stage, tokens: Stage
) -> dict[str, Stage]:
    """What becomes of the distilled student, by stage: fine-tuned on conversations, then on preferences."""
    c, found = cell.config, {}
    if c.instruct.wanted:
        micro = c.train.micro_batch_size
        check_settings(c.instruct, c.prefer, cell.student_shape, family=c.family.name, micro_batch=micro)
        inputs = {"model": student, "tokenizer": tokenizer, "instructions": instructions}
        if c.instruct.replay:
            inputs["tokens"] = tokens
        found["instruct"] = _tuning_stage(cell, "instruct", c.instruct, inputs, instruct)
    if c.prefer.wanted:
        inputs = {"model": found["instruct"], "instructions": instructions}
        found["prefer"] = _tuning_stage(cell, "prefer", c.prefer, inputs, prefer)
    return found


def _tuning_stage(
    cell: ResolvedCell,
    name: str,
    config: TuneConfig,
    inputs: Mapping[str, Stage],
    compute: Callable[[StageRun], None],
) -> Stage:
    kept = {k: v for k, v in identity_fields(config).items() if k not in ("count", "held_out", "answer_tokens")}
    given = {**kept, "seed": cell.config.seed, "precision": cell.config.train.precision}
    given["threads"] = cell.config.train.threads
    given |= ignored_in_training(cell, cell.student_shape)
    return Stage(name, 2, given, inputs, compute, options=cell.how_trained)


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
    from capacity_gap.instruct.tuning import Tuning

    if run.runtime.ranks.size > 1:
        raise StageError(
            f"{run.digest}: instruction tuning runs in one process, but there are {run.runtime.ranks.size} ranks. Run "
            "the same command without torchrun: the earlier stages are in the store."
        )
    if run.runtime.sharding != "none":
        log.warning(
            "train.sharding=%s applies to distillation only: tuning does not shard the model", run.runtime.sharding
        )
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
