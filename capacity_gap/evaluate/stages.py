"""The stages that score a model: held-out losses, the suite made from the corpus, and the benchmarks.

Thin adapters like those of `steps.py`: each takes a `StageRun` and writes its result to `run.out`.
"""

import json

from capacity_gap.stage import StageRun, write_json
from capacity_gap.steps import RESULT, packed_split


def evaluate(run: StageRun) -> None:
    """Held-out losses, in domain and out of domain."""
    from capacity_gap.data.tokenizer import bytes_per_id, load_tokenizer
    from capacity_gap.evaluate.heldout import held_out
    from capacity_gap.models.loading import load_model

    model = load_model(run.inputs["model"], device=run.runtime.device)
    found, lengths = {}, None
    if "tokenizer" in run.inputs:
        lengths = bytes_per_id(load_tokenizer(run.inputs["tokenizer"]))
    for split, budget in (("test", run.config["tokens"]), ("ood", run.config["ood_tokens"])):
        found[split] = held_out(
            model,
            packed_split(run, split).counting(lengths),
            tokens=budget,
            batch_size=run.options["batch_size"],
            runtime=run.runtime,
        ).to_dict()
    write_json(run.out / RESULT, found)


def suite(run: StageRun) -> None:
    """Two benchmarks made from the test split."""
    from capacity_gap.evaluate.suite import build_suite

    with (run.inputs["corpus"] / "test.jsonl").open(encoding="utf-8") as lines:
        build_suite([json.loads(line) for line in lines], run.out)


def benchmark(run: StageRun) -> None:
    """One model's scores on one benchmark of the lm-evaluation-harness."""
    from capacity_gap.data.tokenizer import load_tokenizer
    from capacity_gap.evaluate.harness import harness_version, score_tasks
    from capacity_gap.evaluate.tasks import Task
    from capacity_gap.models.loading import load_model

    given, options = run.config, run.options
    scores = score_tasks(
        load_model(run.inputs["model"], device=run.runtime.device),
        load_tokenizer(run.inputs["tokenizer"]),
        [Task(given["task"], given["shots"])],
        folder=run.inputs.get("suite") or options["folder"],
        batch_size=options["batch_size"],
        limit=given["limit"],
        allow_code=options["allow_code"],
        on_forward=run.runtime.check,
    )
    write_json(run.out / RESULT, {"scores": [s.to_dict() for s in scores], "lm_eval": harness_version()})
