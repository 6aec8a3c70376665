"""Ladders: exact counts without building, stand-ins of every architecture, and the user's own folders."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from capacity_gap import records
from capacity_gap.cell import pipeline
from capacity_gap.cell.teacher_config import FamilyConfig
from capacity_gap.commands import cli
from capacity_gap.data.tokenizer import bytes_per_id
from capacity_gap.models.axes import count_params, dims
from capacity_gap.models.building import auto_class
from capacity_gap.models.folders import checkpoint_family
from capacity_gap.models.ladders import FAMILIES, Family
from capacity_gap.models.loading import load_model
from capacity_gap.pruning.methods import LAYER_SCORES, SCORES
from capacity_gap.pruning.shape import shape_of
from capacity_gap.pruning.surgery import prune
from capacity_gap.runner.run_cell import run_config
from capacity_gap.settings.errors import ConfigError, ImpossibleCell, StageError
from capacity_gap.settings.registry import Entry
from capacity_gap.settings.scales import parse_scale
from capacity_gap.store.stage import Store
from tests.conftest import compose, ran, run_here, run_py
from tests.small_models import DERIVED, TOKENS, UNCUT, small_model

RUNGS = [(f.name, rung) for f in FAMILIES.values() for rung in f.rungs]
STAND_INS = ("pico_gpt2", "pico_neox", "pico_mistral", "pico_t5")


@pytest.mark.parametrize(("name", "rung"), RUNGS)
def test_a_rung_has_exactly_the_parameters_that_its_table_counts(name, rung):
    settings = dict(FAMILIES[name].rungs[rung])
    written = copy.deepcopy(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    assert FAMILIES[name].params[rung] == sum(p.numel() for p in model.parameters())
    assert count_params(config) == FAMILIES[name].params[rung], "counting a config object gives the same"
    assert FAMILIES[name].rungs[rung] == written, "transformers fills in nothing: shapes are hashed"


# Published sizes, from the models' cards: they guard the shapes written down in the ladders.
PUBLISHED = {
    ("pythia", "70m"): 70_426_624,
    ("pythia", "2.8b"): 2_775_208_960,
    ("gpt2", "124m"): 124_439_808,
    ("gpt2", "1.5b"): 1_557_611_200,
    ("opt", "350m"): 331_196_416,
    ("llama2", "7b"): 6_738_415_616,
    ("llama2", "70b"): 68_976_648_192,
    ("mistral", "7b"): 7_241_732_096,
    ("qwen2_5", "0.5b"): 494_032_768,
    ("qwen2_5", "7b"): 7_615_616_512,
    ("qwen3", "0.6b"): 596_049_920,
    ("qwen3", "1.7b"): 1_720_574_976,
    ("qwen3", "4b"): 4_022_468_096,
    ("qwen3", "8b"): 8_190_735_360,
    ("qwen3", "14b"): 14_768_307_200,
    ("llama3", "1b"): 1_235_814_400,
    ("llama3", "3b"): 3_212_749_824,
    ("llama3", "8b"): 8_030_261_248,
    ("llama3", "70b"): 70_553_706_496,
    ("gemma3", "270m"): 268_098_176,
    ("gemma3", "1b"): 999_885_952,
    ("smollm2", "135m"): 134_515_008,
    ("smollm2", "360m"): 361_821_120,
    ("smollm2", "1.7b"): 1_711_376_384,
    ("olmo2", "1b"): 1_484_916_736,
    ("olmo2", "7b"): 7_298_617_344,
    ("olmo2", "13b"): 13_716_198_400,
    ("olmo2", "32b"): 32_234_279_936,
}
# What decides a model's function beside its sizes, from the config.json of its repository: rotary base and stretch,
# epsilon of the norms, heads, the last position. Random students are made from rungs, so rungs must say it.
FUNCTION = {
    ("qwen3", "0.6b"): (1e6, None, 1e-6, 128, 32768),
    ("qwen3", "14b"): (1e6, None, 1e-6, 128, 32768),
    ("llama3", "1b"): (5e5, 32.0, 1e-5, 64, 131072),
    ("llama3", "3b"): (5e5, 32.0, 1e-5, 128, 131072),
    ("llama3", "70b"): (5e5, 8.0, 1e-5, 128, 131072),
    ("smollm2", "135m"): (1e5, None, 1e-5, 64, 8192),
    ("smollm2", "1.7b"): (1.3e5, None, 1e-5, 64, 8192),
    ("olmo2", "1b"): (5e5, None, 1e-6, 128, 4096),
    ("olmo2", "32b"): (5e5, None, 1e-6, 128, 4096),
}


def test_published_sizes():
    assert {key: FAMILIES[key[0]].params[key[1]] for key in PUBLISHED} == PUBLISHED


def config_of(shape):
    """The config that transformers makes of a rung."""
    settings = copy.deepcopy(dict(shape))
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def test_a_rung_says_what_decides_its_function():
    found = {}
    for name, rung in FUNCTION:
        made = config_of(FAMILIES[name].rungs[rung])
        rope, width = made.rope_parameters, dims(made).head_dim
        found[name, rung] = (
            rope["rope_theta"],
            rope.get("factor"),
            made.rms_norm_eps,
            width,
            made.max_position_embeddings,
        )
    assert found == FUNCTION
    scaled = config_of(FAMILIES["llama3"].rungs["8b"]).rope_parameters
    kept = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert scaled == {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **kept}
    assert config_of(FAMILIES["cerebras_gpt"].rungs["111m"]).activation_function == "gelu"
    assert config_of(FAMILIES["qwen3"].rungs["4b"]).layer_types == ["full_attention"] * 36


def test_the_layers_of_gemma_slide_in_all_but_every_sixth():
    for rung, layers in (("270m", 18), ("1b", 26)):
        made = config_of(FAMILIES["gemma3"].rungs[rung])
        assert [i for i, kind in enumerate(made.layer_types, 1) if kind == "full_attention"] == [
            *range(6, layers + 1, 6)
        ]
        assert (made.sliding_window, made.query_pre_attn_scalar) == (512, 256)
        thetas = {kind: rope["rope_theta"] for kind, rope in made.rope_parameters.items()}
        assert thetas == {"full_attention": 1e6, "sliding_attention": 1e4}


@pytest.mark.parametrize(
    ("name", "rung", "why"), [("qwen3", "32b", "no base model"), ("gemma3", "4b", "is multimodal")]
)
def test_a_model_that_is_no_rung_says_why(name, rung, why):
    with pytest.raises(ImpossibleCell, match=why):
        pipeline.resolve(compose([f"family={name}", f"teacher={rung}", "student=300m"]))


def test_what_cannot_be_cut_yet_is_refused_before_any_compute(tmp_path):
    (tmp_path / "moe").mkdir()
    kind, small = UNCUT["qwen2_moe"]
    (tmp_path / "moe" / "config.json").write_text(json.dumps({"model_type": kind, **small, "eos_token_id": 0}))
    given = [f"teacher={tmp_path / 'moe'}", "student=5k", "plan=true"]
    for more in ([], ["prune.init=random"], ["data=0"]):
        with pytest.raises(ConfigError, match=r"is not an axis that can be cut.* student=ORG/NAME or student=FOLDER"):
            pipeline.resolve(compose([*given, *more]))


def test_a_random_gemma_has_the_same_layers_under_every_teacher():
    given = ["family=gemma3", "student=200m", "prune.init=random"]
    shapes = [pipeline.resolve(compose([*given, f"teacher={rung}"])).student_shape for rung in ("270m", "1b")]
    assert shapes[0] == shapes[1]
    kinds = config_of(shapes[0]).layer_types
    assert [i for i, kind in enumerate(kinds, 1) if kind == "full_attention"] == [6, 12, 18]


@pytest.mark.parametrize("name", [n if n == "gemma3" else pytest.param(n, marks=pytest.mark.slow) for n in DERIVED])
def test_a_ladder_without_a_written_table_is_cut_and_trained(name, tiny, tmp_path, monkeypatch):
    kind, small = DERIVED[name]
    shape = {
        "model_type": kind,
        **small,
        "vocab_size": 1024,
        "num_hidden_layers": 4,
        "head_dim": 6,  # heads of one size in both rungs
        "eos_token_id": 0,
        "bos_token_id": 0,
    }
    larger = {"hidden_size": 48, **{"bloom": {"n_head": 8}, "mpt": {"n_heads": 8}}.get(kind, {"intermediate_size": 96})}
    rungs = {"small": {**shape, "hidden_size": 24}, "large": {**shape, **larger}}
    ladder = Family("ladder", rungs, 1)
    monkeypatch.setitem(FAMILIES._entries, "ladder", Entry("ladder", ladder, "tests", traits={"dtype": "fp32"}))
    student = ladder.params["small"]
    config = compose([*tiny, f"student={student}", f"store={tmp_path}"])
    config = dataclasses.replace(
        config, teacher=str(ladder.params["large"]), family=FamilyConfig("ladder", teacher_data="8k")
    )
    run_config(config)
    (row,) = records.read(tmp_path)
    assert (row["status"], row["init"], row["student_params"]) == ("done", "pruned", student)
    assert row["student_loss"] < row["init_loss"]


@pytest.mark.parametrize("name", [n if n == "qwen2_moe" else pytest.param(n, marks=pytest.mark.slow) for n in UNCUT])
def test_what_cannot_be_cut_teaches_a_student_that_is_a_model(name, folders, tiny, tmp_path):
    model = small_model(name, vocab_size=1024, eos_token_id=0, bos_token_id=0).float()
    model.save_pretrained(tmp_path / "teacher")
    for file in (folders / "small").glob("token*.json"):
        shutil.copy(file, tmp_path / "teacher")
    given = [g for g in tiny if not g.startswith("family.")]
    student = small_model("llama", vocab_size=1024, eos_token_id=0, bos_token_id=0, hidden_size=8).float()
    student.save_pretrained(tmp_path / "student")
    for file in (folders / "small").glob("token*.json"):
        shutil.copy(file, tmp_path / "student")
    words = [f"teacher={tmp_path / 'teacher'}", f"student={tmp_path / 'student'}", f"store={tmp_path / 'store'}"]
    row = ran(compose([*given, *words]))
    assert (row["status"], row["init"]) == ("done", "pretrained")
    assert row["teacher_params"] == sum(p.numel() for p in model.parameters())
    assert row["student_loss"] < row["init_loss"]


@pytest.mark.parametrize("name", UNCUT)
def test_the_library_refuses_to_score_or_cut_it_too(name):
    model = small_model(name)
    for score in (*SCORES, *LAYER_SCORES):
        with pytest.raises(ConfigError, match="cannot be scored or cut yet"):
            (SCORES[score](model, TOKENS, seed=0) if score in SCORES else LAYER_SCORES[score](model, TOKENS))
    scores = SCORES["expressive"](small_model("llama"), TOKENS, seed=0)
    with pytest.raises(ConfigError, match="cannot be scored or cut yet"):
        prune(model, scores, shape_of(model.config))


@pytest.mark.parametrize("name", ["pico", *STAND_INS])
def test_pico_ladders_are_true_to_their_names_and_grow_along_every_axis(name):
    ladder = FAMILIES[name]
    for rung, params in ladder.params.items():
        assert abs(params / parse_scale(rung, key="rung") - 1) < 0.005
    sizes = [dims(r) for r in ladder.rungs.values()]
    for axis in ("hidden", "kv_heads", "neurons", "layers"):
        grown = [getattr(s, axis) for s in sizes]
        assert grown == sorted(grown), axis


@pytest.mark.slow
@pytest.mark.parametrize("name", STAND_INS)
def test_a_stand_in_is_pre_trained_evaluated_and_trained_directly(name, tiny, warm):
    given = [*tiny, f"family={name}", "student=60k", "teacher=80k", f"store={warm}"]
    row = ran(compose([*given, "prune.init=random", "distill=direct"]))
    assert (row["status"], row["family"]) == ("done", name)
    assert row["student_loss"] < row["init_loss"]
    assert row["student_params"] < row["teacher_params"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (i > 0)) for i, n in enumerate(STAND_INS)])
def test_every_architecture_is_pruned_and_distilled_to_its_record(tiny, warm, name):
    row = ran(compose([*tiny, f"family={name}", "student=60k", "teacher=80k", f"store={warm}"]))
    assert (row["status"], row["init"], row["prune_method"]) == ("done", "pruned", "expressive")
    assert abs(row["student_params"] / 60_000 - 1) < 0.005


PRUNED_OTHERWISE = [
    (["prune.priority=global"], {"prune_priority": "global"}),
    (["prune.iterative=2", "prune.step_data=2k"], {"prune_steps": 2}),
    (["prune.layers=block_influence", "prune.depth=3"], {"prune_layers": "block_influence"}),
    (["prune.shape=fixed", "prune.fixed=3x32x4x80", "student=68k"], {"shape": "3x32x4x80"}),
    (["prune.method=movement"], {"prune_method": "movement"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "recorded"), PRUNED_OTHERWISE, ids=[g[0] for g, _ in PRUNED_OTHERWISE])
def test_every_way_to_prune_reaches_its_record(tiny, warm, given, recorded):
    config = compose([*tiny, "student=60k", "teacher=80k", f"store={warm}", *given])
    row = ran(config)
    assert {k: row[k] for k in recorded} == recorded
    assert row["student_loss"] < 7
    assert row["stored_params"] >= row["student_params"]
    plain = pipeline.resolve(compose([*tiny, "student=60k", "teacher=80k", f"store={warm}"]))
    assert plain.student.digest != pipeline.resolve(config).student.digest


def test_a_quantised_teacher_can_teach_but_not_be_cut():
    given = ["family=llama2", "student=1b", "teacher=7b", "family.quantization=8bit"]
    with pytest.raises(ConfigError, match="a quantised teacher cannot be pruned"):
        pipeline.resolve(compose(given))
    assert pipeline.resolve(compose([*given, "prune.init=random"]))


def test_learned_positions_end(tiny):
    with pytest.raises(
        ConfigError, match="sequence_length=256, but models of pico_gpt2 have learned positions for 128"
    ):
        pipeline.resolve(compose([*tiny, "family=pico_gpt2", "teacher=80k", "corpus.sequence_length=256"]))


def test_a_student_named_as_a_rung_has_the_rungs_exact_size():
    cell = pipeline.resolve(compose(["family=qwen2_5", "student=0.5b", "teacher=0.5b"]))
    assert cell.description["student_params"] == cell.description["teacher_params"] == 494_032_768


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Two model folders, as save_pretrained leaves them."""
    out = tmp_path_factory.mktemp("models")
    store = Store(out / "store")
    for rung, name in (("55k", "small"), ("80k", "large")):
        cell = pipeline.resolve(compose([*tiny, "student=40k", f"teacher={rung}", f"store={store.root}"]))
        run_config(cell.config)
        shutil.copytree(store.path(cell.teacher), out / name)
        for file in store.path(cell.tokenizer).glob("token*.json"):
            shutil.copy(file, out / name)
    return out


@pytest.mark.slow
def test_a_grid_over_ones_own_folders(folders, tiny, tmp_path):
    both = f"family.folders=[{folders}/small,{folders}/large]"
    given = [g for g in tiny if not g.startswith("family.")]
    done = run_py(
        "-m", *given, "family=folders", both, "teacher=small,large", "student=40k", f"store={tmp_path}", cwd=folders
    )
    assert "grid: 2 done" in done.stdout
    rows = {r["teacher"]: r for r in records.read(tmp_path)}
    assert set(rows) == {"small", "large"}
    assert rows["small"]["teacher_params"] == 55_032
    assert rows["small"]["teacher_tokens"] is None
    assert len({r["student_params"] for r in rows.values()}) == 1
    trained = {r["teacher"]: r for r in records.read(folders / "store")}
    assert rows["small"]["teacher_loss"] == trained["55k"]["teacher_loss"]


@pytest.mark.slow
def test_a_teacher_in_bf16_teaches_nearly_the_same(folders, tiny, tmp_path):
    given = [g for g in tiny if not g.startswith("family.")]
    for dtype in ("fp32", "bf16"):
        local = ["family=folders", f"family.folders=[{folders}/small]", "teacher=small", "student=40k"]
        run_config(compose([*given, *local, f"family.dtype={dtype}", f"store={tmp_path}"]))
    one, two = records.read(tmp_path)
    assert one["teacher_loss"] != two["teacher_loss"]
    assert one["teacher_loss"] == pytest.approx(two["teacher_loss"], abs=0.02)
    assert one["student_loss"] == pytest.approx(two["student_loss"], abs=0.05)


def test_a_teacher_named_by_its_folder_is_not_recorded_under_the_default_family(folders, tiny):
    given = [g for g in tiny if not g.startswith("family.")]
    cell = pipeline.resolve(compose([*given, f"teacher={folders}/small", "student=40k"]))
    assert cell.description["family"] == "folders"


def test_a_teacher_held_in_bf16_is_adapted_in_fp32(folders, tiny, tmp_path):
    given = [g for g in tiny if not g.startswith("family.")]
    local = ["family=folders", f"family.folders=[{folders}/small]", "teacher=small", "student=40k", "adapt.data=4k"]
    config = compose([*given, *local, "family.dtype=bf16", f"store={tmp_path}"])
    run_config(config)
    weights = load_file(Store(tmp_path).path(pipeline.resolve(config).teacher) / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert any((w != w.bfloat16().float()).any() for w in weights.values()), "and its steps are not rounded away"


def test_folders_that_cannot_serve_are_named(folders, tmp_path):
    with pytest.raises(ConfigError, match="is not a model folder: it has no config.json"):
        checkpoint_family([str(tmp_path)])
    pickled = tmp_path / "pickled"
    shutil.copytree(folders / "small", pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \.safetensors weights; pickled ones"):
        checkpoint_family([str(pickled)])
    other = tmp_path / "other"
    shutil.copytree(folders / "large", other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    token = next(t for t, i in vocab.items() if i == 900)
    del vocab[token]
    (other / "tokenizer.json").write_text(json.dumps(content | {"model": content["model"] | {"vocab": vocab}}))
    with pytest.raises(ConfigError, match=r"different vocabularies \(1023 and 1024 tokens; the first differences"):
        checkpoint_family([str(folders / "small"), str(other)])


def test_a_bad_folder_stops_before_compute(tmp_path):
    done = run_here("family=folders", f"teacher={tmp_path}", f"store={tmp_path / 'store'}", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not a model folder" in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_checkpoint_that_cannot_be_had_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from capacity_gap.models.loading import copy_tokenizer

    with pytest.raises(StageError, match=r"cannot be loaded: HF_HUB_OFFLINE is set.*capacity_gap fetch nobody/nothing"):
        copy_tokenizer("nobody/nothing", tmp_path)
    assert cli.main(["fetch", "qwen2_5:0.5b"]) == 2
    assert "Qwen/Qwen2.5-0.5B cannot be fetched" in capsys.readouterr().err
    assert cli.main(["fetch", "qwen2_5:9b"]) == 2
    assert "Its rungs: 0.5b 1.5b" in capsys.readouterr().err


def test_a_ladder_whose_checkpoints_have_other_tokens_stops_before_compute(folders, tiny, tmp_path, monkeypatch):
    """As on the hub, where a ladder is written down before its tokenizers are seen: equal sizes, two tokens swapped."""
    places = {name: tmp_path / name for name in ("small", "large")}
    for name, place in places.items():
        shutil.copytree(folders / name, place)
    shapes = {name: json.loads((place / "config.json").read_text()) for name, place in places.items()}
    ladder = Family("ladder", shapes, 1, {name: str(place) for name, place in places.items()})
    monkeypatch.setitem(FAMILIES._entries, "ladder", Entry("ladder", ladder, "tests", traits={"dtype": "fp32"}))
    content = json.loads((places["large"] / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    one, two = list(vocab)[-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (places["large"] / "tokenizer.json").write_text(json.dumps(content))
    config = compose([*tiny, "student=40k", "teacher=large", f"store={tmp_path / 'store'}"])
    with pytest.raises(StageError, match="large has another vocabulary .*1,024 and 1,024 tokens"):
        run_config(dataclasses.replace(config, family=FamilyConfig("ladder")))
    assert not (tmp_path / "store" / "published").exists()


def test_a_vocabulary_lower_than_its_tokenizer_stops_before_compute(folders, tiny, tmp_path):
    shutil.copytree(folders / "small", tmp_path / "low")
    low = load_model(tmp_path / "low")
    low.resize_token_embeddings(1000)
    low.save_pretrained(tmp_path / "low")
    given = [g for g in tiny if not g.startswith("family.")]
    local = ["family=folders", f"family.folders=[{tmp_path}/low]", "teacher=low", "student=40k"]
    with pytest.raises(ConfigError, match="vocabulary has 1,000 rows, its tokenizer 1,024 tokens"):
        run_config(compose([*given, *local, f"store={tmp_path / 'store'}"]))


def test_bytes_of_sentencepiece_tokens():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = [("<s>", 0.0), ("▁the", -1.0), ("é", -1.0), ("<0x0A>", -1.0)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=0))
    raw.decoder = decoders.Metaspace()
    assert bytes_per_id(PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")) == [0, 4, 2, 1]


def test_names_that_cannot_be_fetched_say_why(capsys):
    for name, said in (("pico:55k", "teachers of pico are trained here"), ("a/b/c", "a/b/c cannot be fetched")):
        assert cli.main(["fetch", name]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected", "told"),
    [
        ([], None, None),
        (["prune.depth=3"], "loss_increase", "loss_increase"),
        (["prune.depth=3", "prune.layers=symmetric"], None, None),
        (["prune.depth=3", "prune.layers=block_influence"], "block_influence", "block_influence"),
        (["prune.layers=block_influence"], "block_influence", "block_influence"),
        (["prune.depth=3", "prune.init=random"], None, None),
        (["family=pico_t5", "teacher=180k", "student=80k"], None, None),
        (["family=pythia", "student=60m", "teacher=410m", "corpus=embedded"], "loss_increase", "loss_increase"),
        (["family=pythia", "student=60m", "teacher=160m", "corpus=embedded"], "loss_increase", "loss_increase"),
        (["family=pythia", "student=60m", "teacher=70m", "corpus=embedded"], None, "loss_increase"),
        (["family=pythia", "student=60m", "teacher=410m", "prune.shape=per_teacher", "corpus=embedded"], None, None),
    ],
)
def test_layers_go_by_a_score_where_any_go_and_a_curve_has_one_answer(given, expected, told):
    cell = pipeline.resolve(compose(given))
    assert cell.layer_score == expected
    if cell.config.prune.cuts:
        assert cell.student.config.get("layers") == cell.scores.config.get("layers") == expected
    assert cell.description.get("prune_layers") == told


def test_the_old_default_by_name_is_the_cell_it_always_was():
    named = pipeline.resolve(compose(["prune.layers=symmetric"])).record.digest
    assert named == pipeline.resolve(compose([])).record.digest
