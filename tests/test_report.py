"""The report: what it says, that it needs nothing else, and that what users typed stays text."""

import itertools
import json
import math
import shlex
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from capacity_gap.commands import cli
from capacity_gap.report import content, page
from capacity_gap.runner.run_cell import run_config
from capacity_gap.store.contents import note_sweep
from capacity_gap.store.stage import Store
from capacity_gap.tracking import wandb_runs
from capacity_gap.tracking.tracking_config import TrackingConfig
from capacity_gap.wording.curve_words import arm_names
from tests.conftest import compose

charts = pytest.importorskip("capacity_gap.report.charts")  # plotly
HOSTILE = "<script>alert(1)</script>"
SECTIONS = ["run", "curves", "law", "heat", "data", "dynamics", "scores", "cost", "failures", "provenance", "reproduce"]


class Page(HTMLParser):
    """A page as a browser reads it: its elements, and its text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.scripts, self._inside = [], "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def ids(self):
        return [a["id"] for _, a in self.elements if "id" in a]


def grid(students=(50, 60, 75), ratios=(1, 1.5, 2.2, 3.3, 5.0, 7.5), budgets=(300_000, 1_000_000), seeds=3, **more):
    """Records of a grid whose best teachers are 2.6 times the student (with little data) and 3.4 times."""
    noise = np.random.default_rng(0)
    rows = []
    for s in students:
        for r in ratios:
            for d in budgets:
                for seed in range(seeds):
                    away = np.log(r / (2.6 if d < 500_000 else 3.4))
                    loss = 4 - 0.2 * np.log(s / 50) - 0.05 * np.log(d / 3e5) + 0.05 * away**2
                    rows.append(
                        {
                            "cell": f"{len(rows):032x}",
                            "status": "done",
                            "student": f"{s}k",
                            "teacher": f"{s * r:g}k",
                            "data_tokens": d,
                            "seed": seed,
                            "student_params": s * 1000,
                            "teacher_params": s * r * 1000,
                            "student_loss": loss + noise.normal(0, 0.002),
                            "student_loss_stderr": 0.009,
                            "metrics/cloze": 0.5 - loss / 100,
                            "metrics/cloze/stderr": 0.01,
                            "train_flops": 1e9,
                            "teacher_flops": 2e9,
                            "teacher_train_flops": 5e9,
                            "created": "2026-11-24T20:00:00+00:00",
                            **more,
                        }
                    )
    return pd.DataFrame(rows)


def report(frame, tmp_path, **options):
    """The report of a table, as text."""
    source, out = tmp_path / "runs.csv", tmp_path / "report.html"
    frame.to_csv(source, index=False)
    page.write_report(str(source), out, **options)
    return out.read_text(encoding="utf-8")


def test_a_report_has_every_section_and_needs_nothing_else(tmp_path):
    read = Page(report(grid(), tmp_path))
    assert [i for i in read.ids() if i in SECTIONS] == SECTIONS
    assert [tag for tag, a in read.elements if tag in ("link", "img", "iframe") or "src" in a] == []
    assert all(a["href"].startswith("#") for tag, a in read.elements if tag == "a")
    assert "The best teacher has" in read.text and "permuted data" in read.text
    drawn = set(json.loads(read.scripts[1]))
    assert drawn == {"curves", "ratio", "heat", "data", "scores", "cost"}, "no history: no dynamics"
    assert {f"chart-{name}" for name in drawn} <= set(read.ids())


def failed(frame):
    return frame.assign(
        status="failed", student_loss=np.nan, student_loss_stderr=np.nan, error="the loss is not finite"
    )


def other(frame, **settings):
    """The same cells under other settings: other cells."""
    return frame.assign(cell=[f"{9000 + i:032x}" for i in range(len(frame))], **settings)


FULL = grid()
FIRST = FULL.student == "50k"
HOLDINGS = {
    "nothing": FULL[:0],
    "failures only": failed(FULL),
    "a failed cell": pd.concat([FULL[1:], failed(FULL[:1])]),
    "a curve of failures, by its settings": pd.concat(
        [FULL, failed(other(FULL[:1], settings="train.learning_rate=1e+30", learning_rate=1e30))]
    ),
    "a curve of failures, by its student": pd.concat([FULL[~FIRST], failed(FULL[FIRST])]),
    "a curve of failures, by its start": pd.concat([FULL.assign(init="pruned"), failed(other(FULL, init="random"))]),
    "failures without sizes": pd.concat(
        [FULL, failed(other(FULL[:1], student_params=np.nan, teacher_params=np.nan, data_tokens=np.nan))]
    ),
    "one teacher": FULL[FULL.teacher == "50k"],
    "one cell": FULL[:1],
    "pruning alone": FULL.assign(data_tokens=0),
    "pruning, and failures": pd.concat([failed(FULL), other(FULL, data_tokens=0)]),
    "pruning, and one cell": pd.concat([FULL[:1], other(FULL, data_tokens=0)]),
    "an infinite loss": pd.concat([FULL, other(FULL[:1], student_loss=np.inf, settings="x=1")]),
    "teachers of one size": FULL.assign(teacher_params=1e5),
    "another status": FULL.assign(status="running"),
    "losses without names": FULL[["student_params", "teacher_params", "student_loss"]],
    "foreign losses": pd.DataFrame({"student_params": 1e6, "teacher_params": [1e6, 2e6, 3e6], "loss": [1, 0.9, 1]}),
    "foreign scores": pd.DataFrame({"student_params": 1e6, "teacher_params": [1e6, 2e6], "accuracy": [0.5, 0.9]}),
}


@pytest.mark.parametrize("axis", ["total", "non_embedding"])
@pytest.mark.parametrize("held", HOLDINGS)
def test_a_report_opens_whatever_is_held(held, axis, tmp_path):
    read = Page(report(HOLDINGS[held], tmp_path, axis=axis))
    failures = int(HOLDINGS[held].get("status", pd.Series()).eq("failed").sum())
    assert "run" in read.ids()
    assert ("the loss is not finite" in read.text) == (failures > 0), "people look here for why cells failed"


def test_scores_are_fitted_as_errors_and_named_so(tmp_path):
    """More right answers are better: the best cell is not the one with the fewest."""
    text = report(grid(**{"metrics/cloze/higher_is_better": True}), tmp_path, metric="metrics/cloze")
    assert "Chosen by 1 − metrics/cloze" in Page(text).text
    assert "error rate of cloze" in Page(text).text and "no difference in loss" not in Page(text).text
    by_loss, by_score = page._best(gather_table(tmp_path)), page._best(gather_table(tmp_path, metric="metrics/cloze"))
    assert by_score[0][-1] == "cloze", "what a table tells beside a score is no score"
    assert [row[:2] for row in by_score[1]] == [row[:2] for row in by_loss[1]], "here the score falls as the loss rises"


def test_the_unit_is_the_metrics_own(tmp_path):
    def said(metric):
        more = {"metrics/ppl": 3.0, "student_bits_per_byte": 1.0, "metrics/cloze/higher_is_better": True}
        text = report(grid(**more), tmp_path, metric=metric)
        read = Page(text)
        heat = json.loads(read.scripts[1])["heat"]["layout"]["coloraxis"]["colorbar"]["title"]["text"]
        return read.text, heat

    text, heat = said(None)
    assert "held-out loss, nats/token: how far above" in text and heat.startswith("nats/token<br>")
    text, heat = said("metrics/cloze")
    assert "cloze, error rate: how far above" in text and heat.startswith("error rate<br>")
    assert "cloze, error rate against teacher" in text and "Loss against teacher" not in text
    assert said("metrics/ppl")[1].startswith("above") and said("student_bits_per_byte")[1].startswith("bits/byte<br>")


def gather_table(tmp_path, **options):
    """What the report of the last table was made from."""
    return content.gather(str(tmp_path / "runs.csv"), **options)


def test_the_same_records_give_the_same_file(tmp_path):
    assert report(grid(), tmp_path) == report(grid(), tmp_path)


def test_what_users_typed_is_text(tmp_path):
    frame = grid(corpus=HOSTILE, family=f"{HOSTILE}%{{x}}", git_commit=HOSTILE).assign(
        student=lambda t: t["student"] + HOSTILE, teacher=HOSTILE, error=None
    )
    failed = frame[:1].assign(status="failed", error=f"no {HOSTILE}", student_loss=np.nan)
    read = Page(report(pd.concat([frame, failed]), tmp_path))
    assert [tag for tag, _ in read.elements].count("script") == 4
    assert read.text.count(HOSTILE) > 5 and f"no {HOSTILE}" in read.text
    figures = json.loads(read.scripts[1])
    assert "<script" not in json.dumps(figures) and "&lt;script&gt;alert(1)" in json.dumps(figures)


def hostile_grid(tiny, text_file, folder):
    """A store with one cell of a grid whose corpus lies in a folder called like a script."""
    corpus = folder / "<script>alert(1)<" / "script>"
    corpus.mkdir(parents=True)
    (corpus / "a.txt").write_text(text_file.read_text(encoding="utf-8"), encoding="utf-8")
    given = [*[t for t in tiny if not t.startswith("corpus.path")], f"corpus.path='{corpus}'", "student=40k"]
    config = compose([*given, "teacher=55k", f"store={folder / 'store'}"])
    key = run_config(config)
    note_sweep(Store(config.store_path), "hostile", {key: {"name": "x", "overrides": given, "stages": {}}})
    return config.store_path


def test_a_hostile_corpus_folder_shows_as_text(tiny, tmp_path, text_file, capsys):
    store = hostile_grid(tiny, text_file, tmp_path)
    assert cli.main(["report", str(store), "--sweep", "hostile", "--out", str(tmp_path / "r.html")]) == 0
    assert "No law can be fitted" in capsys.readouterr().out
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    read = Page(text)
    assert [tag for tag, _ in read.elements].count("script") == 4
    assert HOSTILE in read.text and HOSTILE not in text
    assert {"curves", "dynamics_ce", "dynamics_kl"} <= set(json.loads(read.scripts[1]))


def test_json_in_the_page_cannot_end_its_element():
    text = page.embedded({"a": "</script>&\u2028"})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"a": "</script>&\u2028"}


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (pd.DataFrame({"a": [1]}), "the table lacks student_params"),
        (grid().assign(status="failed", error="boom", student_loss=np.nan), "boom"),
        (grid(students=(50,), ratios=(2.0,)), "No law can be fitted"),
    ],
)
def test_what_cannot_be_fitted_is_told(frame, says, tmp_path):
    read = Page(report(frame, tmp_path))
    assert says in read.text and [i for i in read.ids() if i in SECTIONS] == SECTIONS


FOREIGN = {
    "no names of scales": lambda t: t.drop(columns=["student", "teacher"]),
    "only what a fit needs": lambda t: t[["student_params", "teacher_params", "student_loss"]],
    "no FLOPs of teachers": lambda t: t.drop(columns=["teacher_flops", "teacher_train_flops"]),
    "seeds that are words": lambda t: t.assign(seed="a", teacher_seed="b"),
    "a loss that is no number": lambda t: t.assign(
        student_loss=t["student_loss"].astype(object).where(t.index != 2, "-")
    ),
}


@pytest.mark.parametrize("made", FOREIGN.values(), ids=FOREIGN.keys())
def test_what_can_be_fitted_can_be_reported(made, tmp_path):
    frame = made(grid(budgets=(300_000,), seeds=2))
    frame.to_csv(tmp_path / "runs.csv", index=False)
    assert cli.main(["fit", str(tmp_path / "runs.csv")]) == 0
    read = Page(report(frame, tmp_path))
    assert [i for i in read.ids() if i in SECTIONS] == SECTIONS
    assert {"curves", "ratio", "heat"} <= set(json.loads(read.scripts[1]))
    assert ("training the teachers, each oncenot recorded" in read.text) == ("teacher_train_flops" not in frame)


def test_intervals_of_means_are_the_pooled_t_intervals():
    rows = pd.DataFrame({"t": [1, 1, 2, 2], "loss": [1.0, 3.0, 5.0, 5.0]})
    found = content.means(rows, "t", "loss")
    assert list(found["mean"]) == [2.0, 5.0]
    assert found["half"].tolist() == pytest.approx([4.302652730 * 1.0 / np.sqrt(2)] * 2)  # s² = 2/2, df = 2
    assert content.means(rows[::2], "t", "loss")["half"].isna().all()


def test_arms_are_named_by_what_differs():
    keys = [{"family": "pico", "data_tokens": d, "init": i, "student": "a"} for d, i in ((300_000, "x"), (0, "y"))]
    assert arm_names(keys) == ["300k tokens, init x", "no distillation, init y"]
    assert arm_names(keys[:1]) == ["all runs"]


def test_each_teacher_costs_once():
    frame = grid(family="pico", teacher_seed=0, teacher_tokens=1)
    found = content.costs(frame)
    assert found["students"] == len(frame) * 1e9
    assert found["teachers"] == frame["teacher"].nunique() * 5e9


def test_a_student_that_two_cells_recorded_is_drawn_and_paid_for_once(tmp_path):
    frame = grid(trained="x").assign(trained=lambda t: t["cell"])
    again = frame.assign(cell="y" + frame["cell"], **{"metrics/other": 0.5})
    both = pd.concat([frame, again], ignore_index=True)
    assert content.costs(both)["students"] == content.costs(frame)["students"]
    both.to_csv(tmp_path / "runs.csv", index=False)
    found = content.gather(str(tmp_path / "runs.csv"))
    assert sum(len(p.rows) for p in found.panels) == len(frame)


def test_cells_of_two_origins_cost_twice():
    """Each ran them, its teachers too."""
    frame = grid(family="pico", teacher_seed=0, teacher_tokens=1).assign(trained=lambda t: t["cell"])
    both = pd.concat([frame.assign(origin=who) for who in ("lab-a", "lab-b")], ignore_index=True)
    one, two = content.costs(frame.assign(origin=None)), content.costs(both)
    assert (two["students"], two["teachers"]) == (2 * one["students"], 2 * one["teachers"])


def test_commands_make_the_grid_again():
    cells = [
        {"overrides": [f"student={s}", f"teacher={t}", "+sweeps=quick", "hydra.x=1", "store=here"]}
        for s in ("40k", "60k")
        for t in ("80k", "120k")
    ]
    assert content.commands("quick", cells) == [
        "python run.py -m +sweeps=quick student=40k,60k teacher=80k,120k",
        "python -m capacity_gap report store --sweep quick",
    ]


def made_by(command):
    """The cells that a command's grid has, as the sweeper crosses it and skips what is impossible."""
    words = [w.partition("=") for w in shlex.split(command) if "=" in w]
    crossed = itertools.product(*([f"{k}={v}" for v in values.split(",")] for k, _, values in words))
    scales = [
        (cell, {k: float(v.removesuffix("k")) for k, _, v in (w.partition("=") for w in cell)}) for cell in crossed
    ]
    return [frozenset(cell) for cell, of in scales if of.get("student", 0) <= of.get("teacher", math.inf)]


@pytest.mark.parametrize(
    ("pairs", "commands"),
    [
        ({"40k": ["55k", "80k"], "60k": ["120k"]}, 2),
        ({"40k": ["50k", "80k", "120k"], "60k": ["80k", "120k"], "90k": ["120k"]}, 1),  # others are larger than theirs
        ({"40k": ["55k", "80k"], "60k": ["80k", "120k"]}, 2),
        ({"40k": ["80k", "120k"], "60k": ["120k"]}, 2),  # 60k from 80k is possible, and was not asked for
    ],
)
def test_commands_make_no_cell_that_was_not_asked_for(pairs, commands):
    cells = [
        {"overrides": [f"student={s}", f"teacher={t}", f"seed={seed}"]}
        for seed in range(3)
        for s, teachers in pairs.items()
        for t in teachers
    ]
    *grids, _ = content.commands("g", cells)
    made = [cell for grid in grids for cell in made_by(grid)]
    assert len(grids) == commands, grids
    assert sorted(map(sorted, made)) == sorted(sorted(cell["overrides"]) for cell in cells)


def test_teachers_that_round_to_one_name_keep_their_columns(tmp_path):
    frame = grid(budgets=(300_000,)).assign(teacher="/models/a/long/name")
    near = frame[frame["teacher_params"].round() == 110_000].assign(teacher_params=110_020)
    report(pd.concat([frame, near]), tmp_path)
    (drawn,) = charts.heat_map(gather_table(tmp_path)).data
    assert [t == "" for t in np.ravel(drawn.text)] == np.isnan(drawn.z).ravel().tolist(), "no word where no cell is"
    assert len(set(drawn.x)) == len(drawn.x) and {"110k (110,000)", "110k (110,020)"} <= set(drawn.x)


def test_lines_are_drawn_without_marks_that_look_like_optima(tmp_path):
    report(grid(), tmp_path)
    law = charts.ratio_law(gather_table(tmp_path))
    assert {t.name: t.mode for t in law.data if t.mode != "markers"} == {
        "95 % interval": "lines",
        "2.5 (the paper)": "lines",
        next(t.name for t in law.data if t.name.startswith("fitted")): "lines",
    }


def test_many_names_have_a_colour_each():
    for count in (8, 9, 30):
        assert len(set(charts.colours_of([f"{n}k" for n in range(count)]).values())) == count


def test_every_cell_is_a_point_and_every_optimum_a_diamond(tmp_path):
    frame = grid()
    frame.to_csv(tmp_path / "runs.csv", index=False)
    found = content.gather(str(tmp_path / "runs.csv"))
    drawn = charts.u_curves(found).data
    points = [trace for trace in drawn if trace.mode == "markers" and trace.legendgroup != "optimum"]
    assert sum(len(trace.x) for trace in points) == len(frame)
    diamonds = {round(trace.x[0], 6) for trace in drawn if trace.legendgroup == "optimum"}
    assert diamonds == {round(o.teacher_params, 6) for o in found.law.optima if o.teacher_params}
    heat = charts.heat_map(found).data
    assert len(heat) == 2 and all(np.nanmin(trace.z, axis=1).tolist() == [0.0] * 3 for trace in heat)


@pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")
def test_the_dashboard_holds_curves_ratio_dynamics_and_throughput(tmp_path):
    pytest.importorskip("wandb_workspaces")
    out = tmp_path / "board.json"
    assert cli.main(["dashboard", "team/gap", "--sweep", "quick", "--out", str(out)]) == 0
    board = json.loads(out.read_text())
    sections = board["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections] == ["U-curves", "The ratio law", "Training dynamics", "Throughput and cost"]
    text = out.read_text()
    fields = {f"summary:{name}" for name in ("teacher_params", "student_loss", "teacher_over_student")}
    assert all(field in text for field in fields)
    assert {"train/ce", "train/kl", "train/tokens_per_s", "figures/curves", "summary_metrics.law/ratio"} <= set(
        text.split('"')
    )
    assert board["spec"]["section"]["runSets"][0]["filters"]["filters"][0]["value"] == ["quick"]
    assert cli.main(["dashboard", "gap"]) == 2


@pytest.mark.filterwarnings("ignore:Pydantic V1 style:DeprecationWarning")
def test_the_dashboard_asks_for_the_tag_that_runs_have(tmp_path, monkeypatch):
    pytest.importorskip("wandb_workspaces")
    import wandb

    seen = {}
    monkeypatch.setattr(wandb, "init", lambda **about: seen.update(about))
    name = "a-grid-of-eighty-letters-" + "x" * 55
    wandb_runs.open_run(TrackingConfig(mode="offline"), tmp_path, sweeps=[name], id="c0")
    assert cli.main(["dashboard", "team/gap", "--sweep", name, "--out", str(tmp_path / "board.json")]) == 0
    (shown,) = json.loads((tmp_path / "board.json").read_text())["spec"]["section"]["runSets"]
    assert shown["filters"]["filters"][0]["value"] == seen["tags"] == [seen["group"]]
