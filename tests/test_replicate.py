"""The pack for GPUs: its analysis finds what was planted, its cells are the registered ones, and it runs small."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from benchmarks import replicate
from benchmarks.replicate import ALL, answered, answers, loaded, pooled, whole
from benchmarks.replicate_power import CASES, TRUTHS, Case, cells_of, simulated
from capacity_gap import records
from capacity_gap.commands import cli
from capacity_gap.runner.claimed_grid import claimed_cells
from tests.conftest import ROOT, run_py

PAGE = ROOT / "docs" / "replicate_registration.md"
POWER = ROOT / "results" / "replicate_power.csv"
NAMES = list(CASES)
CALM = {"noise": 0.1}


def grid(case, *, name="replicate_hour", seed=1):
    return simulated(name, case, np.random.default_rng(seed))


def records_of(frame, origin="us"):
    """Simulated cells as records."""
    columns = {"status": "done", "origin": origin, "family": "small", "corpus": "text", "student_loss": frame["loss"]}
    seeds = {name: frame[name].astype(str).str.replace(r".*/", "", regex=True) for name in ("seed", "teacher_seed")}
    return frame.drop(columns="loss").assign(**columns, **seeds)


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])])
def test_power_was_simulated_for_exactly_the_cells_of_the_sweeps(name):
    claims = claimed_cells([f"+sweeps={name}"])
    columns = ["student", "teacher", "data_tokens", "seed"]
    told = {tuple(str(claim.columns[c]) for c in columns) for claim in claims.values()}
    assumed = cells_of(name).replace({"student": {"0.25b": "250m", "0.35b": "350m", "0.5b": "500m"}})
    assert {tuple(map(str, row)) for row in assumed[columns].to_numpy()} == told
    assert len(told) == len(claims)
    some = next(iter(claims.values()))
    assert some.registration == hashlib.sha256(PAGE.read_bytes()).hexdigest()
    assert some.columns["precision"] == "bf16" and "train.compile=True" in some.columns["settings"]
    assert some.columns["signal"] == ("online" if name == "replicate_day" else "sampled-16")
    sizes = pd.DataFrame([claim.columns for claim in claims.values()]).groupby(["student", "data_tokens"])
    assert (sizes["student_params"].max() / sizes["student_params"].min() < 1.01).all(), "else no joint model is fitted"
    assert (sizes["batch"].nunique() == 1).all()


def test_the_table_of_the_page_is_that_of_the_simulation():
    table = pd.read_csv(POWER).set_index(["sweep", "truth", "share of"])["share"]
    assert {(name, case.name) for name, cases in CASES.items() for case in cases} == {k[:2] for k in table.index}
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `replicate_")]
    lines = [[c.strip(" `") for c in line.strip("|").split("|")] for line in lines if "%" in line]
    assert len(lines) == sum(map(len, CASES.values()))
    names = ("1 yes", "1 no", "2 law", "2 provisional", "3 it grows", "3 it shrinks")
    for sweep, truth, *shares in lines:
        assert shares == [f"{table[sweep, truth, name]:.0%}".replace("%", " %") for name in names], (sweep, truth)


def test_what_is_planted_is_found():
    as_study, _, turn, stays, flat = (
        answered(grid(Case(case.name, case.curvature, case.bend, case.d, **CALM))) for case in TRUTHS
    )
    assert (as_study.break_even, as_study.optimum, as_study.growth) == ("yes", "yes", "it grows")
    assert as_study.row["teachers"] == "10m and 50m"
    low, high = as_study.at.interval
    assert 10e6 < low < high < 40e6
    assert (turn.break_even, turn.growth) == ("yes", "it grows") and turn.optimum in ("only a break-even", "no")
    assert (stays.break_even, stays.growth) == ("no, the smaller is better", "open")
    assert (flat.break_even, flat.optimum, flat.growth) == ("no, the smaller is better", "no", "open")


def test_a_larger_teacher_that_always_wins_is_said_and_one_budget_leaves_questions_open():
    frame = grid(Case("flat", bend=False, d=0.0, **CALM))
    falling = frame.assign(loss=8 - frame["loss"])
    assert answered(falling).break_even == "no, the larger is better"
    one = answered(frame[frame["data_tokens"] == frame["data_tokens"].min()])
    assert (one.break_even, one.growth) == ("open", "open") and "best ratio" in one.row


def test_origins_are_rows_and_pooled_they_are_other_seeds_and_teachers():
    frame = grid(Case("two", origins=2, **CALM))
    us, them = (records_of(frame[frame["origin"] == f"origin {i}"], who) for i, who in enumerate(("us", "them")))
    (table,) = answers(replicate.plain(pd.concat([us, them], ignore_index=True))).values()
    assert list(table["origin"]) == ["them", "us", ALL] and list(table["cells"]) == ["174", "174", "348"]
    assert set(table["1 break-even"]) == {"yes"}
    both = pooled(replicate.plain(pd.concat([us, them, us.assign(origin="a copy")], ignore_index=True)))
    assert len(both) == 348, "the same bits are one result"
    assert both["seed"].nunique() == both["teacher_seed"].nunique() == 6
    published = pooled(replicate.plain(pd.concat([us, them]).assign(teacher_tokens=np.nan)))
    assert published["teacher_seed"].nunique() == 3


def test_a_seed_that_lacks_a_cell_is_left_out_whole():
    frame = replicate.plain(records_of(grid(TRUTHS[0])))
    assert len(whole(frame)) == 174
    kept = whole(frame.drop(index=frame.index[(frame["seed"] == "1")][:1]))
    assert set(kept["seed"]) == {"0", "2"} and len(kept) == 116


def test_grids_are_never_mixed_and_two_results_of_one_cell_are_refused(tmp_path):
    frame = records_of(grid(TRUTHS[0]))
    other = frame.assign(corpus="embedded", cell=frame["cell"] + "e")
    assert len(answers(replicate.plain(pd.concat([frame, other], ignore_index=True)))) == 2
    for name, rows in {"one.csv": frame, "two.csv": frame.assign(student_loss=frame["student_loss"] + 0.1)}.items():
        rows.to_csv(tmp_path / name, index=False)
    with pytest.raises(SystemExit, match="us: two results of one cell"):
        loaded([str(tmp_path / "one.csv"), str(tmp_path / "two.csv")])
    assert len(loaded([str(tmp_path / "one.csv")] * 2)) == 174


def test_every_imported_record_carries_the_hash_of_the_registration():
    expected = hashlib.sha256(PAGE.read_bytes()).hexdigest()
    for file in sorted((ROOT / "results" / "replicate").glob("*.csv")):
        assert set(records.load(file)["registration"]) == {expected}, file.name


# The hour at about a thousandth of its size, on the same code. Kernels are not compiled: on a CPU that takes longer for
# one model than all of this. `TORCHDYNAMO_DISABLE` leaves the setting, and so the identities, as they are.
TEACHERS = ("80k", "120k", "180k")
SMALL = [
    "+sweeps=replicate_hour",
    "family=pico",
    "family.teacher_data=8k",
    "family.pretrain.batch_size=4",
    "corpus=text",
    "corpus.sequence_length=32",
    "prune.multiple=1",
    "prune.batches=2",
    "train.device=cpu",
    "train.batch_size=4",
    "evaluate.tokens=2000",
    "evaluate.ood_tokens=1000",
]
AXES = ["student=40k,50k", f"teacher={','.join(TEACHERS)}", "data=4k,12k", "seed=0"]
FIRST = ["hydra.sweeper.params=null", "student=40k", "teacher=120k", "data=12k", "seed=0"]


@pytest.mark.slow
def test_the_hour_runs_at_a_thousandth_of_its_size(text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    store, words = tmp_path / "store", [*SMALL, f"corpus.path={text_file}"]
    ranks = [sys.executable, "-m", "capacity_gap.runtime.one_machine", "2", str(ROOT / "run.py")]
    done = subprocess.run(
        [*ranks, *words, *FIRST, "train.sharding=fsdp", f"store={store}"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (sharded,) = records.read(store)
    assert (sharded["ranks"], sharded["precision"], sharded["signal"]) == (2, "bf16", "sampled-16")

    command = [sys.executable, str(ROOT / "run.py"), "-m", *words, *AXES, "hydra/launcher=basic", f"store={store}"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while len(records.read(store)) < 3:
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert len(records.read(store)) < 12
    run_py("-m", *words, *AXES, "hydra/launcher=basic", f"store={store}")

    file, folder, claimed = tmp_path / "sent.csv", tmp_path / "replicate", " ".join([*words, *AXES])
    assert cli.main(["records", "export", str(store), "--sweep", "replicate_hour", "--out", str(file)]) == 0
    take = ["records", "import", str(file), "--origin", "here", "--out", str(folder)]
    assert cli.main([*take, "--grid", claimed]) == 0
    out = capsys.readouterr().out
    assert "12 of 12 cells of replicate_hour in" in out and "12 of 12 cells of this grid, 12 of them new" in out
    assert cli.main([*take, "--grid", claimed.replace("train.batch_size=4", "train.batch_size=8")]) == 2
    frame = records.load(folder)
    assert set(frame["registration"]) == {hashlib.sha256(PAGE.read_bytes()).hexdigest()}
    assert set(frame["settings"].str.contains("train.compile=True")) == {True}
    assert sorted(frame["ranks"]) == [1] * 11 + [2]
    replicate.main(["answers", str(folder)])
    out = capsys.readouterr().out
    assert "pico on text, 4k, 12k tokens" in out and "| here | 12 | " in out and "not fitted" not in out
