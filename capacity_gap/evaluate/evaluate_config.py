"""Settings of evaluation: how much held-out text, which benchmarks."""

from dataclasses import dataclass
from pathlib import Path

from capacity_gap.evaluate.tasks import Task, folder_tasks, forbid_code, parse_tasks
from capacity_gap.settings.declare import setting, validate
from capacity_gap.settings.errors import ConfigError
from capacity_gap.settings.places import user_path


@dataclass
class EvaluateConfig:
    """How much held-out text every model is scored on, and on which benchmarks (`evaluate/tasks.py`)."""

    tokens: int = setting(
        200_000,
        "Tokens of the test split to evaluate on.",
        least=1,
        most=10**12,
        column="held_out_tokens",
        computed=True,
    )
    ood_tokens: int = setting(
        100_000,
        "Tokens of out-of-domain text to evaluate on.",
        least=1,
        most=10**12,
        untold="not recorded: the same quantity, another sample",
    )
    validation_tokens: int = setting(
        0,
        "Tokens of the validation split to evaluate students on, for choosing settings; 0: none.",
        least=0,
        most=10**12,
        later=True,
        untold="not recorded: adds a column and changes no other",
    )
    batch_size: int = setting(32, "Sequences per forward pass in evaluation.", least=1, most=2**20, decides=False)
    tasks: list[str] = setting([], "Benchmarks, `name` or `name:shots`.", later=True, column="metrics", computed=True)
    code_tasks: list[str] = setting(
        [],
        "Benchmarks that execute model-written code; need allow_code_execution.",
        later=True,
        column="metrics",
        computed=True,
    )
    task_folder: str | None = setting(
        None, "A folder of your own task files; hashed by content, not path.", decides=False
    )
    limit: int | None = setting(None, "At most this many questions per benchmark.", least=1, most=10**9, later=True)
    allow_code_execution: bool = setting(
        False,
        "Allow benchmarks to execute code (the model's or that of task files) without a sandbox.",
        decides=False,
    )

    def __post_init__(self) -> None:
        validate("evaluate", self)
        if self.task_folder == "":
            raise ConfigError("evaluate=local needs evaluate.task_folder=FOLDER with task files (.yaml).")
        self._forbid_code(parse_tasks(self.tasks))
        parse_tasks([*self.tasks, *self.code_tasks])

    @property
    def folder(self) -> Path | None:
        """The folder of task files, absolute."""
        return user_path(self.task_folder).absolute() if self.task_folder else None

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
