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
from benchmarks.replicate import ALL, answered, answers, grids, loaded, pooled, ranged
from benchmarks.replicate_power import CASES, TRUTHS, Case, cells_of, simulated
from capacity_gap import records
from capacity_gap.commands import cli
from capacity_gap.runner.claimed_grid import claimed_cells
from tests.conftest import ROOT, run_py

PAGE = ROOT / "docs" / "replicate_registration.md"
POWER = ROOT / "results" / "replicate_power.csv"
NAMES = list(CASES)
CALM = {"noise": 0.1}
AS_REGISTERED = "9b4b7f221c4036d5142cae6f65e8a546a2e64eb805e78a2befc13a6a51390b30"  # the page without its amendments
AMENDED = "\n## Amended on "


@pytest.fixture
def known(monkeypatch):
    """The simulated cells of `replicate_hour` as registered; a test of its own compares digests."""

    def cells(name):
        frame = cells_of("replicate_hour") if name == "replicate_hour" else cells_of("replicate_hour").head(0)
        return pd.DataFrame({"cell": [f"cell {i}" for i in frame.index], "seed": frame["seed"].astype(str)})

    monkeypatch.setattr(replicate, "registered", cells)


def grid(case, *, name="replicate_hour", seed=1):
    return simulated(name, case, np.random.default_rng(seed))


def records_of(frame, origin="us"):
    """Simulated cells as records."""
    columns = {"status": "done", "origin": origin, "family": "small", "corpus": "text", "student_loss": frame["loss"]}
    seeds = {name: frame[name].astype(str).str.replace(r".*/", "", regex=True) for name in ("seed", "teacher_seed")}
    return frame.drop(columns="loss").assign(**columns, **seeds)


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])])
def test_power_was_simulated_for_exactly_the_cells_of_the_sweeps(name, monkeypatch):
    claims = claimed_cells([f"+sweeps={name}"])
    columns = ["student", "teacher", "data_tokens", "seed"]
    told = {tuple(str(claim.columns[c]) for c in columns) for claim in claims.values()}
    assumed = cells_of(name).replace({"student": {"0.25b": "250m", "0.35b": "350m", "0.5b": "500m"}})
    assert {tuple(map(str, row)) for row in assumed[columns].to_numpy()} == told
    assert len(told) == len(claims)
    monkeypatch.setattr(replicate, "claimed_cells", lambda words: claims if words == [f"+sweeps={name}"] else None)
    found = replicate.registered(name)
    assert set(found["cell"]) == set(claims)
    assert dict(found.groupby("seed").size()) == dict(assumed.groupby(assumed["seed"].astype(str)).size())
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


def test_origins_are_rows_and_pooled_they_are_other_seeds_and_teachers(known):
    frame = grid(Case("two", origins=2, **CALM))
    us, them = (records_of(frame[frame["origin"] == f"origin {i}"], who) for i, who in enumerate(("us", "them")))
    us, them = (found.assign(cell=found["cell"].str.replace(r".*/", "", regex=True)) for found in (us, them))
    (table,) = answers(replicate.plain(pd.concat([us, them], ignore_index=True))).values()
    assert list(table["origin"]) == ["them", "us", ALL]
    assert list(table["cells"]) == [*["174 of 174 registered cells"] * 2, "348 of 2 × 174 registered cells"]
    assert set(table["1 break-even"]) == {"yes"}
    both = pooled(replicate.plain(pd.concat([us, them, us.assign(origin="a copy")], ignore_index=True)))
    assert len(both) == 348, "the same bits are one result"
    assert both["seed"].nunique() == both["teacher_seed"].nunique() == 6
    published = pooled(replicate.plain(pd.concat([us, them]).assign(teacher_tokens=np.nan)))
    assert published["teacher_seed"].nunique() == 3


def without(frame, **values):
    """The rows but those that have all these values."""
    return frame[~(frame[list(values)].astype(str) == pd.Series(values)).all(axis=1)]


def test_a_seed_that_lacks_a_registered_cell_is_left_out_whole(known):
    frame = replicate.plain(records_of(grid(TRUTHS[0])))
    ((name, one),) = grids(frame)
    assert name == "replicate_hour: 10m, 40m tokens" and len(one.of_complete_seeds) == 174
    (table,) = answers(frame.drop(index=frame.index[(frame["seed"] == "1")][:1])).values()
    assert list(table["cells"]) == ["116 of 174 registered cells"] and list(table["left out with their seeds"]) == [
        "57"
    ]
    (table,) = answers(frame[frame["seed"] != "1"]).values()
    assert list(table["cells"]) == ["116 of 174 registered cells"], "a seed that nobody ran"


def test_a_cell_that_no_seed_has_leaves_out_every_seed(known):
    """Who leaves a teacher out of all seeds would choose the optimum."""
    frame = replicate.plain(records_of(grid(TRUTHS[0])))
    fewer = without(frame, teacher="50m", student="3m", data_tokens="40000000")
    assert len(fewer) == 171
    (table,) = answers(fewer).values()
    assert list(table["1 break-even"]) == ["no seed has all cells"]
    assert list(table["cells"]) == ["0 of 174 registered cells"] and list(table["left out with their seeds"]) == ["171"]
    (table,) = answers(pd.concat([frame, fewer.assign(origin="them")], ignore_index=True)).values()
    rows = table.set_index("origin")
    assert rows.loc["us", "cells"] == "174 of 174 registered cells", "another origin's gaps are not its own"
    assert rows.loc["them", "cells"] == "0 of 174 registered cells"
    assert rows.loc[ALL, "cells"] == "174 of 2 × 174 registered cells"
    assert rows.loc[ALL, "left out with their seeds"] == "171"


@pytest.mark.slow
def test_every_registered_grid_composes():
    sizes = {name: len(replicate.registered(name)) for name in replicate.REGISTERED}
    assert list(sizes.values()) == [174, 348, 174, 90, 108]


def test_grids_are_never_mixed_and_none_takes_the_name_of_another(known, monkeypatch):
    monkeypatch.setattr(replicate, "answered", lambda cells: pytest.fail("too slow") if len(cells) > 174 else Said())
    frame = records_of(grid(TRUTHS[0])).assign(signal="sampled-16")
    others = [
        frame.assign(cell=frame["cell"] + str(values), **values)
        for values in (
            {"corpus": "embedded"},
            {"kd_weight": 0.9},
            {"kd_weight": 0.1},
            {"signal": "online"},
            {"settings": "train.schedule=wsd"},
        )
    ]
    names = list(answers(replicate.plain(pd.concat([frame, *others], ignore_index=True))))
    assert len(names) == 6 and names[0] == "replicate_hour: 10m, 40m tokens"
    for said in ("small on embedded", "kd_weight=0.9", "kd_weight=0.1", "signal=online", "settings=train.schedule=wsd"):
        assert sum(said in name for name in names) == 1, said
    own = frame.assign(cell=frame["cell"] + "e", corpus="embedded")
    (table,) = answers(replicate.plain(own)).values()
    assert list(table["cells"]) == ["174 cells, no registered grid"]
    again = own.assign(cell=own["cell"] + "t", teacher_seed="7", student_loss=own["student_loss"] + 0.01)
    ((_, both),) = grids(replicate.plain(pd.concat([own, again[again["seed"] == "0"]], ignore_index=True)))
    assert len(both.of_complete_seeds) == 174 + 58, "a second teacher of a seed makes it no less complete"


class Said:
    """Answers that no model was fitted for."""

    row = {"1 break-even": "open"}  # noqa: RUF012


def test_names_that_agree_are_numbered(monkeypatch):
    monkeypatch.setattr(replicate, "grids", lambda frame: [("one", None)] * 3)
    monkeypatch.setattr(replicate, "_table", lambda grid: pd.DataFrame())
    assert list(answers(pd.DataFrame())) == ["one", "one (grid 2)", "one (grid 3)"]


def test_open_ends_are_said_as_everywhere():
    assert ranged(2.0, (0.0, 2.9), "{:.2g}".format) == "2 (≤ 2.9)"
    assert ranged(4.6, (3.4, float("inf")), "{:.2g}".format) == "4.6 (≥ 3.4)"
    assert ranged(float("nan"), (0.0, float("inf")), "{:.2g}".format) == "none (–)"
    assert ranged(-0.1, (-0.3, 0.1), "{:.2g}".format, least=-float("inf")) == "-0.1 (-0.3 to 0.1)"


def test_two_results_of_one_cell_are_refused(tmp_path):
    frame = records_of(grid(TRUTHS[0]))
    for name, rows in {"one.csv": frame, "two.csv": frame.assign(student_loss=frame["student_loss"] + 0.1)}.items():
        rows.to_csv(tmp_path / name, index=False)
    with pytest.raises(SystemExit, match="us: two results of one cell"):
        loaded([str(tmp_path / "one.csv"), str(tmp_path / "two.csv")])
    assert len(loaded([str(tmp_path / "one.csv")] * 2)) == 174


def test_the_page_is_the_registered_one_but_for_what_was_added_before_any_cell():
    registered, amended, added = PAGE.read_text(encoding="utf-8").partition(AMENDED)
    assert hashlib.sha256(registered.encode()).hexdigest() == AS_REGISTERED
    assert amended and added.startswith("2026-11-27, before any cell was run\n")


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
    assert (
        "pico on text, 4k, 12k tokens" in out
        and "| here | 12 cells, no registered grid | 0 | " in out
        and "not fitted" not in out
    )
