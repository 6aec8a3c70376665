"""Benchmarks: parity with the harness's own command line, a suite from held-out text, scores in records."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.commands import cli
from capacity_gap.evaluate import other_models
from capacity_gap.evaluate.other_models import COLUMNS, chosen
from capacity_gap.evaluate.suite import build_suite, cloze, next_sentence, sentences
from capacity_gap.evaluate.task_scores import Score, as_loss, as_metrics, metric_direction
from capacity_gap.evaluate.tasks import (
    PAPER,
    PERPLEXITIES,
    Task,
    check_tasks,
    folder_digest,
    folder_names,
    folder_tasks,
    foreign_members,
    foreign_metrics,
    harness_folder,
    place,
    unsafe_names,
)
from capacity_gap.runner.run_cell import run_config
from capacity_gap.settings.errors import ConfigError, StageError, UserError
from tests.conftest import compose

ROLLING = """\
task: prose
dataset_path: json
dataset_kwargs:
  data_files:
    test: prose.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: bits_per_byte
"""

# The model writes; every letter counts in chrF. Its examples are drawn from a split of their own.
WRITING = """\
task: writing
dataset_path: json
dataset_kwargs:
  data_files:
    test: writing.jsonl
    train: examples.jsonl
test_split: test
fewshot_split: train
num_fewshot: 2
output_type: generate_until
doc_to_text: "{{text[:30]}}"
doc_to_target: " {{text[30:]}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 24
metric_list:
  - metric: chrf
  - metric: exact_match
"""
# A choice of two; `{}` are its name, its file of data and more settings.
CHOICE = """\
task: {}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}} is"
doc_to_choice: ["small", "large"]
doc_to_target: a
"""


def write_choice(folder: Path, name: str, more: str = "", *, count: int = 4, data: str = "data.jsonl") -> None:
    """A task file of two choices in `folder`, with its questions beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(CHOICE.format(name, data) + more)
    (folder / data).write_text("".join(json.dumps({"q": f"thing {i}", "a": i % 2}) + "\n" for i in range(count)))


@pytest.fixture(scope="session")
def documents():
    """Prose of Python's own reference, in documents of six paragraphs."""
    from pydoc_data.topics import topics

    parts = "\n\n".join(topics[t] for t in sorted(topics)[:40]).split("\n\n")
    texts = [" ".join(" ".join(parts[i : i + 6]).split()) for i in range(0, len(parts), 6)]
    return [{"text": text, "group": f"part {i % 3}"} for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def folder(documents, tmp_path_factory) -> Path:
    """A local task set: the suite, and a perplexity over whole texts."""
    out = tmp_path_factory.mktemp("tasks")
    build_suite(documents, out, items=60)
    (out / "prose.yaml").write_text(ROLLING)
    (out / "prose.jsonl").write_text("".join(json.dumps({"text": d["text"][:600]}) + "\n" for d in documents[:8]))
    return out


@pytest.fixture(scope="session")
def checkpoint(tiny_cell) -> Path:
    """A trained model with its tokenizer, as plain transformers saves them."""
    from capacity_gap.data.tokenizer import load_tokenizer
    from capacity_gap.models.loading import load_model
    from capacity_gap.store.stage import Store

    cell, store = pipeline.resolve(tiny_cell), Store(tiny_cell.store_path)
    out = tiny_cell.store_path.parent / "checkpoint"
    load_model(store.path(cell.teacher)).save_pretrained(out)
    load_tokenizer(store.path(cell.tokenizer)).save_pretrained(out)
    return out


def test_a_question_has_one_right_choice_and_three_of_its_kind(documents):
    found = list(sentences(documents))
    texts = {d["text"] for d in documents}
    for make in (cloze, next_sentence):
        questions = list(make(found))
        assert len(questions) > 100
        for q in questions:
            assert len(set(q["choices"])) == 4
            whole = f"{q['context']} {q['choices'][q['answer']]}".replace("  ", " ")
            assert any(whole[-60:].strip() in t for t in texts), "the right choice continues a real text"
        share = sum(q["answer"] == 0 for q in questions) / len(questions)
        assert 0.15 < share < 0.35, "the right choice stands anywhere"
    lengths = [[len(c) for c in q["choices"]] for q in next_sentence(found)]
    assert max(max(group) / min(group) for group in lengths) <= 1.3**2 + 0.01


def test_equal_texts_give_equal_suites_and_few_texts_an_error(documents, tmp_path):
    for name in ("one", "two"):
        random.seed(name)
        (tmp_path / name).mkdir()
        build_suite(documents, tmp_path / name, items=60)
    assert folder_digest(tmp_path / "one") == folder_digest(tmp_path / "two")
    with pytest.raises(StageError, match=r"yields only \d+ questions for pico_cloze"):
        build_suite(documents[:3], tmp_path / "one")


def test_a_folder_says_what_it_defines_without_running_its_code(tmp_path):
    (tmp_path / "a.yaml").write_text("task: a\ntag: [t]\nprocess_docs: !function utils.boom\n")
    (tmp_path / "b.yaml").write_text("task: b\n")
    (tmp_path / "g.yaml").write_text("group: g\ntask:\n  - a\n  - task: c\n")
    (tmp_path / "utils.py").write_text("raise SystemExit('imported')\n")
    assert folder_tasks(tmp_path) == ["b", "g"]
    assert folder_names(tmp_path) == {"a", "b", "g", "t"}
    before = folder_digest(tmp_path)
    (tmp_path / "utils.py").write_text("x = 1\n")
    assert folder_digest(tmp_path) != before
    (tmp_path / "b.yaml").write_text("task: [b\n")
    with pytest.raises(ConfigError, match=r"b\.yaml is not a valid YAML file"):
        folder_tasks(tmp_path)


def test_the_papers_tasks_are_found_and_a_typo_is_named():
    pytest.importorskip("lm_eval")
    for name in (*PAPER, *PERPLEXITIES):
        defined = [f for f in place(name).rglob("*.yaml") if name in f.read_text(encoding="utf-8")]
        assert defined, name
    assert place("hellaswag").name == "hellaswag"
    with pytest.raises(ConfigError, match=r"no task 'hellaswga' \(did you mean 'hellaswag'\?\)"):
        check_tasks([Task("hellaswga")], None)


def test_the_papers_shots_and_code_only_if_allowed():
    pytest.importorskip("lm_eval")
    cell = pipeline.resolve(compose(["evaluate=paper"]))
    named = {t.name: t.shots for t in cell.config.evaluate.benchmarks}
    others = dict.fromkeys(PERPLEXITIES)
    assert named == {name: shots for name, shots in PAPER.items() if name != "humaneval"} | others
    allowed = compose(["evaluate=paper", "evaluate.allow_code_execution=true"]).evaluate.benchmarks
    assert {t.name: t.shots for t in allowed} == PAPER | others
    assert set(chosen(None, None, allow_code=True)) == set(allowed)
    assert set(chosen(None, None, allow_code=False)) == set(cell.config.evaluate.benchmarks)


def test_every_task_of_the_harness_that_runs_code_is_known_by_its_name():
    pytest.importorskip("lm_eval")
    marked = {
        file.relative_to(harness_folder()).parts[0]
        for file in harness_folder().rglob("*")
        if file.is_file() and file.suffix != ".pyc" and b"\nunsafe_code: true" in file.read_bytes()
    }
    assert "cruxeval" in marked and "humaneval" in marked
    for part in marked:
        names = folder_names(harness_folder() / part)
        assert names and all(Task(name).runs_code for name in names if name in unsafe_names(harness_folder() / part))


def test_own_tasks_that_run_code_are_stopped_before_anything_is_loaded(tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "base").write_text("unsafe_code: true\n")
    (tmp_path / "a.yaml").write_text("include: base\ntask: a\ntag: writes\n")
    (tmp_path / "b.yaml").write_text("task: b\n")
    (tmp_path / "g.yaml").write_text("group: g\ntask: [h, b]\n")
    (tmp_path / "h.yaml").write_text("group: h\ntask:\n  - task: a\n")
    assert unsafe_names(tmp_path) == {"a", "writes", "g", "h"}
    for name in ("a", "writes", "g"):
        with pytest.raises(ConfigError, match=rf"{name} executes code .* with --allow-code-execution"):
            chosen(name, tmp_path, allow_code=False)
    assert chosen("b", tmp_path, allow_code=False) == [Task("b")]
    assert chosen("g", tmp_path, allow_code=True) == [Task("g")]
    given = compose(["evaluate=local", f"evaluate.task_folder={tmp_path}"])
    with pytest.raises(ConfigError, match="g executes code .* with evaluate.allow_code_execution=true"):
        _ = given.evaluate.benchmarks


HIDDEN = {
    "replaced in a file that includes it": {
        "base": "doc_to_text: !function own.f\n",
        "a.yaml": "include: base\ntask: a\ndoc_to_text: x\n",
    },
    "replaced by a second key": {"a.yaml": "task: a\ndoc_to_text: !function own.f\ndoc_to_text: x\n"},
    "as a key": {"a.yaml": "task: a\nmetadata: {? !function own.f : 1}\n"},
    "in pairs": {"a.yaml": "task: a\nmetadata: !!omap [x: !function own.f]\n"},
    "in a group": {"a.yaml": "group: a\ntask: [{task: b, metadata: {x: [!function own.f]}}]\n"},
}


@pytest.mark.parametrize("files", HIDDEN.values(), ids=HIDDEN)
def test_functions_are_code_wherever_the_harness_meets_them(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert "a" in unsafe_names(tmp_path)


def test_task_files_that_grow_without_end_are_read(tmp_path):
    levels = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("task: bomb\nmetadata:\n" + "".join(f"  {line}\n" for line in levels))
    (tmp_path / "ring.yaml").write_text("group: ring\ntask: &r [*r, {task: x, metric_list: [{metric: evil}]}]\n")
    os.mkfifo(tmp_path / "pipe.yaml")
    assert unsafe_names(tmp_path) == set()
    assert foreign_metrics(tmp_path, ["acc"]) == ["evil"]


def test_names_and_tags_that_are_none_are_passed_over(tmp_path):
    (tmp_path / "odd.yaml").write_text("task: [x]\ngroup: [y]\ntag: [[z], t]\n")
    (tmp_path / "other.yaml").write_text("task: fine\ntag: {a: 1}\n")
    assert folder_tasks(tmp_path) == ["fine"]
    assert folder_names(tmp_path) == {"fine", "t"}
    assert unsafe_names(tmp_path) == set()


def test_members_of_groups_are_the_folders_or_the_harnesss(tmp_path):
    (tmp_path / "g.yaml").write_text("group: g\ntask: [arc_easy, {group: h, task: [humaneval, own]}]\n")
    (tmp_path / "own.yaml").write_text("task: own\n")
    assert foreign_members(tmp_path) == {"arc_easy": False, "h": True, "humaneval": False}
    assert "g" in unsafe_names(tmp_path)
    pytest.importorskip("lm_eval")
    check_tasks([Task("g")], tmp_path)
    (tmp_path / "n.yaml").write_text("group: n\ntask: [arc_eazy]\n")
    with pytest.raises(ConfigError, match="no task 'arc_eazy'"):
        check_tasks([Task("g")], tmp_path)


def test_functions_of_task_files_are_code(tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "a.yaml").write_text("task: a\ntag: mine\ndoc_to_text: !function own.text\n")
    (tmp_path / "b.yaml").write_text("task: b\nmetric_list:\n  - metric: acc\n    aggregation: !function own.mean\n")
    (tmp_path / "c.yaml").write_text("task: c\ninclude: deep/base.yaml\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/base.yaml").write_text("process_docs: !function own.docs\n")
    (tmp_path / "d.yaml").write_text("group: d\ntask:\n  - task: e\n    doc_to_target: !function own.text\n")
    (tmp_path / "plain.yaml").write_text("task: plain\n")
    assert unsafe_names(tmp_path) == {"a", "b", "c", "d", "mine"}
    for name in ("a", "b", "c", "d", "mine"):
        with pytest.raises(ConfigError, match=rf"{name} executes code"):
            chosen(name, tmp_path, allow_code=False)
    assert chosen("plain", tmp_path, allow_code=False) == [Task("plain")]
    inside = next(f for f in (harness_folder() / "gsm8k").glob("*.yaml"))
    (tmp_path / "theirs.yaml").write_text(f"task: theirs\ninclude: {inside}\n")
    assert chosen("theirs", tmp_path, allow_code=False), "functions of the harness came with it"


def test_templates_do_not_reach_into_python(checkpoint, tmp_path):
    pytest.importorskip("lm_eval")
    mark = tmp_path / "ran"
    reach = "{{ cycler.__init__.__globals__.os.system('touch MARK') }}".replace("MARK", str(mark))
    write_choice(tmp_path, "sly", f'doc_to_text: "{reach}"\n')
    with pytest.raises(StageError, match=r"access to attribute '__init__'"):
        score(checkpoint, tmp_path, Task("sly"))
    assert not mark.exists()
    write_choice(tmp_path, "fair", 'doc_to_text: "{{ q | upper }}"\n')
    assert score(checkpoint, tmp_path, Task("fair"))


def test_metrics_that_would_be_fetched_as_code_are_refused(checkpoint, tmp_path):
    pytest.importorskip("lm_eval")
    write_choice(tmp_path, "far", "metric_list: [{metric: someone/their_metric}]\n")
    with pytest.raises(StageError, match="names the metrics someone/their_metric"):
        score(checkpoint, tmp_path, Task("far"))


def test_teachers_are_scored_once_and_scores_leave_old_identities_alone(tiny):
    base = pipeline.resolve(compose([*tiny, "student=40k", "teacher=55k"]))
    scored = pipeline.resolve(compose([*tiny, "student=40k", "teacher=55k", "evaluate=pico"]))
    other = pipeline.resolve(compose([*tiny, "student=30k", "teacher=55k", "evaluate=pico", "data=3k"]))
    for cell in (scored, other):
        assert cell.scored(cell.teacher, cell.teacher_shape).key == base.scored(base.teacher, base.teacher_shape).key
    one, two = ([s.key for s in c.benchmarks(c.teacher)] for c in (scored, other))
    assert one == two
    assert set(one) <= {s.key for s in scored.waves[2]}
    fewer = pipeline.resolve(compose([*tiny, "student=40k", "teacher=55k", "evaluate.tasks=[pico_next]"]))
    assert [s.key for s in fewer.benchmarks(fewer.teacher)] == one[1:]
    assert len({base.record.key, scored.record.key, fewer.record.key}) == 3


def test_a_local_set_is_known_by_its_content(tiny, folder, tmp_path):
    given = [*tiny, "evaluate=local", f"evaluate.task_folder={folder}"]
    cell = pipeline.resolve(compose(given))
    assert [t.name for t in cell.config.evaluate.benchmarks] == ["pico_cloze", "pico_next", "prose"]
    prose = cell.benchmarks(cell.teacher)[2]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    again = pipeline.resolve(compose([*given[:-1], f"evaluate.task_folder={moved}"]))
    assert again.benchmarks(again.teacher)[2].key == prose.key
    (moved / "prose.jsonl").write_text('{"text": "other"}\n')
    changed = pipeline.resolve(compose([*given[:-1], f"evaluate.task_folder={moved}"]))
    assert changed.benchmarks(changed.teacher)[2].key != prose.key


def test_a_cell_with_the_suite_records_scores_of_student_and_teacher(tiny, tmp_path):
    pytest.importorskip("lm_eval")
    more = ["student=40k", "teacher=55k", "corpus.test=0.3", "evaluate=pico", "evaluate.limit=20", f"store={tmp_path}"]
    run_config(compose([*tiny, *more]))
    (row,) = records.read(tmp_path)
    for kind in ("metrics", "teacher_metrics"):
        assert list(row[kind]) == ["pico_cloze", "pico_next"]
        for score in row[kind].values():
            assert 0 <= score["value"] <= 1
            assert score["stderr"] > 0
            assert (score["shots"], score["samples"], score["higher_is_better"]) == (0, 20, True)
    assert row["versions"]["lm_eval"]
    frame = records.load(tmp_path)
    assert frame["metrics/pico_cloze"].item() == row["metrics"]["pico_cloze"]["value"]
    assert metric_direction("metrics/pico_cloze", frame) == 1
    frame.to_csv(tmp_path / "cells.csv", index=False)
    assert metric_direction("metrics/pico_cloze", records.load(tmp_path / "cells.csv")) == 1


@pytest.mark.slow
def test_scores_equal_the_harness_own_command_line_to_the_last_digit(checkpoint, folder, tmp_path):
    pytest.importorskip("lm_eval")
    from capacity_gap.data.tokenizer import load_tokenizer
    from capacity_gap.evaluate.harness import score_tasks
    from capacity_gap.models.loading import load_model

    names = ["pico_cloze", "pico_next", "prose", "writing"]
    folder = shutil.copytree(folder, tmp_path / "tasks")
    (folder / "writing.yaml").write_text(WRITING)
    lines = (folder / "prose.jsonl").read_text().splitlines(keepends=True)
    (folder / "writing.jsonl").write_text("".join(lines[:4]))
    (folder / "examples.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 25}) + "\n" for i in range(9)))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={checkpoint}"]
    command += ["--tasks", ",".join(names), "--include_path", str(folder), "--batch_size", "4", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out/out.json")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "out").rglob("*.json")
    theirs = json.loads(file.read_text())["results"]
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    ours = score_tasks(model, tokenizer, [Task(n) for n in names], folder=folder, batch_size=4)
    assert [s.task for s in ours] == [*names, "writing"]
    assert [s.value > 0 for s in ours if s.metric == "chrf"] == [True], "nothing was written"
    for score in ours:
        assert score.value == theirs[score.task][f"{score.metric},none"], score
        if score.stderr is not None:
            assert score.stderr == theirs[score.task][f"{score.metric}_stderr,none"], score
    assert {s.task for s in ours if s.stderr} == {"pico_cloze", "pico_next", "writing"}


def test_the_harness_leaves_no_trace(checkpoint, folder, capfd):
    pytest.importorskip("lm_eval")
    import torch

    from capacity_gap.data.tokenizer import load_tokenizer
    from capacity_gap.evaluate.harness import score_tasks
    from capacity_gap.models.loading import load_model

    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    before, place_, seen = (random.getstate(), torch.get_rng_state()), Path.cwd(), []
    given = {"folder": folder, "batch_size": 8, "limit": 4}
    first = score_tasks(model, tokenizer, [Task("pico_cloze")], on_forward=lambda: seen.append(1), **given)
    assert seen
    assert first == score_tasks(model, tokenizer, [Task("pico_cloze")], **given)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert Path.cwd() == place_ and not model._forward_pre_hooks
    assert capfd.readouterr() == ("", "")

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_tasks(model, tokenizer, [Task("pico_cloze")], on_forward=stop, **given)
    assert not model._forward_pre_hooks


def test_data_that_is_not_there_is_one_paragraph(checkpoint, tmp_path):
    pytest.importorskip("lm_eval")
    from capacity_gap.evaluate.harness import load_tasks

    (tmp_path / "gone.yaml").write_text(ROLLING.replace("prose", "gone"))
    with pytest.raises(StageError, match="the benchmark gone cannot be loaded"):
        load_tasks([Task("gone")], tmp_path)


def score(checkpoint, folder, *names, **given):
    from capacity_gap.data.tokenizer import load_tokenizer
    from capacity_gap.evaluate.harness import score_tasks
    from capacity_gap.models.loading import load_model

    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    return score_tasks(model, tokenizer, [*names], folder=folder, batch_size=8, **given)


def test_data_lie_beside_each_task_file_wherever_the_command_is_started(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    write_choice(tmp_path / "tasks", "top", count=3)
    write_choice(tmp_path / "tasks/deep", "below", "tag: lower\n", count=5)
    write_choice(tmp_path / "tasks/deep/er", "deepest", count=7)
    (tmp_path / "tasks/group.yaml").write_text("group: both\ntask: [below, deepest]\n")
    monkeypatch.chdir(tmp_path)
    named = [Task(n) for n in ("top", "lower", "both")]
    found = score(checkpoint, Path("tasks"), *named)
    counted = {(s.task, s.samples) for s in found if s.metric == "acc"}
    assert counted == {("top", 3), ("below", 5), ("deepest", 7)}
    assert cli.main(["evaluate", str(checkpoint), "--task-folder", "tasks", "--limit", "2"]) == 0


def test_a_group_and_one_of_its_members_keep_their_own_shots(checkpoint, tmp_path):
    pytest.importorskip("lm_eval")
    for name in ("t_a", "t_b"):
        write_choice(tmp_path / name, name, "fewshot_split: test\n", count=12)
    group = "group: grp\ntask: [t_a, t_b]\naggregate_metric_list:\n  - metric: acc\n"
    (tmp_path / "grp.yaml").write_text(group)
    together = score(checkpoint, tmp_path, Task("grp", 3), Task("t_a", 0))
    apart = [*score(checkpoint, tmp_path, Task("grp", 3)), *score(checkpoint, tmp_path, Task("t_a", 0))]
    assert together == apart
    assert [(s.task, s.shots) for s in together if s.metric == "acc"] == [("grp", 3), ("t_a", 0)]


def test_a_task_that_scores_nothing_or_runs_code_unasked_is_an_error(checkpoint, tmp_path):
    pytest.importorskip("lm_eval")
    write_choice(tmp_path, "mute", "process_results: !function own.nothing\n")
    (tmp_path / "own.py").write_text("def nothing(doc, results):\n    return {}\n")
    with pytest.raises(StageError, match="the benchmark mute returned no score"):
        score(checkpoint, tmp_path, Task("mute"), allow_code=True)
    write_choice(tmp_path, "sly", "unsafe_code: true\n")
    with pytest.raises(StageError, match=r"sly executes code .* evaluate.allow_code_execution=true"):
        score(checkpoint, tmp_path, Task("sly"))
    assert score(checkpoint, tmp_path, Task("sly"), allow_code=True)


def test_any_model_is_scored_for_tables_of_comparison(checkpoint, folder, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    out = tmp_path / "scores.csv"
    command = ["evaluate", str(checkpoint), "--task-folder", str(folder), "--limit", "4", "--out", str(out)]
    assert cli.main(command) == 0
    assert cli.main([*command, "--tasks", "pico_next:0"]) == 0
    table = pd.read_csv(out)
    assert list(table["task"]) == ["pico_cloze", "pico_next", "prose", "pico_next"]
    assert set(table["params"]) == {55_032}
    assert list(table.columns) == list(COLUMNS)
    assert set(zip(table["dtype"], table["batch_size"], table["limit"], strict=True)) == {("fp32", 8, 4)}
    assert "bits_per_byte" in capsys.readouterr().out
    assert cli.main(["evaluate", str(tmp_path), "--task-folder", str(folder)]) == 2
    assert "has no .safetensors weights" in capsys.readouterr().err
    assert cli.main(["evaluate", str(checkpoint), "--tasks", "cruxeval_input"]) == 2
    assert "Allow it with --allow-code-execution" in capsys.readouterr().err


def test_a_foreign_table_is_found_before_anything_is_loaded(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")

    monkeypatch.setattr(other_models, "_load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "foreign.csv").write_text("name,score\nx,1\n")
    command = ["evaluate", "x", "--task-folder", str(folder), "--out", str(tmp_path / "foreign.csv")]
    assert cli.main(command) == 2
    assert "is a different table (columns name, score)" in capsys.readouterr().err


def test_tables_of_scores_are_compared(tmp_path, capsys):
    def rows(model, tokens, **more):
        row = {"model": model, "params": 10, "train_flops": tokens, "dtype": "fp32", "batch_size": 8, "lm_eval": "1"}
        row |= {"task": "wikitext", "value": 20.0, "shots": 0, "higher_is_better": False, "samples": 3} | more
        return [row | {"metric": "word_perplexity"}, row | {"metric": "bits_per_byte", "value": 0.5, "stderr": 0.01}]

    def write(name, given):
        frame = pd.DataFrame(given).reindex(columns=COLUMNS)
        frame.assign(limit=frame["limit"].astype("Int64")).to_csv(tmp_path / name, index=False)
        return str(tmp_path / name)

    one = write("one.csv", [*rows("a", None, value=30.0), *rows("a", 6e9)])
    two = write("two.csv", [*rows("b", None, limit=4), *rows("b", None)])
    assert cli.main(["compare", one, two, "--out", str(tmp_path / "wide.csv")]) == 0
    said = capsys.readouterr().out
    assert "0.5000 ± 0.0100" in said and "wikitext/bits_per_byte" in said and "limit" in said
    wide = records.load(tmp_path / "wide.csv")
    assert list(wide["model"]) == ["a", "b", "b"]
    assert wide["metrics/wikitext"].tolist() == [20.0] * 3, "the last score of one kind counts"
    assert wide["train_flops"].tolist()[0] == 6e9 and wide["train_flops"].isna().sum() == 2
    assert metric_direction("metrics/wikitext", wide) == -1
    assert cli.main(["compare", one]) == 0
    assert "limit" not in capsys.readouterr().out
    for name, given, wrong in (
        ("shots.csv", [*rows("a", None), *rows("a", None, shots=5)], "wikitext of a with 0 and with 5 shots"),
        ("broken.csv", rows("a", None, value="x"), "broken.csv, line 2: could not convert"),
    ):
        assert cli.main(["compare", write(name, given)]) == 2
        assert wrong in capsys.readouterr().err
    (tmp_path / "foreign.csv").write_text("name\nx\n")
    for name, wrong in (("foreign.csv", "is a different table"), ("none.csv", "does not exist")):
        assert cli.main(["compare", str(tmp_path / name)]) == 2
        assert wrong in capsys.readouterr().err


def test_training_compute_goes_into_the_table(checkpoint, folder, tmp_path):
    pytest.importorskip("lm_eval")
    from transformers import AutoConfig

    from capacity_gap.models.accounting import train_flops

    out = tmp_path / "scores.csv"
    command = ["evaluate", str(checkpoint), "--task-folder", str(folder), "--tasks", "pico_cloze", "--limit", "2"]
    assert cli.main([*command, "--train-tokens", "8k", "--out", str(out)]) == 0
    shape = AutoConfig.from_pretrained(checkpoint).to_dict()
    assert set(pd.read_csv(out)["train_flops"]) == {train_flops(shape, 8_000)}


def test_directions():
    for name in (
        "student_loss",
        "metrics/wikitext",
        "metrics/lambada_openai",
        "metrics/wikitext/bits_per_byte",
        "loss",
    ):
        assert metric_direction(name) == -1, name
    for name in ("metrics/mmlu", "metrics/lambada_openai/acc", "metrics/gsm8k", "metrics/x/exact_match", "acc_norm"):
        assert metric_direction(name) == 1, name
    with pytest.raises(UserError, match="it is unknown whether higher thing is better"):
        metric_direction("thing")
    frame = pd.DataFrame({"thing": [0.25, 0.5], "thing/higher_is_better": [True, True], "rating": [3.0, 7.0]})
    assert metric_direction("thing", frame) == 1
    turned, column = as_loss(frame, "thing")
    assert column == "1 − thing"
    assert list(turned[column]) == [0.75, 0.5]
    turned, column = as_loss(frame, "rating")
    assert list(turned[column]) == [-3.0, -7.0]
    assert as_loss(frame, None)[0] is frame
    with pytest.raises(UserError, match="disagree"):
        metric_direction("thing", frame.assign(**{"thing/higher_is_better": [True, False]}))


def test_a_tasks_first_metric_goes_under_its_name():
    one = Score("wikitext", "word_perplexity", 20.0, None, 0, False, 62)
    two = dataclasses.replace(one, metric="bits_per_byte", value=0.8)
    found = as_metrics([one, two])
    assert {k: v["value"] for k, v in found.items()} == {"wikitext": 20.0, "wikitext/bits_per_byte": 0.8}


def test_fit_works_on_a_score_of_which_more_is_better(tmp_path, capsys):
    rows = []
    for student in (1e6, 2e6, 4e6):
        for ratio in (1.0, 1.5, 2.3, 3.4, 5.0):
            far = (ratio / 2.3 - 1) ** 2 if ratio < 2.3 else (2.3 / ratio - 1) ** 2
            for seed, noise in enumerate((-1e-4, 1e-4)):
                rows.append(
                    {
                        "student_params": student,
                        "teacher_params": ratio * student,
                        "metrics/mmlu": 0.4 - far + noise,
                        "seed": seed,
                        "student_loss": 3.0,
                    }
                )
    pd.DataFrame(rows).to_csv(tmp_path / "cells.csv", index=False)
    assert cli.main(["fit", str(tmp_path), "--metric", "metrics/mmlu"]) == 0
    assert capsys.readouterr().out.count("interior") >= 3
