"""The W&B workspace of a project, as code: loss against teacher, the ratio, training dynamics, throughput."""

import json
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import UserError
from capacity_gap.tracking.wandb_runs import tag_of

NAME = "Capacity gap"
MOST_RUNS = 100  # lines in one panel


def dashboard(project: str, *, sweep: str | None = None) -> Any:
    """A workspace of `entity/project`, not saved yet.

    Args:
        project: `entity/project`.
        sweep: show only this grid's runs.

    Raises:
        UserError: the project's name is not of that form, or the extra `[dashboard]` is not installed.
    """
    if project.count("/") != 1 or not all(project.split("/")):
        raise UserError(f"{project} names no project. Write entity/project.")
    try:
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError as error:
        raise UserError("a dashboard needs wandb-workspaces: pip install 'capacity_gap[dashboard]'.") from error
    entity, name = project.split("/")
    return ws.Workspace(
        entity=entity,
        project=name,
        name=f"{NAME}: {sweep}" if sweep else NAME,
        sections=[_curves(), _ratio(), _dynamics(), _throughput()],
        settings=ws.WorkspaceSettings(max_runs=MOST_RUNS),
        runset_settings=ws.RunsetSettings(filters=expr.And(expr.Tags().isin([tag_of(sweep)])) if sweep else ""),
    )


def _section(name: str, *panels: Any) -> Any:
    import wandb_workspaces.workspaces as ws

    return ws.Section(name=name, panels=list(panels), is_open=True)


def _curves() -> Any:
    import wandb_workspaces.reports.v2 as wr

    def against_teacher(title: str, loss: str) -> Any:
        teacher, student = wr.SummaryMetric("teacher_params"), wr.SummaryMetric("student_params")
        return wr.ScatterPlot(title=title, x=teacher, y=wr.SummaryMetric(loss), z=student, log_x=True, log_z=True)

    return _section(
        "U-curves",
        against_teacher("held-out loss against teacher (colour: student)", "student_loss"),
        against_teacher("out of domain", "student_loss_ood"),
        wr.MediaBrowser(title="fitted curves of each sweep", media_keys=["figures/curves"], num_columns=1),
    )


def _ratio() -> Any:
    import wandb_workspaces.reports.v2 as wr

    ratio, student = wr.SummaryMetric("teacher_over_student"), wr.SummaryMetric("student_params")
    return _section(
        "The ratio law",
        wr.ScatterPlot(
            title="held-out loss against teacher / student",
            x=ratio,
            y=wr.SummaryMetric("student_loss"),
            z=student,
            log_x=True,
            log_z=True,
        ),
        wr.MediaBrowser(title="best teacher against student", media_keys=["figures/law"], num_columns=1),
        wr.ScalarChart(title="fitted ratio", metric=wr.SummaryMetric("law/ratio")),
    )


def _dynamics() -> Any:
    import wandb_workspaces.reports.v2 as wr

    shown = {
        "ce": "training cross-entropy, nats/token",
        "kl": "KL to the teacher, nats/token",
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm",
    }
    return _section(
        "Training dynamics",
        *(
            wr.LinePlot(title=title, x="train/tokens", y=[f"train/{key}"], max_runs_to_show=MOST_RUNS)
            for key, title in shown.items()
        ),
    )


def _throughput() -> Any:
    import wandb_workspaces.reports.v2 as wr

    return _section(
        "Throughput and cost",
        wr.LinePlot(title="tokens a second", x="train/tokens", y=["train/tokens_per_s"], max_runs_to_show=MOST_RUNS),
        wr.BarPlot(title="tokens a second, whole run", metrics=[wr.SummaryMetric("tokens_per_s")]),
        wr.BarPlot(title="seconds of training", metrics=[wr.SummaryMetric("wall_s")]),
        wr.BarPlot(title="FLOPs of training", metrics=[wr.SummaryMetric("train_flops")]),
    )


def to_json(workspace: Any) -> str:
    """What W&B would be sent."""
    return json.dumps(workspace._to_model().model_dump(mode="json", by_alias=True), indent=1, ensure_ascii=False)


def save(workspace: Any, out: Path | None) -> str:
    """Writes the workspace to a file, or saves it to W&B; returns where it is."""
    if out:
        out.write_text(to_json(workspace) + "\n", encoding="utf-8")
        return str(out)
    from capacity_gap.records.wandb_rows import connect

    connect()
    return workspace.save().url
