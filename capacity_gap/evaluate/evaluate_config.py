"""Settings of evaluation: how much held-out text, which benchmarks."""

from dataclasses import dataclass, field
from pathlib import Path

from capacity_gap.evaluate.tasks import Task, folder_tasks, forbid_code, parse_tasks
from capacity_gap.settings.checks import need, positive, runtime
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.hashing import LATER


@dataclass
class EvaluateConfig:
    """How much held-out text every model is scored on, and on which benchmarks (`evaluate/tasks.py`)."""

    tokens: int = 200_000
    ood_tokens: int = 100_000
    batch_size: int = runtime(32)
    tasks: list[str] = field(default_factory=list, metadata=LATER)  # benchmarks, `name` or `name:shots`
    code_tasks: list[str] = field(default_factory=list, metadata=LATER)  # run only with allow_code_execution
    task_folder: str | None = runtime(None)  # task files of one's own: their content is what is hashed
    limit: int | None = field(default=None, metadata=LATER)  # only so many questions of each benchmark
    allow_code_execution: bool = runtime(False)

    def __post_init__(self) -> None:
        positive("evaluate", self, "tokens", "ood_tokens", "batch_size")
        need(self.limit is None or self.limit > 0, "evaluate.limit", self.limit, "more than zero, or null")
        if self.task_folder == "":
            raise ConfigError("evaluate=local needs evaluate.task_folder=FOLDER with task files (.yaml).")
        self._forbid_code(parse_tasks(self.tasks))
        parse_tasks([*self.tasks, *self.code_tasks])

    @property
    def folder(self) -> Path | None:
        """The folder of task files, absolute."""
        return Path(self.task_folder).expanduser().absolute() if self.task_folder else None

    @property
    def benchmarks(self) -> list[Task]:
        """What is run: the tasks named, else all that the folder defines; those that run code only if allowed."""
        named = parse_tasks([*self.tasks, *(self.code_tasks if self.allow_code_execution else [])])
        found = named or [Task(name) for name in (folder_tasks(self.folder) if self.folder else [])]
        self._forbid_code(found, self.folder)
        return found

    def _forbid_code(self, tasks: list[Task], folder: Path | None = None) -> None:
        flag = "evaluate.allow_code_execution=true"
        forbid_code(tasks, allowed=self.allow_code_execution, flag=flag, folder=folder)
