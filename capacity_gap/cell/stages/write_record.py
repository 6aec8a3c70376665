"""The stage `record`: the row of one cell, from what its stages left."""

import json
from collections.abc import Mapping
from typing import Any

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.answer_questions import answer_scores
from capacity_gap.cell.stages.shared import read_history, read_result
from capacity_gap.models.axes import count_params
from capacity_gap.records import RECORD, SCHEMA_VERSION, Record
from capacity_gap.runtime.process import provenance
from capacity_gap.settings.hashing import file_digest
from capacity_gap.store.files import META, write_json
from capacity_gap.store.stage import Stage, StageRun


def record_stage(cell: ResolvedCell, inputs: Mapping[str, Stage]) -> Stage:
    """The row of this cell."""
    registered = cell.config.registration
    options = {"registration": file_digest(registered, key="registration")} if registered else {}
    return Stage("record", 1, cell.description, inputs, write_record, options=options)


def write_record(run: StageRun) -> None:
    """The row of one cell, from what its stages left."""
    trained = read_result(run.inputs["trained"]) if run.config["data_tokens"] else {}
    student, teacher, start = (
        read_result(run.inputs[name]) for name in ("evaluate", "evaluate_teacher", "evaluate_init")
    )
    made = json.loads((run.inputs["trained"] / META).read_text())
    history = read_history(run.inputs["trained"]) if trained else []
    metrics, harness = _metrics(run, "student")
    vocabulary = run.inputs.get("vocabulary")
    spent = read_result(vocabulary) if vocabulary else None
    row = {
        "schema_version": SCHEMA_VERSION,
        "cell": run.digest,
        "status": "done",
        **run.config,
        "registration": run.options.get("registration"),
        "stored_params": count_params(json.loads((run.inputs["trained"] / "config.json").read_text())),
        "trained": run.inputs["trained"].name,
        "held_out_tokens": student["test"]["tokens"],
        "student_loss": student["test"]["loss"],
        "student_loss_stderr": student["test"]["stderr"],
        "student_bits_per_byte": student["test"]["bits_per_byte"],
        "student_loss_ood": student["ood"]["loss"],
        "student_loss_validation": student["validation"]["loss"] if "validation" in student else None,
        "teacher_loss": teacher["test"]["loss"],
        "teacher_loss_ood": teacher["ood"]["loss"],
        "teacher_entropy": teacher["test"]["entropy"],
        "init_loss": start["test"]["loss"],
        "expanded_tokens": spent["tokens"]["after"] if spent else None,
        "second_bytes_per_token_before": spent["before"]["second"] if spent else None,
        "second_bytes_per_token": spent["after"]["second"] if spent else None,
        "tuned_loss": _tuned_loss(run),
        "train_ce": _tail_mean(history, "ce"),
        "train_kl": _tail_mean(history, "kl"),
        "metrics": metrics | _tuned_metrics(run) | answer_scores(run.inputs),
        "teacher_metrics": _metrics(run, "teacher")[0],
        "tokens_per_s": trained.get("tokens_per_s"),
        "mfu": trained.get("mfu"),
        "signal_bytes_per_token": trained.get("signal_bytes_per_token"),
        "wall_s": made["wall_s"] + _trunk_seconds(run),
        "peak_memory_bytes": trained.get("peak_memory_bytes"),
        "micro_batch": trained.get("micro_batch"),
        **{k: made[k] for k in ("device", "threads", "ranks", "git_commit")},
        "versions": made["versions"] | harness,
        "created": provenance(run.runtime)["created"],
    }
    write_json(run.out / RECORD, Record.of(row).to_dict())


def _trunk_seconds(run: StageRun) -> float:
    """What the parts of the trunk took that the student is a branch of: it would have taken that by itself too."""
    parts = [folder for name, folder in run.inputs.items() if name.startswith("trunk_")]
    return sum(json.loads((part / META).read_text())["wall_s"] for part in parts)


def _metrics(run: StageRun, whose: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What the benchmarks gave, as a record holds it, and the releases of the harness if there were any."""
    from capacity_gap.evaluate.task_scores import Score, as_metrics

    folders = [folder for name, folder in run.inputs.items() if name.startswith(f"{whose}_benchmark_")]
    results = [read_result(folder) for folder in folders]
    scores = [Score(**s) for result in results for s in result["scores"]]
    releases = sorted({result["lm_eval"] for result in results})  # several, where tasks were added after an upgrade
    return as_metrics(scores), {"lm_eval": ", ".join(releases)} if results else {}


def _tuned_loss(run: StageRun) -> float | None:
    folder = run.inputs.get("evaluate_tuned")
    return read_result(folder)["test"]["loss"] if folder else None


def _tuned_metrics(run: StageRun) -> dict[str, dict[str, Any]]:
    """The benchmarks of the tuned model, each under its own name and that of the last stage of tuning."""
    final = "prefer" if "prefer" in run.inputs else "instruct"
    return {f"{name}/{final}": score for name, score in _metrics(run, "tuned")[0].items()}


def _tail_mean(history: list[dict], name: str) -> float | None:
    """Mean of the last tenth of the logged points: one batch alone is noise."""
    tail = [point[name] for point in history[-max(1, len(history) // 10) :] if name in point]
    return sum(tail) / len(tail) if tail else None
