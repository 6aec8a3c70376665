"""The grid against launchers that break: a failure costs only what needs it."""

import dataclasses
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from capacity_gap.cell.pipeline import resolve
from capacity_gap.runner import grid, waves
from capacity_gap.runner.run_cell import run_config
from capacity_gap.runtime.process import Runtime
from capacity_gap.settings.errors import Busy, ConfigError, Damaged
from capacity_gap.store.stage import Stage, Store
from tests.conftest import ROOT, compose, run_here


class Died(Exception):
    """What a launcher raises when its pool has lost a worker."""


def write(run):
    (run.out / "x.txt").write_text("x")


@pytest.fixture
def wave(tmp_path):
    """Three independent stages, the job of each named by its number."""
    store = Store(tmp_path)
    store.create()
    stages = [Stage("s", 1, {"n": n}, {}, write, cost=float(10 - n)) for n in range(3)]
    return store, stages, {s.key: (s, [str(n)]) for n, s in enumerate(stages)}


def launcher(store, stages, faults):
    """Runs jobs in turn; `faults[job]` is a list of what befalls its attempts: an exception, "kill" or None."""
    log = []

    def launch(jobs, initial_job_idx):
        results = []
        for (number,) in jobs:
            log.append(number)
            fault = faults.get(number, []).pop(0) if faults.get(number) else None
            if fault == "kill":
                (store.work / stages[int(number)].key.replace("/", "-")).mkdir(parents=True, exist_ok=True)
                raise Died("a worker was killed")
            if fault is None:
                store.compute(stages[int(number)], Runtime())
            results.append(SimpleNamespace(_return_value=fault))
        return results

    return launch, log


def test_every_stage_of_a_calm_wave_runs_once_longest_first(wave):
    store, stages, jobs = wave
    launch, log = launcher(store, stages, {})
    assert waves._launch_wave(jobs, store, launch, retries=0) == {}
    assert log == ["0", "1", "2"]


def test_a_crash_costs_only_itself(wave):
    store, stages, jobs = wave
    launch, log = launcher(store, stages, {"1": [RuntimeError("boom")]})
    assert waves._launch_wave(jobs, store, launch, retries=0) == {stages[1].key: "boom"}
    assert [store.has(s) for s in stages] == [True, False, True]
    assert log == ["0", "1", "2"]


def test_a_killed_worker_that_breaks_the_pool_costs_nothing_if_it_was_an_accident(wave):
    store, stages, jobs = wave
    launch, log = launcher(store, stages, {"0": ["kill"]})
    assert waves._launch_wave(jobs, store, launch, retries=0) == {}
    assert log == ["0", "1", "2", "0"], "what the lost pool had begun runs again, alone and last"


def test_a_job_that_kills_its_worker_costs_only_itself(wave):
    store, stages, jobs = wave
    launch, log = launcher(store, stages, {"0": ["kill", "kill"]})
    assert waves._launch_wave(jobs, store, launch, retries=0) == {
        stages[0].key: "its process died (a worker was killed)"
    }
    assert [store.has(s) for s in stages] == [False, True, True]
    assert log == ["0", "1", "2", "0"]


def test_retries_are_for_what_died_or_crashed(wave):
    store, stages, jobs = wave
    launch, log = launcher(store, stages, {"0": ["kill", "kill", None], "1": [RuntimeError("once"), None]})
    assert waves._launch_wave(jobs, store, launch, retries=1) == {}
    assert log.count("0") == 3
    assert log.count("1") == 2
    assert all(store.has(s) for s in stages)


def test_a_wrong_setting_is_not_retried(wave):
    store, stages, jobs = wave
    launch, log = launcher(store, stages, {"1": [ConfigError("wrong"), None]})
    assert waves._launch_wave(jobs, store, launch, retries=5) == {stages[1].key: "wrong"}
    assert log.count("1") == 1


def test_a_launcher_that_cannot_launch_is_an_error_not_a_loop(wave):
    store, _, jobs = wave

    def launch(overrides, initial_job_idx):
        raise Died("no such partition")

    with pytest.raises(Died, match="no such partition"):
        waves._launch_wave(jobs, store, launch, retries=3)


def test_an_endless_killer_ends_after_its_retries(wave):
    store, stages, jobs = wave
    launch, log = launcher(store, stages, {"2": ["kill"] * 9})
    assert waves._launch_wave(jobs, store, launch, retries=2) == {
        stages[2].key: "its process died (a worker was killed)"
    }
    assert log.count("2") == 4, "with others, and alone: once and twice again"


def test_what_another_grid_is_at_is_waited_for_not_counted(wave):
    store, stages, jobs = wave
    launch, log = launcher(store, stages, {"1": [Busy("another is at it"), Busy("still"), None]})
    assert waves._launch_wave(jobs, store, launch, retries=0) == {}
    assert log.count("1") == 3


def halve(store, stage):
    file = store.path(stage) / "x.txt"
    file.write_text("")


def test_a_damaged_stage_that_its_job_did_not_make_again_has_failed(wave):
    store, stages, jobs = wave
    for stage in stages:
        store.compute(stage, Runtime())
    halve(store, stages[1])

    def launch(overrides, initial_job_idx):
        return [SimpleNamespace(_return_value=None)] * len(overrides)

    assert waves._launch_wave(jobs, store, launch, retries=0) == {stages[1].key: waves.DIED}


def test_a_damaged_shared_stage_is_made_again_once_in_its_own_wave(wave):
    store, (shared, *_), _ = wave
    store.compute(shared, Runtime())
    ends = [Stage("record", 1, {"n": n}, {"shared": shared}, write) for n in range(2)]
    cells = [(SimpleNamespace(record=end), [str(n)]) for n, end in enumerate(ends)]
    assert waves._wave(cells, [[shared], [shared]], store, {}) == {}
    halve(store, shared)
    assert list(waves._wave(cells, [[shared], [shared]], store, {})) == [shared.key]


@pytest.mark.parametrize("remakes", [True, False])
def test_a_grid_whose_damage_could_not_be_made_again_has_failed(tiny_cell, tmp_path, monkeypatch, capsys, remakes):
    """The record is there, and the weights behind it were set aside: success is both of them."""
    config = dataclasses.replace(tiny_cell, store=str(shutil.copytree(tiny_cell.store_path, tmp_path / "s")))
    store, cell = Store(config.store), resolve(config)
    store.set_aside(store.path(cell.distilled), Damaged(store.path(cell.distilled) / "model.safetensors", "is halved"))

    def launch(jobs, initial_job_idx):
        if not remakes:
            return [SimpleNamespace(_return_value=OSError("no disk")) for _ in jobs]
        return [SimpleNamespace(_return_value=run_config(config)) for _ in jobs]

    monkeypatch.setattr(grid, "from_hydra", lambda composed: composed)
    assert grid.run_grid([grid.Job(["student=40k"], config)], launch) == remakes
    told = capsys.readouterr()
    assert ("1 done" if remakes else "1 failed") in told.out
    assert ("no disk" in told.err) != remakes
    assert store.has(cell.record)
    assert list(store.root.glob("failed/*")) == [], "the record stays as it is"


def test_batches_limit_what_a_launcher_is_given_at_once():
    given = []

    def launch(jobs, initial_job_idx):
        given.append(list(jobs))
        return jobs

    assert waves._in_batches(launch, 2)(list("abcde"), initial_job_idx=0) == list("abcde")
    assert given == [["a", "b"], ["c", "d"], ["e"]]


def test_workers_of_a_machine_with_several_gpus_take_one_each(tmp_path):
    """Three processes on a pretended machine with two GPUs: two get one each, the third shares."""
    script = (
        "import sys, tempfile\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        "from capacity_gap.runtime.process import _own_gpu\n"
        "print(_own_gpu(2), flush=True); sys.stdin.read()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    start = [sys.executable, "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment, "cwd": ROOT}
    workers = [subprocess.Popen(start, **pipes) for _ in range(3)]
    said = sorted(int(w.stdout.readline()) for w in workers)
    for worker in workers:
        worker.communicate("")
    assert said in ([0, 0, 1], [0, 1, 1])


def test_cells_are_composed_as_hydra_does(tiny, tmp_path):
    """Groups, nested values, lists, nulls and interpolations: the short way gives what Hydra's long way gives."""
    axes = ["family=pico,pico_neox", "seed=0,1", "train.learning_rate=null,0.01", "tracking.project=a,'${student}b'"]
    given = [*tiny, "teacher=80k", "student=40k,50k", f"store={tmp_path}", *axes]
    ours = run_here("-m", *given, "plan=true", cwd=tmp_path).stdout
    assert "plan: 16 cells" in ours, "the project's name is no part of a cell"

    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from capacity_gap.cell import config
    from hydra_plugins.capacity_gap_grid.grid_sweeper import Composer

    config.register()
    cells = [[f"family={f}", f"seed={s}", f"train.learning_rate={r}", "tracking.project='${student}b'"]
             for f in ("pico", "pico_neox") for s in (0, 1) for r in ("null", 0.01)]  # fmt: skip
    expected = [compose([*tiny, *overrides]) for overrides in cells]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        base = hydra_compose("config", overrides=tiny, return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        short = Composer(base, loader)
        assert [config.from_hydra(short([*tiny, *overrides])) for overrides in cells] == expected
