"""Sets of benchmarks that go together: `evaluate=NAME` on the command line."""

from collections.abc import Mapping
from typing import Any

from capacity_gap.evaluate.tasks import GENERATED, PAPER, PERPLEXITIES, Task
from capacity_gap.settings.registry import Registry

# Each is a mapping of settings of `EvaluateConfig`.
EVALUATION_SETS: Registry[Mapping[str, Any]] = Registry("evaluation set", setting="evaluate")

# Held-out loss in domain (test split) and out of domain, which every set has.
EVALUATION_SETS.add("perplexity", {})

# Two small benchmarks made from the corpus' test split, for models that no public one can tell apart (docs/scores.md).
EVALUATION_SETS.add("pico", {"tasks": list(GENERATED)})

# The paper's six with its shots, and two perplexities, through lm-evaluation-harness (the extra [eval]); data sets come
# from the hub. HumanEval runs code that the model wrote: only with evaluate.allow_code_execution=true.
EVALUATION_SETS.add(
    "paper",
    {
        "tasks": [f"{n}:{shots}" for n, shots in PAPER.items() if not Task(n).runs_code] + list(PERPLEXITIES),
        "code_tasks": [f"{n}:{shots}" for n, shots in PAPER.items() if Task(n).runs_code],
    },
)

# Every task of a folder of task files, offline: evaluate=local evaluate.task_folder=FOLDER.
EVALUATION_SETS.add("local", {"task_folder": ""})
