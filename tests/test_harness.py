"""Benchmarks: parity with the harness's own command line, a suite from held-out text, scores in records."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from capacity_gap import cli, pipeline, records
from capacity_gap.errors import ConfigError, StageError, UserError
from capacity_gap.evaluate.scores import Score, as_loss, as_metrics, metric_direction
from capacity_gap.evaluate.suite import build_suite, cloze, next_sentence, sentences
from capacity_gap.evaluate.tasks import Task, check_tasks, folder_digest, folder_names, folder_tasks, place
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
    from capacity_gap.stage import Store

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
    with pytest.raises(StageError, match=r"gives only \d+ questions for pico_cloze"):
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
    with pytest.raises(ConfigError, match=r"b\.yaml is no YAML file"):
        folder_tasks(tmp_path)


def test_the_papers_tasks_are_found_and_a_typo_is_named():
    pytest.importorskip("lm_eval")
    for name in ("mmlu", "ceval-valid", "drop", "humaneval", "bbh", "gsm8k", "wikitext", "lambada_openai"):
        defined = [f for f in place(name).rglob("*.yaml") if name in f.read_text(encoding="utf-8")]
        assert defined, name
    assert place("hellaswag").name == "hellaswag"
    with pytest.raises(ConfigError, match=r"no task 'hellaswga' \(did you mean 'hellaswag'\?\)"):
        check_tasks([Task("hellaswga")], None)


def test_the_papers_shots_and_code_only_if_allowed():
    cell = pipeline.resolve(compose(["evaluate=paper"]))
    named = {t.name: t.shots for t in cell.config.evaluate.benchmarks}
    six = {"mmlu": 5, "ceval-valid": 5, "drop": 3, "bbh": 3, "gsm8k": 8}
    assert named == {**six, "wikitext": None, "lambada_openai": None}
    allowed = compose(["evaluate=paper", "evaluate.allow_code_execution=true"]).evaluate.benchmarks
    assert {t.name: t.shots for t in allowed} == {**named, "humaneval": 0}


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
    pipeline.run(compose([*tiny, *more]))
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

    names = ["pico_cloze", "pico_next", "prose"]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={checkpoint}"]
    command += ["--tasks", ",".join(names), "--include_path", str(folder), "--batch_size", "4", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out.json")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.rglob("*.json")
    theirs = json.loads(file.read_text())["results"]
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    ours = score_tasks(model, tokenizer, [Task(n) for n in names], folder=folder, batch_size=4)
    assert [s.task for s in ours] == names
    for score in ours:
        assert score.value == theirs[score.task][f"{score.metric},none"], score
        if score.stderr is not None:
            assert score.stderr == theirs[score.task][f"{score.metric}_stderr,none"], score
    assert {s.task for s in ours if s.stderr} == {"pico_cloze", "pico_next"}


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


def test_any_model_is_scored_for_tables_of_comparison(checkpoint, folder, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    out = tmp_path / "scores.csv"
    command = ["evaluate", str(checkpoint), "--task-folder", str(folder), "--limit", "4", "--out", str(out)]
    assert cli.main(command) == 0
    assert cli.main([*command, "--tasks", "pico_next:0"]) == 0
    table = pd.read_csv(out)
    assert list(table["task"]) == ["pico_cloze", "pico_next", "prose", "pico_next"]
    assert set(table["params"]) == {55_032}
    assert "bits_per_byte" in capsys.readouterr().out
    assert cli.main(["evaluate", str(tmp_path), "--task-folder", str(folder)]) == 2
    assert "cannot be loaded as a causal language model" in capsys.readouterr().err
    assert cli.main(["evaluate", str(checkpoint), "--tasks", "humaneval"]) == 2
    assert "Allow it with --allow-code-execution" in capsys.readouterr().err


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
    with pytest.raises(UserError, match="nothing says whether more of thing is better"):
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
