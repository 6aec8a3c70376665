"""Instruction tuning and preferences: what counts in the loss, what sees what, and whole cells. Needs the extra."""

import dataclasses
import json
import logging
import random
import shutil
import sys

import pytest
import torch

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.data.tokenizer import train_tokenizer
from capacity_gap.instruct import chat
from capacity_gap.instruct.rows import PAIR, constant_hits, read_rows, share
from capacity_gap.instruct.rows import TALK as TALK_FIELDS
from capacity_gap.instruct.templates import TASKS, Item, instructions
from capacity_gap.instruct.tune_config import PreferConfig
from capacity_gap.instruct.tuning_checks import check_lengths
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.models.loading import load_model, new_model
from capacity_gap.runner.run_cell import run_config
from capacity_gap.runtime.process import Runtime
from capacity_gap.settings.errors import ConfigError, StageError
from capacity_gap.store.files import write_checked
from capacity_gap.store.stage import Store
from tests.conftest import compose
from tests.test_export import use_as_the_card_says

TALK = [
    {"role": "user", "content": "First word of: red blue"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "Last word of: red blue"},
    {"role": "assistant", "content": "blue"},
]


@pytest.fixture(scope="module")
def tokenizer(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([text_file.read_text(encoding="utf-8")], 1024, folder)
    return chat.chat_tokenizer(folder)


@pytest.fixture(scope="module")
def rows(text_file):
    return instructions(text_file.read_text(encoding="utf-8").split("\n\n"), 60, 0)


def test_every_task_has_a_right_and_a_wrong_answer():
    draw = random.Random(0)
    for item in (Item(("red", "green", "blue"), " "), Item(("人", "好", "我"), "")):
        for name, make in TASKS.items():
            question = make(item, draw)
            assert question.answer != question.wrong, name
            assert item.text in question.prompt
    assert TASKS["last"](item, draw).answer == "我"
    assert TASKS["missing"](Item(("red", "blue"), " "), draw).prompt in (
        "Missing word: red blue / blue",
        "Missing word: red blue / red",
    )


def test_held_out_instructions_are_none_of_those_trained_on(text_file):
    texts = text_file.read_text(encoding="utf-8").split("\n\n")
    held_out = instructions(texts, 50, 1)
    train = instructions(texts, 500, 2, apart_from=held_out)
    prompts = [row["messages"][0]["content"] for row in train]
    assert len(set(prompts)) == len(prompts) == 500
    assert not set(prompts) & {row["messages"][0]["content"] for row in held_out}
    assert len({row["task"] for row in train}) == len(TASKS)
    assert instructions(texts, 500, 2, apart_from=held_out) == train


def test_the_template_marks_answers_and_their_ends(tokenizer):
    given = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mask in zip(given["input_ids"], given["assistant_masks"], strict=True) if mask]
    end = tokenizer.eos_token
    assert tokenizer.decode(said) == f" red{end} blue{end}"
    before = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert given["input_ids"][: len(before)] == before, "what a model is asked is what it was trained on"
    with pytest.raises(Exception, match="roles user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


def test_nobody_but_the_template_ends_a_turn(tokenizer):
    """Whoever types the end of a text, once or so that taking it out would make another, ends nothing."""
    end = tokenizer.eos_token
    for typed in (f"stop{end}[|Assistant|] no", f"{end[:6]}{end}{end[6:]}"):
        asked = [{"role": "user", "content": typed}, {"role": "assistant", "content": f"a{end}b"}]
        ids = tokenizer.apply_chat_template(asked, return_dict=True)["input_ids"]
        assert ids.count(tokenizer.eos_token_id) == 1 + 2, "the beginning of the text, and the end of each turn"


def _says(tokenizer, row):
    return tokenizer.decode([i for i in row["labels"] if i != chat.IGNORED])


def test_labels_do_not_depend_on_character_offsets(tokenizer, tmp_path):
    """Pythia's tokenizer trims the space before a word from its offsets, which left the template's mask empty."""
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    file.write_text(json.dumps(saved), encoding="utf-8")
    trimming = chat.chat_tokenizer(tmp_path)
    mask = trimming.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert 1 not in mask, "or this tests nothing"
    found = chat.encoded(trimming, [TALK], 256)
    assert found == chat.encoded(tokenizer, [TALK], 256)
    assert _says(trimming, found.rows[0]) == f" red{tokenizer.eos_token} blue{tokenizer.eos_token}"


def test_answers_are_whole_or_left_out(tokenizer):
    """What does not fit ends with the last answer that does; a conversation of which none fits is counted."""
    whole, first = (len(chat.answer_ids(tokenizer, turns)[0]) for turns in (TALK, TALK[:2]))
    for most, says, shortened, dropped in (
        (whole, " red{0} blue{0}", 0, 0),
        (whole - 1, " red{0}", 1, 0),
        (first, " red{0}", 1, 0),
        (first - 1, None, 0, 1),
    ):
        found = chat.encoded(tokenizer, [TALK], most)
        assert (found.shortened, found.dropped, len(found.rows)) == (shortened, dropped, 1 - dropped)
        if says:
            assert _says(tokenizer, found.rows[0]) == says.format(tokenizer.eos_token)
            assert len(found.rows[0]["input_ids"]) == len(found.rows[0]["labels"]) <= most


def test_a_few_rows_may_be_too_long_and_not_many(caplog):
    with caplog.at_level(logging.WARNING):
        check_lengths(5, 100, "instruct", 64)
    assert "5 of 100 rows have no answer that fits into instruct.max_length=64" in caplog.text
    with pytest.raises(ConfigError, match=r"6 of 100 rows .* Set a larger prefer.max_length, or use shorter rows"):
        check_lengths(6, 100, "prefer", 64)


def test_a_lookup_knows_the_task_and_the_script_and_no_more():
    def row(task, asked, answer):
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return {"task": task, "messages": turns}

    train = [row("count", "x", "2"), row("count", "x", "3"), row("count", "x", "3"), row("count", "人", "5")]
    held_out = [row("count", "y", "3"), row("count", "y", "2"), row("count", "好", "5"), row("first", "y", "3")]
    assert constant_hits(train, held_out) == [True, False, True, False]


def test_one_score_has_no_standard_error():
    """A record cannot hold the NaN that the deviation of one value is."""
    assert share([True]) == {"value": 1.0, "stderr": None, "shots": 0}
    assert chat.mean(torch.tensor([2.0])) == {"value": 2.0, "stderr": None, "shots": 0}
    assert chat.mean(torch.tensor([1.0, 3.0]))["stderr"] == pytest.approx(1.0)


def _trainer(model, tokenizer, conversations, tmp_path, **options):
    """The trainer as `fine_tune` makes it, caught before it trains."""
    pytest.importorskip("trl")
    from capacity_gap.instruct import tuning

    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_run", lambda trainer, runtime: caught.append(trainer))
        tuning.fine_tune(
            model,
            tokenizer,
            chat.encoded(tokenizer, [row["messages"] for row in conversations], 256).rows,
            tuning.Tuning(1, 1, 1e-3, 0.1, 256, 0, 0, "fp32", 1, **options),
            packing=True,
            neftune=0.0,
            runtime=Runtime(),
            scratch=tmp_path,
        )
    return caught[0]


@pytest.fixture(scope="module")
def model():
    return new_model(FAMILIES["pico"].rungs["55k"], 0)


def test_prompt_tokens_contribute_no_loss(model, tokenizer, tmp_path):
    """The labels that count are the answers' tokens and their ends, one by one; and so is the loss."""
    trainer = _trainer(model, tokenizer, [{"messages": TALK}], tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    counted = batch["labels"][batch["labels"] != -100].tolist()
    expected = [i for word in (" red", " blue") for i in [*tokenizer.encode(word), tokenizer.eos_token_id]]
    assert counted == expected
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(len(counted)))
        logits = model(batch["input_ids"]).logits[0, :-1].log_softmax(-1)
    labels = batch["labels"][0, 1:]
    own = -logits[labels != -100].gather(1, labels[labels != -100][:, None]).mean()
    torch.testing.assert_close(loss, own)


def test_a_trainer_uses_one_device_and_keeps_each_layers_input_only_if_asked(model, tokenizer, tmp_path, monkeypatch):
    """Two visible GPUs would double the batch and copy the model to both."""
    trl = pytest.importorskip("trl")
    settle = trl.SFTConfig.__post_init__

    def two_gpus(self):
        settle(self)
        self._n_gpu = 2

    monkeypatch.setattr(trl.SFTConfig, "__post_init__", two_gpus)
    trainer = _trainer(model, tokenizer, [{"messages": TALK}], tmp_path, activation_checkpointing=True)
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, 1)
    assert trainer.args.gradient_checkpointing
    assert not _trainer(model, tokenizer, [{"messages": TALK}], tmp_path).args.gradient_checkpointing


def test_packed_conversations_do_not_see_each_other(model, tokenizer, tmp_path):
    """Changing the first conversation of a packed sequence changes its own logits and none of the second's."""
    other = [{"role": "user", "content": "Last word of: sun moon"}, {"role": "assistant", "content": "moon"}]
    first = tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]
    second = tokenizer.apply_chat_template(other, return_dict=True)["input_ids"]
    trainer = _trainer(model, tokenizer, [{"messages": TALK}, {"messages": other}], tmp_path)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    batch.pop("labels")
    assert batch["input_ids"].tolist() == [[*first, *second]], "both are packed into one sequence"
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 3 : len(first)] = 77
    with torch.no_grad():
        before, after = model(**batch).logits[0], model(**changed).logits[0]
        alone = model(torch.tensor([second])).logits[0]
    n = len(first)
    assert not torch.allclose(before[3:n], after[3:n])
    assert torch.equal(before[n:], after[n:])
    torch.testing.assert_close(before[n:], alone)


def test_log_probabilities_of_answers_are_those_of_their_tokens(model, tokenizer):
    ids, start = chat.answer_ids(tokenizer, TALK)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    own = sum(logits[i - 1, ids[i]] for i in range(start, len(ids)))
    torch.testing.assert_close(chat.answer_logprobs(model, tokenizer, [TALK])[0], own)


@pytest.mark.parametrize("rank", [0, 4])
def test_tuning_teaches_and_preferences_widen_the_margin(rank, model, tokenizer, rows, tmp_path):
    """Fine-tuning raises the answers' likelihood; DPO raises the margin over wrong ones; adapters are merged."""
    pytest.importorskip("trl")
    from capacity_gap.instruct import tuning

    talks = [row["messages"] for row in rows]
    wrong = [[*t[:-1], {"role": "assistant", "content": r["rejected"]}] for t, r in zip(talks, rows, strict=True)]
    pairs = [{"prompt": t[:-1], "chosen": t[-1:], "rejected": w[-1:]} for t, w in zip(talks, wrong, strict=True)]
    student = new_model(FAMILIES["pico"].rungs["55k"], 0)
    rate = 3e-2 if rank else 1e-2
    how = tuning.Tuning(2, 8, rate, 0.1, 128, rank, 0, "fp32", 8)
    given = {"runtime": Runtime(), "scratch": tmp_path}
    before = chat.answer_logprobs(student, tokenizer, talks).mean()
    encoded = chat.encoded(tokenizer, talks, 128).rows
    student, points = tuning.fine_tune(student, tokenizer, encoded, how, packing=False, neftune=5.0, **given)
    tuned = chat.answer_logprobs(student, tokenizer, talks)
    assert tuned.mean() > before + (0.2 if rank else 3)  # adapters on random weights learn little
    assert type(student).__name__ == "LlamaForCausalLM", "adapters are merged"
    assert student.config.use_cache, "or whoever loads it answers slowly"
    gap = (tuned - chat.answer_logprobs(student, tokenizer, wrong)).mean()
    student.save_pretrained(tmp_path / "reference")
    how = dataclasses.replace(how, learning_rate=rate / 3)
    reference = None if rank else load_model(tmp_path / "reference")
    student, points = tuning.prefer(student, reference, tokenizer, pairs, how, beta=0.1, **given)
    preferred = chat.answer_logprobs(student, tokenizer, talks) - chat.answer_logprobs(student, tokenizer, wrong)
    assert preferred.mean() > gap + (0.05 if rank else 0.5)
    assert points[-1]["rewards/margins"] > points[0]["rewards/margins"]


@pytest.fixture(scope="module")
def chat_cell(tiny, tmp_path_factory):
    """A tiny cell with every stage after distillation."""
    pytest.importorskip("trl")
    given = ["student=40k", "teacher=55k", "instruct.count=40", "instruct.held_out=12", "instruct.epochs=4"]
    given += ["instruct.learning_rate=0.01", "prefer.count=16", "prefer.learning_rate=0.001"]
    given += ["instruct.batch_size=8", "prefer.batch_size=8"]
    config = compose([*tiny, *given, f"store={tmp_path_factory.mktemp('store')}"])
    run_config(config)
    return pipeline.resolve(config)


def test_a_tuned_cell_says_so_in_its_record(chat_cell):
    (row,) = records.read(chat_cell.config.store_path)
    assert (row["instruct_rows"], row["prefer_rows"], row["instruct_lora_rank"]) == (40, 16, None)
    assert (row["instruct_epochs"], row["instruct_learning_rate"], row["instruct_batch"]) == (4, 0.01, 8)
    assert (row["prefer_epochs"], row["prefer_learning_rate"], row["prefer_beta"]) == (1, 0.001, 0.1)
    assert row["tuned_loss"] > 0 and row["tuned_loss"] != row["student_loss"]
    store = Store(chat_cell.config.store_path)
    inputs = chat_cell.record.inputs
    for model in ("base", "instruct", "prefer"):
        said = json.loads((store.path(inputs[f"answers_{model}"]) / "samples.json").read_text())
        hits = [sample["said"] == sample["answer"] for sample in said]
        assert row["metrics"][f"exact_match/{model}"] == share(hits) and len(hits) == 12
    tasks = [row["metrics"][f"exact_match/{task}/constant"]["value"] for task in TASKS]
    assert row["metrics"]["exact_match/constant"]["value"] == pytest.approx(sum(tasks) / len(tasks))
    assert {"reward_margin/start", "reward_margin/end", "exact_match/first/prefer"} <= row["metrics"].keys()
    assert [row["metrics"][f"rows_dropped/{stage}"]["value"] for stage in ("instruct", "prefer")] == [0, 0]
    frame = records.load(chat_cell.config.store_path)
    assert frame["metrics/exact_match/base"].notna().all()


def test_benchmarks_are_asked_of_the_tuned_model_too(tiny, tmp_path):
    given = ["student=40k", "teacher=55k", "instruct.count=40", "prefer.count=16", "evaluate.tasks=[pico_next]"]
    cell = pipeline.resolve(compose([*tiny, *given, f"store={tmp_path}"]))
    asked = cell.record.inputs
    assert asked["student_benchmark_0"].inputs["model"] is cell.distilled
    assert asked["tuned_benchmark_0"].inputs["model"] is cell.tuned["prefer"]


def test_the_tuned_model_chats_in_plain_transformers(chat_cell):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    store = Store(chat_cell.config.store_path)
    folder = store.path(chat_cell.tuned["prefer"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = read_rows(store.path(chat_cell.instructions) / "test.jsonl", "", TALK_FIELDS)
    wrong = [[*row["messages"][:-1], {"role": "assistant", "content": row["rejected"]}] for row in rows]
    gaps = [
        chat.answer_logprobs(model, tokenizer, [row["messages"]]) - chat.answer_logprobs(model, tokenizer, [other])
        for row, other in zip(rows, wrong, strict=True)
    ]
    (row,) = records.read(chat_cell.config.store_path)
    recorded = {m: row["metrics"][f"log_ratio/{m}"]["value"] for m in ("base", "instruct", "prefer")}
    assert len(set(recorded.values())) == 3, "or another model's weights would do"
    assert torch.cat(gaps).double().mean().item() == pytest.approx(recorded["prefer"], rel=1e-5)
    given = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    said = tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    own = load_model(folder)
    assert [said.strip()] == chat.answers(own, chat.chat_tokenizer(folder), [TALK[:1]], most=8)


def test_the_distilled_student_is_shared_with_cells_that_do_not_tune(chat_cell, tiny):
    plain = pipeline.resolve(compose([*tiny, "student=40k", "teacher=55k"]))
    assert plain.distilled.digest == chat_cell.distilled.digest
    assert plain.record.digest != chat_cell.record.digest


def _given_to(name, cell, monkeypatch):
    """What a stage of tuning gives its trainer, which does not train."""
    from capacity_gap.instruct import tuning

    caught = []

    def trainer(model, *given, **options):
        caught.extend(given)
        return model, [{"step": 1, "loss": 1.0}]

    monkeypatch.setattr(tuning, name, trainer)
    Store(cell.config.store_path).compute(cell.tuned["instruct" if name == "fine_tune" else "prefer"], Runtime())
    return caught


def test_replay_mixes_the_corpus_in(chat_cell, monkeypatch):
    """As many of the corpus' tokens for each of the conversations' as asked for, and all of them count."""
    config = dataclasses.replace(
        chat_cell.config, instruct=dataclasses.replace(chat_cell.config.instruct, replay=0.5), prefer=PreferConfig()
    )
    tokenizer, rows, _ = _given_to("fine_tune", pipeline.resolve(config), monkeypatch)
    talks, text = rows[:40], rows[40:]
    assert all(chat.IGNORED in row["labels"] for row in talks)
    assert all(row["labels"] == row["input_ids"] for row in text) and text
    ids = sum(len(row["input_ids"]) for row in talks)
    length = chat_cell.config.instruct.max_length
    assert [len(row["input_ids"]) for row in text] == [length] * round(0.5 * ids // length)
    assert "the" in tokenizer.decode(text[0]["input_ids"])


def test_adapters_are_their_own_reference(chat_cell, monkeypatch):
    """No second copy of the model is loaded for DPO of adapters."""
    for rank in (0, 2):
        pairs = dataclasses.replace(chat_cell.config.prefer, lora_rank=rank, beta=0.2)
        cell = pipeline.resolve(dataclasses.replace(chat_cell.config, prefer=pairs))
        reference, *_ = _given_to("prefer", cell, monkeypatch)
        assert (reference is None) == bool(rank)


def test_rows_of_your_own(tiny, text_file, tmp_path):
    talks, pairs = tmp_path / "talks.jsonl", tmp_path / "pairs.jsonl"
    talks.write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(20)))
    pairs.write_text(json.dumps({"messages": TALK[:3], "chosen": "blue", "rejected": "red"}) + "\n")
    given = [*tiny, "student=40k", "teacher=55k", f"instruct.path={talks}", "instruct.held_out=5"]
    cell = pipeline.resolve(compose([*given, f"prefer.path={pairs}", f"store={tmp_path / 'store'}"]))
    store = Store(cell.config.store_path)
    made = store.compute(cell.instructions, Runtime())
    assert [len((made / f).read_text().splitlines()) for f in ("instruct.jsonl", "test.jsonl", "pairs.jsonl")] == [
        15,
        5,
        1,
    ]
    assert (cell.description["instruct_rows"], cell.description["prefer_rows"]) == (15, 1)
    talks.write_text(json.dumps({"messages": TALK}) + "\n")
    assert pipeline.resolve(cell.config).instructions.digest != cell.instructions.digest


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "line 2 is not JSON"),
        ('{"text": "x"}', "line 2 has no messages. Each needs messages."),
        ('{"messages": [{"role": "system", "content": "x"}]}', "Allowed are user and assistant"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "ends with the assistant's turn"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "in turn, the user first"),
        ('{"messages": ["x"]}', "line 2: messages must be turns"),
        ('{"messages": "x"}', "line 2: messages must be turns"),
        ('{"messages": null}', "line 2: messages must be turns"),
        ('{"messages": []}', "line 2: messages must be turns"),
        ('{"messages": [{"role": "user"}]}', "line 2, turn 1 has no content: None"),
        ('{"messages": [{"role": "user", "content": " "}]}', "line 2, turn 1 has no content: ' '"),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', "line 2, turn 1 has no content"),
        (b"\xff\xfe", "line 2 is not UTF-8"),
    ],
)
def test_a_bad_row_says_where_and_what(line, said, tmp_path):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "rows.jsonl").write_bytes(json.dumps({"messages": TALK}).encode() + b"\n" + line + b"\n")
    with pytest.raises(ConfigError, match=said):
        read_rows(tmp_path / "rows.jsonl", "instruct.path", TALK_FIELDS)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"chosen": "a", "rejected": None}, "rejected is None"),
        ({"chosen": "", "rejected": "b"}, "chosen is ''"),
        ({"chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ],
)
def test_a_pair_has_two_answers(answers, said, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"messages": TALK[:1], **answers}) + "\n")
    with pytest.raises(ConfigError, match=said):
        read_rows(tmp_path / "pairs.jsonl", "prefer.path", PAIR)


LONG = [{"role": "user", "content": "word " * 150}, {"role": "assistant", "content": "red"}]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["instruct.path={bad}"], "line 1 is not JSON"),
        (["instruct.count=4000000"], "Request fewer"),
        (["instruct.path={long}", "instruct.held_out=5", "instruct.max_length=64"], "15 of 15 rows have no answer"),
        (["instruct.count=20", "instruct.held_out=5", "prefer.path={pairs}", "prefer.max_length=32"], "1 of 1 rows"),
        (["family=pico_gpt2", "instruct.path={talks}", "instruct.held_out=1", "instruct.answer_tokens=120"], "longest"),
    ],
)
def test_what_is_wrong_with_rows_is_said_before_anything_is_trained(given, said, tiny, tmp_path):
    pytest.importorskip("trl")
    files = {"bad": "{oops\n", "long": (json.dumps({"messages": LONG}) + "\n") * 20}
    files["talks"] = (json.dumps({"messages": TALK}) + "\n") * 20
    files["pairs"] = json.dumps({"messages": LONG[:1], "chosen": "a", "rejected": "b"}) + "\n"
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    given = [g.format(**{name: tmp_path / name for name in files}) for g in given]
    if "family=pico_gpt2" in given:
        given.append("instruct.max_length=64")
    config = compose([*tiny, "student=40k", "teacher=55k", *given, f"store={tmp_path / 'store'}"])
    with pytest.raises(ConfigError, match=said):
        run_config(config)
    assert not any((tmp_path / "store" / stage).exists() for stage in ("teacher", "distil", "instruct"))


def test_a_missing_extra_is_said_before_anything_is_trained(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    config = compose([*tiny, "student=40k", "teacher=55k", "instruct.count=40", f"store={tmp_path}"])
    with pytest.raises(StageError, match="needs trl, which is not installed"):
        run_config(config)
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["prefer.count=5"], "set instruct.count=N"),
        (["instruct.path=/no/such.jsonl"], "instruct.path=/no/such.jsonl does not exist"),
        (["instruct.count=-1"], "instruct.count=-1 is out of range"),
        (["instruct.count=5", "instruct.learning_rate=0"], "instruct.learning_rate=0.0 is out of range"),
        (["instruct.count=5", "prefer.beta=0"], "prefer.beta=0.0 is out of range"),
        (["instruct.count=5", "instruct.replay=-1"], "instruct.replay=-1.0 is out of range"),
        (["instruct.count=5", "family=pico_t5", "student=50k", "teacher=80k"], "is an encoder–decoder"),
        (["instruct.count=5", "family=pico_gpt2", "instruct.max_length=256"], "Set instruct.max_length=128 or less"),
        (
            ["instruct.count=5", "instruct.batch_size=8", "train.batch_size=3", "train.micro_batch_size=3"],
            "instruct.batch_size=8 does not split into micro-batches of train.micro_batch_size=3",
        ),
    ],
)
def test_bad_settings_say_what_to_do(tiny, given, said):
    with pytest.raises(ConfigError, match=said):
        pipeline.resolve(compose([*tiny, *given]))


def test_export_writes_a_model_that_plain_transformers_loads(chat_cell, tmp_path, capsys):
    """Sharded safetensors with the same weights, the chat template, and a card with lineage, scores, law, licences."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from capacity_gap.commands import cli

    store, out = chat_cell.config.store_path, tmp_path / "out"
    assert cli.main(["export", chat_cell.record.digest[:8], str(out), "--store", str(store), "--shard", "60KB"]) == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    own = dict(load_model(Store(store).path(chat_cell.tuned["prefer"])).named_parameters())
    for name, parameter in AutoModelForCausalLM.from_pretrained(out).named_parameters():
        assert torch.equal(parameter, own[name])
    assert "[|Assistant|]" in AutoTokenizer.from_pretrained(out).chat_template
    card = (out / "README.md").read_text(encoding="utf-8")
    for stage in ("teacher", "scores", "student", "distil", "instruct", "prefer"):
        assert f"| {stage} | `" in card
    for said in ("held-out loss", "No law can be fitted", "the user's text files"):
        assert said in card
    tuned = next(line for line in card.splitlines() if line.startswith("| instruct |"))
    assert f"epochs {chat_cell.config.instruct.epochs}" in tuned and "lora_rank none, all weights" in tuned
    _check_scores_are_the_exported_models(card, chat_cell)
    for file in ("config.json", "generation_config.json"):
        assert json.loads((out / file).read_text()).get("use_cache") is not False, "generation would be slow"
    assert "[|Assistant|]" in use_as_the_card_says(out)
    assert cli.main(["export", "0" * 12, str(tmp_path / "other"), "--store", str(store)]) == 2
    assert "matches 0 recorded cells" in capsys.readouterr().err
    assert cli.main(["export", chat_cell.record.digest, str(out), "--store", str(store)]) == 2
    assert "is not empty" in capsys.readouterr().err


def _check_scores_are_the_exported_models(card, cell):
    """What a tuned model's card says of it is not what the student was before it was tuned."""
    from capacity_gap.export.student import Lineage

    (row,) = records.read(cell.config.store_path)
    own, before = card.split("## Scores of this model")[1].split("## For comparison")
    assert f"| held-out loss, nats per token | {row['tuned_loss']:.4f} |" in own
    held_out = Lineage.of(Store(cell.config.store_path), cell.record.digest).held_out
    assert held_out["test"]["loss"] == row["tuned_loss"] != row["student_loss"]
    assert f"| exact_match | {row['metrics']['exact_match/prefer']['value']:.4f} |" in own
    assert "/base" not in own and "/instruct" not in own
    assert f"| the student before tuning | {row['student_loss']:.4f} |" in before


def test_a_users_instruction_files_are_among_the_parents(chat_cell, tmp_path):
    from capacity_gap.export.student import Lineage

    shutil.copytree(chat_cell.config.store_path, tmp_path / "store")
    store = Store(tmp_path / "store")
    file = store.path(chat_cell.instructions) / "stage.json"
    meta = json.loads(file.read_text())
    meta["config"] |= {"rows": "0" * 64, "pair_rows": "1" * 64}  # as with instruct.path= and prefer.path=
    write_checked(file, meta)
    parents = dict(Lineage.of(store, chat_cell.record.digest).parents)
    assert {"the user's file of conversations", "the user's file of preferences"} < set(parents)


def test_export_of_a_student_that_was_not_tuned(tiny_cell, tmp_path):
    from transformers import AutoTokenizer

    from capacity_gap.export.student import export

    cell = pipeline.resolve(tiny_cell)
    out = export(Store(tiny_cell.store_path), cell.record.digest, tmp_path / "out")
    assert load_model(out).config.vocab_size == len(AutoTokenizer.from_pretrained(out))
