"""Axis tables that are read off transformers' classes: right, proved, and found without torch where they are known."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from benchmarks.architectures import KNOWN, PUBLISHED, TYPES
from capacity_gap.commands import cli
from capacity_gap.distill.distill_config import DistillConfig
from capacity_gap.distill.signals import _targets
from capacity_gap.evaluate.heldout import _sequence_means
from capacity_gap.models.axes import architecture, check_head, config_with, count_params, cuttable, dims
from capacity_gap.models.defaults import completed
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.pruning import choose_shape, expressive_scores, prune
from capacity_gap.pruning.kept_units import choose_units
from capacity_gap.pruning.lm_loss import lm_loss
from capacity_gap.pruning.methods import random_scores
from capacity_gap.pruning.proof import check_proved, prove
from capacity_gap.pruning.shape import between, fixed_shape
from capacity_gap.settings.errors import ConfigError
from capacity_gap.structure import derived
from capacity_gap.structure.architecture import Sublayer, heads_of_same_slopes
from capacity_gap.structure.derive import derive, probe_of
from capacity_gap.structure.probing import randomised
from capacity_gap.training.loop import Objective, _teach
from tests.conftest import ROOT
from tests.small_models import SMALL, masked

COMMITTED = json.loads(derived.COMMITTED.read_text())
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe")
# What is unlike Llama in most ways.
SAMPLE = ("gemma3_text", "olmo2", "phi3", "codegen", "cohere", "gpt_bigcode", "gpt_oss", "phimoe")
pytestmark = pytest.mark.filterwarnings("ignore:CUDA-fused xIELU")


def sampled(kinds):
    """All of them, of which some are for the default run."""
    return [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in SAMPLE)) for kind in kinds]


def of_type(kind, **more):
    return completed({"model_type": kind, **PUBLISHED.get(kind, {}), **more})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", sampled(TYPES))
def test_every_claim_of_a_table_holds(kind, tied):
    checks = prove(of_type(kind, tie_word_embeddings=tied))
    axes = ["hidden", "heads", "neurons", "layers", *["experts"] * (kind in MIXTURES)]
    assert [c.name for c in checks] == ["count", *axes, "sites", "permuted", "head", "reload", "generation"]
    assert [f"{c.name}: {c.said}" for c in checks if not c.held and (kind, c.name) not in KNOWN] == []


@pytest.mark.parametrize(
    "kind", [pytest.param(t, marks=[pytest.mark.slow] * (t not in SAMPLE)) for t in COMMITTED["types"]]
)
def test_the_committed_tables_are_what_is_derived(kind):
    known = COMMITTED["types"][kind]
    again = derived.answer({"type": kind})
    assert {k: known[k] for k in again} == json.loads(json.dumps(again))
    for flags, table in known["tables"].items():
        assert json.loads(json.dumps(derived.answer({"type": kind, "flags": json.loads(flags)}))) == table


def test_the_written_tables_are_what_would_be_derived():
    """But for T5, which is no decoder, and OPT, whose embeddings may be narrower than its layers."""
    for name, (kind, settings) in SMALL.items():
        if kind in ("t5", "opt"):
            continue
        config = completed({"model_type": kind, **settings})
        written, found = architecture(config), derive(config).table
        assert dict(found.parameters) == dict(written.parameters), name
        assert (found.stacks, found.square, found.output) == (written.stacks, written.square, written.output), name


def renamed(old, new):
    """A change of a table that calls an axis otherwise."""
    return lambda table: {n: tuple(new if a == old else a for a in axes) for n, axes in table.parameters.items()}


WRONG = [
    ("persimmon", "permuted", renamed("qkv_by_head", "qkv")),
    ("phi3", "heads", renamed("qkv_grouped", "qkv")),
    ("glm", "neurons", renamed("gate_up", "gate_up_by_neuron")),
]


@pytest.mark.parametrize(("kind", "check", "wrong"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_order_inside_a_fused_map_is_found(kind, check, wrong, monkeypatch):
    use_table(monkeypatch, lambda table: replace(table, parameters=wrong(table)))
    found = {c.name: c.held for c in prove(of_type(kind, num_key_value_heads=None))}
    assert not found[check]


@pytest.mark.parametrize("tied", [False, True])
def test_a_factor_that_changes_with_the_width_is_found(tied, monkeypatch):
    use_table(monkeypatch, lambda table: replace(table, root_scaled=False))
    found = {c.name: c.held for c in prove(of_type("gemma", tie_word_embeddings=tied))}
    assert not found["hidden"] and found["neurons"]


def test_a_wrong_factor_of_the_last_norm_is_found(monkeypatch):
    use_table(monkeypatch, lambda table: replace(table, norm_offset=0.0))
    found = {c.name: c.held for c in prove(of_type("gemma", tie_word_embeddings=True))}
    assert not found["hidden"] and found["neurons"]


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("phi3", {"mlp": Sublayer("mlp.down_proj", "mlp.down_proj"), "stream": ()}, "the table does not say so"),
        ("phi3", {"stream": ("input_layernorm",)}, "input_layernorm of layer 0 does not read the stream between"),
        ("olmo2", {"mlp": Sublayer("mlp", "mlp.down_proj")}, "do not make layer 0's output of its input"),
        ("phi3", {"stream": ("no_such_norm",)}, "layer 0 has no no_such_norm"),
    ],
)
def test_wrong_places_of_masks_are_found(kind, change, said, monkeypatch):
    use_table(monkeypatch, lambda table: replace(table, stacks=(replace(table.stacks[0], **change),)))
    (sites,) = (c for c in prove(of_type(kind)) if c.name == "sites")
    assert not sites.held and said in sites.said


def use_table(monkeypatch, change):
    """Tables come out changed; what is remembered of right ones is forgotten meanwhile."""
    from capacity_gap.models import axes

    table = derived.table
    monkeypatch.setattr(derived, "table", lambda config: change(table(config)))
    monkeypatch.setattr(axes, "_read", axes._read.__wrapped__)


def test_plans_know_common_types_without_torch():
    script = (
        "import sys\n"
        "from capacity_gap.models.axes import count_params\n"
        "from capacity_gap.models.ladders import FAMILIES\n"
        "print(FAMILIES['gemma3'].params['1b'], count_params({'model_type': 'phi3'}))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["999885952", "3821079552"]


@pytest.mark.slow
def test_other_flags_are_derived_once_in_a_process_of_their_own(tmp_path):
    script = (
        "import sys, time\n"
        "from capacity_gap.models.axes import count_params\n"
        "from capacity_gap.structure import derived\n"
        "print(count_params({'model_type': 'granite', 'attention_bias': True, 'num_hidden_layers': 2}))\n"
        "assert 'torch' not in sys.modules\n"
        "print(len(list(derived.cache_folder().glob('*.json'))))\n"
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    given = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    first = subprocess.run([sys.executable, "-c", script], env=environment, **given).stdout.split()
    without = count_params({"model_type": "granite", "num_hidden_layers": 2})
    sizes = dims({"model_type": "granite"})
    biases = 2 * (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim + 2 * sizes.hidden
    assert first == [str(without + biases), "1"]
    (file,) = (tmp_path / "capacity_gap" / "tables").iterdir()
    kept = json.loads(file.read_text())
    kept["table"]["parameters"].pop("model.norm.weight")
    file.write_text(json.dumps(kept))  # read again, and not derived again
    again = subprocess.run([sys.executable, "-c", script], env=environment, **given).stdout.split()
    assert again == [str(without + biases - sizes.hidden), "1"]


def test_a_table_that_was_derived_here_is_proved_before_it_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = of_type("persimmon", qk_layernorm=False)
    check_proved(config)
    use_table(monkeypatch, lambda table: replace(table, parameters=WRONG[0][2](table)))
    with pytest.raises(ConfigError, match=r"derived axis table fails the checks .*heads .*permuted"):
        check_proved({**config, "initializer_range": 0.01})
    check_proved(of_type("persimmon"))  # of the package, proved by the tests above


def test_what_is_no_decoder_is_named(capsys):
    with pytest.raises(ConfigError, match=r"has no decoder of the type 'vit'.*\. If it is your own model"):
        architecture({"model_type": "vit"})
    assert cli.main(["check", "nosuch"]) == 2
    assert "has no decoder of the type 'nosuch'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "params", "why"),
    [
        ("qwen2_moe", 14_315_784_192, "is not an axis that can be cut"),
        ("falcon", 6_921_720_704, "config.json lacks neurons"),
        ("mamba", 159_308_544, "config.json lacks heads"),
    ],
)
def test_what_cannot_be_cut_is_counted_and_says_why(kind, params, why):
    config = completed({"model_type": kind})
    assert count_params(config) == params
    with pytest.raises(ConfigError, match=f"cannot be scored or cut yet: .*{why}"):
        cuttable(config)


def test_check_says_what_can_be_cut(capsys, tmp_path):
    assert cli.main(["check", "gemma3:270m"]) == 0
    said = capsys.readouterr().out
    assert "gemma3:270m: gemma3_text, 268,098,176 parameters" in said
    assert said.endswith("can be cut: hidden, heads, neurons, layers.\n")
    (tmp_path / "config.json").write_text(
        json.dumps({**FAMILIES["gemma3"].rungs["270m"], "attn_logit_softcapping": 30.0})
    )
    assert cli.main(["check", str(tmp_path)]) == 1
    assert "head       FAILS: ConfigError: this gemma3_text has attn_logit_softcapping=30.0" in capsys.readouterr().out


FLAGS = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0},
    "phi": {},
}


@pytest.mark.parametrize("kind", FLAGS)
def test_losses_are_those_of_the_models_own_logits(kind):
    """Logits that are capped, multiplied, divided, or have a bias: trained, taught by, evaluated."""
    config = probe_of({"model_type": kind, "tie_word_embeddings": False, **FLAGS[kind]})
    student, teacher = (randomised(config, seed=seed).double() for seed in (1, 2))
    tokens = torch.randint(3, 200, (2, 8), generator=torch.Generator().manual_seed(7))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    ours, theirs = (m(inputs, use_cache=False).logits for m in (student, teacher))
    ce = F.cross_entropy(ours.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(lm_loss(student, tokens), ce)
    q, p = ours.log_softmax(-1), theirs.softmax(-1).detach()
    kl = (p * (p.log() - q)).sum(-1).mean()
    objective = Objective(student, DistillConfig(kd_weight=0.7))
    found, parts = objective(inputs, labels, _teach(Accelerator(cpu=True), teacher, inputs, tokens), labels.numel())
    torch.testing.assert_close(parts["kl"], kl.detach())
    expected = 0.3 * ce + 0.7 * kl
    torch.testing.assert_close(found, expected)
    weights = [w for name, w in student.named_parameters() if "norm" not in name][:4]
    pairs = zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two)
    with torch.no_grad():
        loss, entropy = _sequence_means(student, tokens)
    torch.testing.assert_close(loss.mean().double(), ce.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.mean().double(), -(q.exp() * q).sum(-1).mean().detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_cached_signal_is_of_capped_logits(cap):
    hidden, weight = torch.randn(2, 3, 5), 3 * torch.randn(11, 5)
    logits = hidden @ weight.T
    logits = logits if cap is None else cap * (logits / cap).tanh()
    _, values, entropy = _targets(hidden, weight, "topk", 11, 1.0, torch.Generator(), cap)
    kept = logits.log_softmax(-1).sort(-1, descending=True).values
    torch.testing.assert_close(values.float(), kept, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "share"), [("codegen", 0.5), ("gpt_bigcode", 0.5), ("gemma3_text", 0.3), ("phi3", 0.5)]
)
def test_shapes_of_such_types_are_found(kind, share):
    sizes = {"codegen": {"n_embd": 128, "n_head": 16, "n_layer": 4, "rotary_dim": 4}}
    sizes["gpt_bigcode"] = {"n_embd": 128, "n_head": 16, "n_layer": 4}
    config = of_type(kind, **{"hidden_size": 128, "num_hidden_layers": 6, "vocab_size": 500, **sizes.get(kind, {})})
    target = int(share * count_params(config))
    shape = choose_shape(config, target, multiple=1)
    assert shape.params == pytest.approx(target, rel=0.005)
    assert shape.heads % architecture(config).head_step == 0
    assert shape.hidden < dims(config).hidden


ALIBI = {
    "bloom": {"hidden_size": 128, "n_head": 16, "n_layer": 4, "vocab_size": 500},
    "mpt": {"d_model": 128, "n_heads": 16, "n_layers": 4, "vocab_size": 500},
}


def test_heads_under_alibi_keep_the_slopes_that_the_classes_give_them():
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    for slopes in (lambda n: _get_alibi_slopes(n, "cpu"), lambda n: build_mpt_alibi_tensor(n, 2)[:, 0, 0]):
        for heads in (1, 2, 7, 12, 16, 23, 71):
            for fewer in range(1, heads + 1):
                torch.testing.assert_close(slopes(heads)[heads_of_same_slopes(heads, fewer)], slopes(fewer))


@pytest.mark.parametrize("kind", ALIBI)
def test_students_of_alibi_models_have_their_neurons_and_their_heads(kind):
    """As many neurons for each hidden unit; which heads is a matter of slopes, whatever scores or priorities say."""
    config = of_type(kind, **ALIBI[kind])
    target = count_params(config_with(config, dims(config).with_units(hidden=88, kv_heads=11, neurons=0, layers=4)))
    shape = choose_shape(config, target)
    assert (shape.hidden, shape.heads, shape.neurons, shape.params) == (88, 11, 352, target)
    with pytest.raises(ConfigError, match=r"The nearest possible sizes: [\d,]+ and [\d,]+"):
        choose_shape(config, int(1.03 * target))
    with pytest.raises(ConfigError, match="4 neurons for each hidden unit. Use 352 neurons"):
        fixed_shape(config, "4x88x11x300")
    model = randomised(config, seed=2)
    scores = random_scores(model, (), seed=1)
    overall = choose_shape(config, target, "global", scores=scores)
    for given in (shape, overall):
        kept = choose_units(scores, given, config)
        assert all(row.tolist() == heads_of_same_slopes(16, 11) for row in kept.heads)
        assert {len(row) for row in kept.neurons} == {352}
        student = prune(model, scores, given)
        assert sum(p.numel() for p in student.parameters()) == target
    middle = between(dims(config), shape, 0.5, architecture(config))
    assert 88 < middle.hidden < 128 and middle.neurons == 4 * middle.hidden


def test_a_published_bloom_and_mpt_are_read():
    """Older names, an n_inner that its class does not read, and lengths that ALiBi of MPT ends at."""
    bloom = {"model_type": "bloom", "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16}
    assert count_params(completed({**bloom, "vocab_size": 250880})) == 559_214_592
    mpt = completed({"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432})
    assert (count_params(mpt), dims(mpt).longest) == (6_649_286_656, 2048)
    assert all(check.held for check in prove(completed({**bloom, "vocab_size": 500})))


TOKENS = torch.randint(3, 200, (2, 3, 9), generator=torch.Generator().manual_seed(5))


def losses(model):
    """Of each batch, through the model's own logits."""
    with torch.no_grad():
        logits = [model(b[:, :-1], use_cache=False).logits.double() for b in TOKENS]
    return torch.stack(
        [F.cross_entropy(x.flatten(0, 1), b[:, 1:].flatten()) for x, b in zip(logits, TOKENS, strict=True)]
    )


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo2", "phi3", "cohere", "granite", "gemma2", "bloom", "mpt"])
def test_scores_are_what_the_loss_says_when_units_are_scaled(kind):
    """Of heads and neurons by scaling weights, which knows no hook; of the hidden size by masks on the stream."""
    config = probe_of({"model_type": kind, "tie_word_embeddings": False})
    model, step = randomised(config, seed=3).double(), 1e-2
    table, sizes = architecture(config), dims(config)
    found = expressive_scores(model, list(TOKENS))

    def slopes(change):
        return (change(1 + step) - change(1 - step)).abs().sum(0) / (2 * step)

    heads = found.heads if sizes.group == 1 else found.queries
    for axis, count, of in (("heads", sizes.heads, heads), ("neurons", 6, found.neurons)):
        width = sizes.head_dim if axis == "heads" else 1
        name = table.unit_maps(axis, sizes.layers)[1]
        weight = model.get_parameter(name)
        measured = []
        for unit in range(count):
            rows = slice(unit * width, (unit + 1) * width)

            def scaled(factor, weight=weight, rows=rows):
                kept = weight.data.clone()
                weight.data[:, rows] *= factor
                ends = losses(model)
                weight.data.copy_(kept)
                return ends[:, None]

            measured.append(slopes(scaled))
        agree(of[1][:count].double(), torch.cat(measured))
    units, measured = range(0, sizes.hidden, 17), []
    for unit in units:

        def under(factor, unit=unit):
            mask = torch.ones(sizes.hidden, dtype=torch.float64)
            mask[unit] = factor
            with masked(model, hidden=mask):
                return losses(model)[:, None]

        measured.append(slopes(under))
    agree(found.hidden[list(units)].double(), torch.cat(measured))


def agree(scores, slopes):
    """Scores are normalised, slopes are not."""
    torch.testing.assert_close(scores / scores.norm(), slopes / slopes.norm(), rtol=0.02, atol=2e-3)


def test_numbers_of_a_file_change_no_table():
    """A class computes its factors in the type that config.json names; the proof is about structure."""
    assert all(c.held for c in prove(of_type("gemma3_text", torch_dtype="bfloat16", dtype="bfloat16")))


@pytest.mark.parametrize("kind", COMMITTED["types"])
def test_a_config_as_transformers_saves_it_has_a_committed_table(kind):
    from transformers import AutoConfig

    more = {k: v for k, v in PUBLISHED.get(kind, {}).items() if not isinstance(v, bool)}
    assert derived.is_committed(AutoConfig.for_model(kind, **more).to_dict())


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("exaone4", {"sliding_window_pattern": "LLLG", "layer_types": ["full_attention"] * 32}),
        ("gpt_bigcode", {"multi_query": False}),
        ("stablelm", {"qk_layernorm": True, "num_hidden_layers": 2}),
        ("gpt_neo", {}),
    ],
)
def test_variants_are_counted_as_transformers_builds_them(kind, more):
    from capacity_gap.structure.probing import from_config

    with torch.device("meta"):
        built = sum(p.numel() for p in from_config({"model_type": kind, **more}).parameters())
    assert count_params(completed({"model_type": kind, **more})) == built


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("hyperclovax", {"logits_scaling": 0.125}, "logits_scaling=0.125 changes its logits"),
        ("mpt", {"logit_scale": 0.5}, "logit_scale=0.5 changes its logits"),
        ("bert", {}, "not causal"),
    ],
)
def test_models_whose_losses_would_be_wrong_are_refused(kind, more, why):
    with pytest.raises(ConfigError, match=why):
        check_head(completed({"model_type": kind, **more}))


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ConfigError, match=r"'bart' is an encoder-decoder; only T5"):
        count_params({"model_type": "bart"})


def test_heads_with_factors_of_their_own_keep_to_the_hidden_size():
    long = {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}}
    assert not architecture(of_type("phi3")).square and architecture(of_type("phi3", **long)).square


@pytest.mark.parametrize("held", ["[]", "{}", "null", '{"table": {}}', '{"defaults": {}}', "no JSON"])
def test_a_cache_that_holds_anything_else_is_made_again(held, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    derived._find.cache_clear()
    right = architecture(of_type("persimmon", qk_layernorm=False))
    (file,) = derived.cache_folder().iterdir()
    file.write_text(held)
    derived._find.cache_clear()
    assert derived.table(of_type("persimmon", qk_layernorm=False)) == right
