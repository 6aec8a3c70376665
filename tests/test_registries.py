"""Every entry of every registry is found, documented and run; entries from outside are cells of their own."""

import os
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from capacity_gap import records
from capacity_gap.cell import config
from capacity_gap.cell.pipeline import resolve
from capacity_gap.data.corpora import CORPORA
from capacity_gap.data.corpus_config import CorpusConfig
from capacity_gap.data.sources import documents, identity
from capacity_gap.distill import distill_loss
from capacity_gap.distill.check_loss import check_divergence
from capacity_gap.distill.divergences import LOSSES, Softmax, by_autograd
from capacity_gap.distill.signal_kinds import SIGNALS
from capacity_gap.distill.sparse import SparseTargets
from capacity_gap.evaluate.evaluate_config import EvaluateConfig
from capacity_gap.evaluate.evaluation_sets import EVALUATION_SETS
from capacity_gap.models.architectures import ARCHITECTURES
from capacity_gap.models.axes import count_params
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.pruning.methods import LAYER_SCORES, SCORES
from capacity_gap.settings import extension
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.registry import Entry, Registry, source_digest
from tests.conftest import ROOT, compose, run_here, run_py
from tests.small_models import EVERY, small_model

TOKENS = [torch.arange(24).reshape(2, 12) % 40]


def run_loss(name):
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(7, 4)
    teacher = {"teacher_hidden": torch.randn(1, 3, 5), "teacher_weight": torch.randn(7, 5)}
    loss, _ = distill_loss(hidden, weight, torch.tensor([[1, 2, 3]]), loss=name, **teacher)
    loss.backward()
    assert hidden.grad.isfinite().all() and hidden.grad.abs().sum() > 0


def run_signal(name):
    if name == "online":
        return
    kind, teacher = SIGNALS[name], Softmax.of(torch.randn(3, 7))
    ids, values = kind.targets(teacher, 4, torch.Generator().manual_seed(0))
    values = values / 4 if SIGNALS.entry(name).traits["draws"] else values  # as `signals.Signal` does
    targets = SparseTargets(name, ids, values, teacher.entropy())
    value, kl, gradient = kind.against(Softmax.of(torch.randn(3, 7)), targets, LOSSES["forward_kl"], 0.0)
    assert value.shape == kl.shape == (3,) and gradient.shape == (3, 7)


def run_corpus(name):
    given = {"text": {"path": __file__.replace(".py", ".txt")}, "hub": {"dataset": "no/such"}}.get(name, {})
    if name in ("text", "hub"):
        assert {"identity", "documents"} <= set(dir(CORPORA[name])), "both need something of the user's"
        return
    source = CorpusConfig(name=name, **given)
    assert identity(source)
    if name == "cantonese":
        pytest.importorskip("pycantonese")
    assert next(documents(source)).text


def run_score(name):
    found = SCORES[name](small_model("llama"), TOKENS, seed=0)
    assert found.method == name and found.hidden.isfinite().all()


def run_layer_score(name):
    assert LAYER_SCORES[name](small_model("llama"), TOKENS).shape == (3,)


def run_architecture(name):
    model = next(small_model(n) for n in EVERY if small_model(n).config.model_type == name)
    assert count_params(model.config) == sum(p.numel() for p in model.parameters())


RUN = {
    "loss": (LOSSES, run_loss),
    "signal": (SIGNALS, run_signal),
    "corpus": (CORPORA, run_corpus),
    "score": (SCORES, run_score),
    "score of layers": (LAYER_SCORES, run_layer_score),
    "architecture": (ARCHITECTURES, run_architecture),
    "family": (FAMILIES, lambda name: [count_params(shape) for shape in FAMILIES[name].rungs.values()]),
    "evaluation set": (EVALUATION_SETS, lambda name: EvaluateConfig(**_filled(EVALUATION_SETS[name]))),
}


def _filled(values):
    return {k: v or None for k, v in values.items()} if "task_folder" in values else values


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, (registry, _) in RUN.items() for n in registry])
def test_every_entry_runs(kind, name):
    registry, run = RUN[kind]
    entry = registry.entry(name)
    assert registry.kind == kind and entry.identity in ({}, {"version": entry.version})
    run(name)


@pytest.mark.parametrize("kind", ["loss", "signal", "corpus", "score", "score of layers"])
def test_every_entry_says_what_it_is(kind):
    registry, _ = RUN[kind]
    assert [n for n in registry if len(registry.entry(n).meaning) < 20] == []


@pytest.mark.slow
def test_every_choice_can_be_composed():
    for group, name, _ in config.choices():
        if name in ("hub", "mixture", "local", "text"):
            continue  # they need more, and say so: test_config.py
        assert compose([f"{group}={name}", *([f"family.folders=[{ROOT}]"] if name == "folders" else [])])


def test_a_registry_refuses_what_it_does_not_know():
    some = Registry("thing", setting="some.thing", traits={"odd": False})
    some.register("one", odd=True)(run_loss)
    with pytest.raises(ConfigError, match=r"some.thing='onee' is not known \(did you mean 'one'\?\). Allowed: one"):
        some["onee"]
    with pytest.raises(ConfigError, match=r"registered with even\. Allowed: odd"):
        some.register("two", even=True)
    with pytest.raises(
        ConfigError, match=r"the loss 'forward_kl' already exists, in capacity_gap\.distill\.divergences"
    ):
        LOSSES.register("forward_kl")(run_loss)


MINE = '''
from capacity_gap.data.corpora import CORPORA
from capacity_gap.data.documents import Document
from capacity_gap.distill.divergences import LOSSES, forward_kl, reverse_kl
from capacity_gap.models.ladders import FAMILIES, Family, add_family
from capacity_gap.pruning.methods import SCORES, magnitude_scores


@LOSSES.register("jeffreys")
def jeffreys(student, teacher, skew=0.0):
    """KL(p, q) + KL(q, p)."""
    (one, by_one), (two, by_two) = forward_kl(student, teacher, skew), reverse_kl(student, teacher, skew)
    return one + two, by_one + by_two


@SCORES.register("mine")
def mine(model, batches, *, seed=0, on_batch=lambda done: None):
    """Magnitude, under another name."""
    return magnitude_scores(model, batches)


@CORPORA.register("numbers")
class Numbers:
    """Numbers in words."""

    def identity(self, source):
        return {"numbers": 4000}

    def documents(self, source):
        return (Document(f"the number {i} comes after {i - 1} and before {i + 1}", str(i // 10)) for i in range(4000))


pico = FAMILIES["pico"]
add_family(Family("short", {rung: pico.rungs[rung] for rung in ("55k", "80k")}, multiple=1))
'''
GRID = [
    "-m", "corpus=numbers", "family=short", "prune.method=mine", "distill.loss=jeffreys,forward_kl", "student=40k",
    "teacher=55k", "corpus.sequence_length=32", "family.teacher_data=8k", "data=6k", "prune.batches=2",
    "evaluate.tokens=2000", "evaluate.ood_tokens=1000", "tracking=disabled",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "ray"])
def test_a_module_of_the_users_adds_a_loss_a_score_a_corpus_and_a_family(launcher, tmp_path):
    if launcher == "ray":
        pytest.importorskip("ray", reason="the extra [ray] is not installed")
    (tmp_path / "my_entries.py").write_text(MINE)
    workers = [f"hydra/launcher={launcher}"] + ["hydra.launcher.n_jobs=2"] * (launcher == "joblib")
    done = run_py(*GRID, "extend=[my_entries]", f"store={tmp_path / 'store'}", *workers, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = records.read(tmp_path / "store")
    assert {(r["loss"], r["prune_method"], r["corpus"], r["family"]) for r in rows} == {
        (loss, "mine", "numbers", "short") for loss in ("jeffreys", "forward_kl")
    }
    again = run_py(
        *GRID, f"store={tmp_path / 'store'}", *workers, CAPACITY_GAP_EXTEND="my_entries", cwd=tmp_path, check=False
    )
    assert "2 reused" in again.stdout, again.stderr
    (tmp_path / "my_entries.py").write_text(
        MINE.replace("one + two, by_one + by_two", "one + 2 * two, by_one + 2 * by_two")
    )
    edited = run_py(*GRID, "extend=[my_entries]", "plan=true", f"store={tmp_path / 'store'}", cwd=tmp_path, check=False)
    assert "plan: 2 cells, 0 of them recorded" in edited.stdout, edited.stdout


@pytest.mark.parametrize(
    ("extend", "error"),
    [
        ("absent_module", "no such module"),
        ("broken", "fails when it is imported: ZeroDivisionError"),
        ("needy", "needs no_such_package, which is not installed"),
    ],
)
def test_a_module_that_cannot_be_imported(tmp_path, extend, error):
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "needy.py").write_text("import no_such_package")
    done = run_py(f"extend=[{extend}]", f"store={tmp_path / 'store'}", cwd=tmp_path, check=False)
    assert done.returncode == 2 and error in done.stderr, done.stderr
    assert not (tmp_path / "store").exists()


def test_a_config_file_cannot_name_code(tmp_path):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps/foreign.yaml").write_text("# @package _global_\nextend: [my_entries]\n")
    (tmp_path / "my_entries.py").write_text("raise SystemExit('it ran')")
    done = run_py(
        "-m", f"--config-dir={tmp_path}", "+sweeps=foreign", f"store={tmp_path / 'store'}", cwd=tmp_path, check=False
    )
    assert done.returncode == 2 and "it ran" not in done.stderr + done.stdout
    assert "extend=my_entries is named in a config file" in done.stderr, done.stderr


def test_the_environment_names_modules_and_overrides_add_to_them(tmp_path, monkeypatch):
    for name in ("first_extension", "second_extension"):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent("seen = True"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(extension.VARIABLE, "first_extension")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(sys, "path", [*sys.path])
    extension.load_named_on(["-m", "extend=[second_extension]", "seed=0"])
    assert os.environ[extension.VARIABLE] == "first_extension,second_extension"
    assert sys.modules["first_extension"].seen and sys.modules["second_extension"].seen


BAD_LOSSES = {
    "a scalar": ("return (student.probs - teacher.probs).abs().sum() / 2, student.probs", "value has shape"),
    "a gradient of one column": ("return (student.probs**2).sum(-1), student.probs[:, :1]", "gradient has shape"),
    "another gradient": ("return (student.probs**2).sum(-1), student.probs", "not the derivative of its value"),
    "in place": ("return student.probs.sub_(teacher.probs).sum(-1), student.probs", "modifies its arguments"),
    "one result": (
        "return (student.probs**2).sum(-1)",
        r"it returned one tensor of shape \(3,\) instead of two tensors",
    ),
    "nothing": ("pass", "it returned None instead of two tensors"),
    "a number": ("return 0.5, student.probs", "its value is a float instead of a tensor"),
    "not a number": ("return student.probs.sum(-1) * float('nan'), student.probs", "is not finite"),
    "an error": ("raise KeyError('beta')", "it raised KeyError: 'beta'"),
}


@pytest.mark.parametrize("body", BAD_LOSSES)
def test_a_wrong_loss_is_found_before_it_teaches(body):
    space = {}
    exec(f"def loss(student, teacher, skew):\n    {BAD_LOSSES[body][0]}", space)
    LOSSES.register("wrong")(space["loss"])
    try:
        with pytest.raises(ConfigError, match=f"distill.loss=wrong.*{BAD_LOSSES[body][1]}"):
            check_divergence("wrong")
    finally:
        del LOSSES._entries["wrong"]


@pytest.fixture
def wrong():
    """A registered loss that fails when it is called."""

    @LOSSES.register("wrong")
    def wrong(student, teacher, skew):
        """Divides by zero."""
        return 1 / 0

    yield "wrong"
    del LOSSES._entries["wrong"]


def test_an_error_of_a_loss_is_told_with_its_line(wrong):
    with pytest.raises(ConfigError, match=r"raised ZeroDivisionError in line \d+ of test_registries.py: division"):
        check_divergence(wrong)


def test_a_loss_without_a_gradient_is_told_as_such(wrong):
    LOSSES._entries["wrong"] = replace(
        LOSSES.entry("wrong"), value=by_autograd(lambda q, p, skew: (q.detach() - p).sum(-1))
    )
    with pytest.raises(ConfigError, match="does not depend on the student through operations of torch"):
        check_divergence(wrong)


@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize("plan", ["true", "false"])
def test_a_loss_is_called_before_anything_is_planned_or_run(wrong, grid, plan, tmp_path):
    """Else a grid trains its teachers first: they are shared with cells of other losses."""
    words = ["-m", "distill.loss=forward_kl,wrong"] if grid else ["distill.loss=wrong"]
    found = run_here(*words, "student=40k", "teacher=55k", f"plan={plan}", f"store={tmp_path / 'st'}", cwd=tmp_path)
    assert found.returncode == 2 and "plan:" not in found.stdout
    assert "distill.loss=wrong (tests.test_registries) cannot be used" in found.stderr, found.stderr
    assert not (tmp_path / "st").exists(), "nothing is written"


def test_a_loss_that_takes_no_part_is_not_called(wrong, tmp_path):
    words = ("distill.loss=wrong", "distill.kd_weight=0", "student=40k", "teacher=55k", "plan=true")
    assert run_here(*words, f"store={tmp_path / 'st'}", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_of_the_package_pass_that_check(name):
    check_divergence(name)


def test_autograd_gives_the_gradient_in_closed_form():
    torch.manual_seed(0)
    student, teacher = (Softmax.of(torch.randn(4, 9, dtype=torch.float64)) for _ in range(2))
    written = by_autograd(lambda q, p, skew: (p.exp() * (p - q)).sum(-1))(student, teacher)
    for one, two in zip(written, LOSSES["forward_kl"](student, teacher, 0.0), strict=True):
        torch.testing.assert_close(one, two)


def test_what_decides_an_entry_of_the_users_is_hashed_wherever_it_is_defined(tmp_path, monkeypatch):
    """A partial function belongs to functools, and a constant to another file of the same package."""
    package = tmp_path / "mine_in_parts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "constants.py").write_text("A = 0.9")
    registers = "registry.register('part')(functools.partial(max, A))"
    imports = "import functools\nfrom mine_in_parts.constants import A\n"
    imports += "from tests.test_registries import SHARED as registry\n"
    (package / "entries.py").write_text(imports + registers)
    monkeypatch.syspath_prepend(tmp_path)
    __import__("mine_in_parts.entries")
    before = SHARED.entry("part").identity
    assert set(before) == {"version", "source"}
    (package / "constants.py").write_text("A = 0.1")
    assert SHARED.entry("part").identity == before, "this process still computes with what it imported"
    assert {"version": 1, "source": source_digest("mine_in_parts.entries")} != before, "the next one does not"


SHARED = Registry("part", setting="some.part")


def test_a_users_corpus_keeps_its_identity_apart_from_the_splits(monkeypatch):
    class Released:
        """A corpus whose identity has names that ours have too."""

        def identity(self, source):
            return {"version": "2024", "test": "x"}

    entry = Entry("released", Released, "somebody", source="0" * 20)
    monkeypatch.setitem(CORPORA._entries, "released", entry)
    cell = resolve(compose(["corpus=released"]))
    assert cell.corpus.config["test"] == 0.05
    assert cell.corpus.config["own"] == {"version": "2024", "test": "x"}
    assert cell.corpus.config["entry_source"] == "0" * 20
    assert "corpus.source=000000000000" in cell.description["settings"]


@pytest.mark.parametrize(
    ("registry", "name"), [(FAMILIES, "folders"), (CORPORA, "mixture"), (LAYER_SCORES, "symmetric")]
)
def test_names_with_a_meaning_of_their_own_cannot_be_taken(registry, name):
    with pytest.raises(ConfigError, match="is reserved"):
        registry.register(name)


def test_samples_serve_only_what_they_estimate():
    targets = SparseTargets("sampled", torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.5]]), torch.zeros(1))
    with pytest.raises(ValueError, match="forward KL and soft cross-entropy only"):
        SIGNALS["sampled"].against(Softmax.of(torch.randn(1, 7)), targets, LOSSES["tvd"], 0.0)
