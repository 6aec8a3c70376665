"""The stage `evaluate`: a model's held-out losses, in domain and out of domain."""

from collections.abc import Mapping
from typing import Any

from capacity_gap.cell.resolved import ResolvedCell
from capacity_gap.cell.stages.shared import RESULT, packed_split
from capacity_gap.data.token_bytes import old_bytes_were_wrong
from capacity_gap.models import accounting
from capacity_gap.store.files import write_json
from capacity_gap.store.stage import Stage, StageRun


def evaluate_stage(
    cell: ResolvedCell, model: Stage, shape: Mapping[str, Any], tokens: Stage, tokenizer: Stage, *, validation: int = 0
) -> Stage:
    """Held-out losses of one model; `validation`: tokens of the validation split that it is scored on too."""
    c = cell.config.evaluate
    given = {"tokens": c.tokens, "ood_tokens": c.ood_tokens, **cell.arithmetic}
    given |= {"validation_tokens": validation} if validation else {}
    seen = c.tokens + c.ood_tokens + validation
    inputs = {"model": model, "tokens": tokens}
    if (folder := cell.tokenizer_folder) and old_bytes_were_wrong(folder):
        inputs["tokenizer"] = tokenizer  # counts bytes anew: texts packed by an earlier version hold others
    cost, options = accounting.forward_flops(shape, seen), {"batch_size": c.batch_size}
    together = cell.shards_teachers
    return Stage("evaluate", 1, given, inputs, evaluate_model, cost, options, passes=seen, collective=together)


def evaluate_model(run: StageRun) -> None:
    """Scores the held-out splits."""
    from capacity_gap.data.tokenizer import bytes_per_id, load_tokenizer
    from capacity_gap.evaluate.heldout import held_out
    from capacity_gap.models.placing import load_teacher

    model = load_teacher(run.inputs["model"], run.runtime)
    found, lengths = {}, None
    if "tokenizer" in run.inputs:
        lengths = bytes_per_id(load_tokenizer(run.inputs["tokenizer"]))
    budgets = {"test": run.config["tokens"], "ood": run.config["ood_tokens"]}
    budgets |= {"validation": run.config["validation_tokens"]} if "validation_tokens" in run.config else {}
    for split, budget in budgets.items():
        found[split] = held_out(
            model,
            packed_split(run, split).counting(lengths),
            tokens=budget,
            batch_size=run.options["batch_size"],
            runtime=run.runtime,
        ).to_dict()
    write_json(run.out / RESULT, found)
