"""Benchmarks through the lm-evaluation-harness, in this process, on the model in memory.

Scores equal those of its own command line on the same checkpoint (`tests/test_harness.py`). What differs is what is
done around them: only the folders that define the tasks are indexed, where the harness parses fourteen thousand files;
and `evaluate` is called, not `simple_evaluate`, which also collects environment information that is not used here.
"""

import contextlib
import importlib.metadata
import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from capacity_gap.evaluate.task_scores import Score
from capacity_gap.evaluate.tasks import Task, foreign_metrics, place, places_of_members
from capacity_gap.settings.errors import StageError, first_line

SEED = 1234  # of the harness: numpy, torch and the choice of few-shot examples; Python's own generator gets 0


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    folder: Path | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    allow_code: bool = False,
    on_forward: Callable[[], None] = lambda: None,
) -> list[Score]:
    """Scores `model` on every task; a task's first metric comes first.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: its tokenizer.
        tasks: what to run, in the order of the scores that come back.
        folder: task files of one's own, in it or below it; relative data files in them lie beside each.
        batch_size: sequences at once.
        limit: at most this many questions per task.
        allow_code: let tasks execute what the model writes.
        on_forward: called before each forward pass; what it raises ends the evaluation.

    Returns:
        The scores of the tasks asked for; of a group its own, or where it has none those of its members.

    Raises:
        StageError: a task, or its data, cannot be loaded; it runs code and may not; or it scores nothing.
    """
    import jinja2
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    hook = model.register_forward_pre_hook(lambda *_: on_forward())
    try:
        with _harness_manners(allow_code):
            if folder is not None and not allow_code:
                forbid_foreign_metrics(folder)
            loaded = load_tasks(tasks, folder)
            for task, part in zip(tasks, loaded, strict=True):
                _forbid_code(task, part, allowed=allow_code)
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            calls, home = _calls(loaded)
            found = [
                lm_eval.evaluate(
                    lm=lm, task_dict=call, limit=limit, log_samples=False, confirm_run_unsafe_code=allow_code
                )
                for call in calls
            ]
    except AssertionError as error:  # the harness says so that a question is none
        raise StageError(
            f"{', '.join(task.name for task in tasks)} cannot be evaluated: the harness rejects one of its questions "
            f"({first_line(error)}). Check for empty answers and answers that repeat the question."
        ) from error
    except jinja2.TemplateError as error:
        raise StageError(
            f"a template of {', '.join(task.name for task in tasks)} cannot be rendered: {error}. Templates may read "
            "only the fields of a question unless code execution is allowed."
        ) from error
    finally:
        hook.remove()
    each = zip(tasks, loaded, home, strict=True)
    return [score for task, part, number in each for score in _scores_of(task.name, part, found[number])]


def load_tasks(tasks: Sequence[Task], folder: Path | None) -> list[dict[str, Any]]:
    """The harness's task objects, with the shots and the seed that its command line would give them.

    They are kept separately per requested task: a group and one of its members may have different shots.
    """
    own = _own_manager(folder.absolute()) if folder else None
    loaded = []
    for task in tasks:
        manager = own if own is not None and task.name in own.task_index else _manager(place(task.name))
        with _loading(task):
            part = manager.load(_named(manager, task.name))
        for one in part["tasks"].values():
            _set_shots(one, task.shots)
        loaded.append(part)
    return loaded


def _calls(loaded: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """What is evaluated in one call, and the number of each part's call: the first in which its names are free.

    One call for all would mix a group with its members at other shots; one a task would make other batches than the
    harness, which pools the requests of all tasks, and so differ from it in the last digits.
    """
    calls: list[dict[str, Any]] = []
    home = []
    for part in loaded:
        names = {*part["tasks"], *part.get("groups", ())}
        free = (i for i, call in enumerate(calls) if names.isdisjoint({*call["tasks"], *call["groups"]}))
        number = next(free, len(calls))
        if number == len(calls):
            calls.append({"tasks": {}, "groups": {}, "group_map": {}})
        for kind, found in calls[number].items():
            found.update(part.get(kind, {}))
        home.append(number)
    return calls, home


def _manager(*folders: Path) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)


def _own_manager(folder: Path) -> Any:
    """A manager that builds every task, also one inside a group, from within the folder of its own file.

    The harness takes relative paths of data as from the working directory.
    """
    manager = _manager(folder, *places_of_members(folder))
    build = manager._factory.build

    def build_inside(entry: Any, **given: Any) -> Any:
        with contextlib.chdir(entry.yaml_path.parent if entry.yaml_path else folder):
            return build(entry, **given)

    manager._factory.build = build_inside
    return manager


def _named(manager: Any, name: str) -> list[str]:
    """A tag as its tasks, which the harness would build without asking `build` for each; else the name itself."""
    entry = manager.task_index.get(name)
    return sorted(entry.tags) if entry is not None and entry.kind.name == "TAG" else [name]


def _forbid_code(task: Task, part: Mapping[str, Any], *, allowed: bool) -> None:
    """The final check, by the harness's own flag: stops tasks that `tasks.RUNS_CODE` does not list."""
    unsafe = [name for name, one in part["tasks"].items() if getattr(one, "UNSAFE_CODE", False)]
    if unsafe and not allowed:
        raise StageError(
            f"{task.name} executes code that the model writes ({', '.join(unsafe)}), on this machine and without a "
            "sandbox. Allow it with evaluate.allow_code_execution=true (or --allow-code-execution), or leave it out."
        )


def forbid_foreign_metrics(folder: Path) -> None:
    """The harness looks for unknown metrics in other libraries, on the hub and in files, and runs them as code.

    Raises:
        StageError: a task file of `folder` names one.
    """
    import lm_eval.api.metrics  # noqa: F401 (registers them)
    from lm_eval.api.registry import METRIC_REGISTRY

    if found := foreign_metrics(folder, METRIC_REGISTRY):
        raise StageError(
            f"{folder} names the metrics {', '.join(found)}, which are not built into the lm-evaluation-harness: it "
            "would load code for them. Allow it with evaluate.allow_code_execution=true (or --allow-code-execution), "
            f"or use a built-in one: {', '.join(sorted(METRIC_REGISTRY))}."
        )


def _set_shots(task: Any, shots: int | None) -> None:
    """As on the command line: an explicit 0 in a task file is kept; a missing number is 0 unless requested."""
    default = task.get_config("num_fewshot")
    if shots is not None and default != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)


@contextlib.contextmanager
def _loading(task: Task) -> Iterator[None]:
    """Turns any error while task files and data are read into one paragraph that names the task."""
    try:
        yield
    except Exception as error:  # the harness and `datasets` raise anything from KeyError to their own connection errors
        said = " ".join(str(error).split())
        raise StageError(
            f"the benchmark {task.name} cannot be loaded ({type(error).__name__}: {said}). If its data set is not in "
            "the cache (HF_HOME), run once on a machine with network access; leave the task out of evaluate.tasks, or "
            "use your own files: evaluate=local evaluate.task_folder=FOLDER."
        ) from error


@contextlib.contextmanager
def _harness_manners(allow_code: bool) -> Iterator[None]:
    """The harness's seeds for as long as it runs, its chatter off, templates without access to Python; then all as it
    was before.
    """
    import lm_eval.utils
    import numpy as np
    import torch
    from jinja2.sandbox import SandboxedEnvironment

    logger = logging.getLogger("lm_eval")
    templates = lm_eval.utils.env
    level, python, numpy_state = logger.level, random.getstate(), np.random.get_state()
    added = {"HF_ALLOW_CODE_EVAL": "1"} if allow_code else {}
    before = {name: os.environ.get(name) for name in added}
    logger.setLevel(logging.ERROR)
    os.environ.update(added)
    if not allow_code:  # a template may reach into Python; in this environment it may not
        lm_eval.utils.env = SandboxedEnvironment(
            loader=templates.loader, undefined=templates.undefined, keep_trailing_newline=True
        )
        lm_eval.utils.env.filters.update(templates.filters)
    try:
        with (
            torch.random.fork_rng(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            random.seed(0)
            np.random.seed(SEED)
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        logger.setLevel(level)
        lm_eval.utils.env = templates
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _scores_of(name: str, loaded: Mapping[str, Any], found: Mapping[str, Any]) -> list[Score]:
    """The scores of one task or group; a group or tag without scores of its own gives those of its members."""
    values = found["results"].get(name, {})
    scores = [
        _score(name, key, values, found)
        for key in values
        if "," in key and not key.partition(",")[0].endswith("_stderr")
    ]
    if scores:
        return scores
    if name in loaded["tasks"]:
        raise StageError(
            f"the benchmark {name} returned no score for any question. Check its metric_list and process_results, or "
            "leave it out."
        )
    members = loaded["group_map"].get(name) or [n for n, t in loaded["tasks"].items() if name in (t.config.tag or ())]
    return [score for member in members for score in _scores_of(member, loaded, found)]


def _score(name: str, key: str, values: Mapping[str, Any], found: Mapping[str, Any]) -> Score:
    metric, _, chosen = key.partition(",")
    stderr = values.get(f"{metric}_stderr,{chosen}")
    samples = values.get("sample_len") or values.get("sample_count", {})
    return Score(
        task=name,
        metric=metric if chosen == "none" else key,
        value=float(values[key]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        shots=found["n-shot"].get(name),
        higher_is_better=found["higher_is_better"].get(name, {}).get(metric),
        samples=samples if isinstance(samples, int) else samples.get(key),
    )


def harness_version() -> str:
    """The installed release of the harness: task files change between releases."""
    return importlib.metadata.version("lm_eval")
