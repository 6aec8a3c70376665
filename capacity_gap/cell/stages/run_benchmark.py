"""The stages `suite` (benchmarks made from the corpus) and `benchmark` (one model's scores on one benchmark)."""

import json

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.shared import RESULT
from capacity_gap.evaluate.tasks import GENERATED, Task, folder_digest, folder_names
from capacity_gap.settings.errors import ConfigError
from capacity_gap.store.files import write_json
from capacity_gap.store.stage import Stage, StageRun


def benchmark_stages(cell: ResolvedCell, model: Stage, tokenizer: Stage, corpus: Stage) -> list[Stage]:
    """One model's scores, a stage a benchmark: what is scored stays when the list grows."""
    tasks = cell.config.evaluate.benchmarks
    if tasks and cell.objective:
        raise ConfigError(
            f"benchmarks ({', '.join(t.name for t in tasks)}) need a causal model, and family={cell.family.name} is "
            "an encoder–decoder. Keep evaluate=perplexity, which compares held-out losses."
        )
    return [_benchmark_stage(cell, task, model, tokenizer, corpus) for task in tasks]


def _benchmark_stage(cell: ResolvedCell, task: Task, model: Stage, tokenizer: Stage, corpus: Stage) -> Stage:
    c = cell.config.evaluate
    given = {"task": task.name, "shots": task.shots, "limit": c.limit, "threads": cell.config.train.threads}
    inputs = {"model": model, "tokenizer": tokenizer}
    if task.name in GENERATED:
        inputs["suite"] = Stage("suite", 1, {}, {"corpus": corpus}, build_suite_from_corpus)
    elif c.folder and task.name in folder_names(c.folder):
        given["files"] = folder_digest(c.folder)
    options = {"batch_size": c.batch_size, "folder": c.folder, "allow_code": c.allow_code_execution}
    return Stage("benchmark", 1, given, inputs, run_benchmark, options=options)


def build_suite_from_corpus(run: StageRun) -> None:
    """Two benchmarks made from the test split, for models too small for public ones."""
    from capacity_gap.evaluate.suite import build_suite

    with (run.inputs["corpus"] / "test.jsonl").open(encoding="utf-8") as lines:
        build_suite([json.loads(line) for line in lines], run.out)


def run_benchmark(run: StageRun) -> None:
    """Scores one model on one benchmark of the lm-evaluation-harness."""
    from capacity_gap.data.tokenizer import load_tokenizer
    from capacity_gap.evaluate.harness import harness_version, score_tasks
    from capacity_gap.models.placing import load_teacher

    given, options = run.config, run.options
    scores = score_tasks(
        load_teacher(run.inputs["model"], run.runtime),
        load_tokenizer(run.inputs["tokenizer"]),
        [Task(given["task"], given["shots"])],
        folder=run.inputs.get("suite") or options["folder"],
        batch_size=options["batch_size"],
        limit=given["limit"],
        allow_code=options["allow_code"],
        on_forward=run.runtime.check,
    )
    write_json(run.out / RESULT, {"scores": [s.to_dict() for s in scores], "lm_eval": harness_version()})
