"""Which benchmarks: names, shots, and where their task files are. Imports neither torch nor the harness.

A task is written `name` or `name:shots`, such as `mmlu:5`. Its name is one of the lm-evaluation-harness, one of a
folder of task files, or one of `GENERATED`, which are made from the corpus.
"""

import contextlib
import functools
import importlib.util
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capacity_gap.settings.errors import ConfigError, nearest, shown
from capacity_gap.settings.hashing import files_digest

GENERATED = ("pico_cloze", "pico_next")  # evaluate/suite.py
# Tasks whose names begin so, and groups that hold such tasks, execute what the model wrote.
RUNS_CODE = ("humaneval", "mbpp", "cruxeval", "longproc")
PAPER = {"mmlu": 5, "ceval-valid": 5, "drop": 3, "humaneval": 0, "bbh": 3, "gsm8k": 8}  # the paper's six: shots
FUNCTION = "!function"  # the key of an entry whose file names one
DEEPEST = 8  # groups written inside groups
PERPLEXITIES = ("wikitext", "lambada_openai")
# Where the harness keeps the paper's tasks, so that one folder is read instead of fourteen thousand files.
KNOWN = {
    "mmlu": "mmlu/default",
    "ceval-valid": "ceval",
    "drop": "drop",
    "humaneval": "humaneval",
    "bbh": "bbh/cot_fewshot",
    "gsm8k": "gsm8k",
    "wikitext": "wikitext",
    "lambada_openai": "lambada",
}
_TASK = re.compile(r"(?P<name>[^\s:]+)(?::(?P<shots>\d+))?")
_DEFINED = re.compile(r"^(?:task|group):[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)
_TAGS = re.compile(r"^(?:tag):[ \t]*([^\s#]+)?((?:\n[ \t]*-[ \t]+\S+)*)", re.MULTILINE)


@dataclass(frozen=True)
class Task:
    """One benchmark; `shots` None means the number in its task file."""

    name: str
    shots: int | None = None

    @property
    def runs_code(self) -> bool:
        """Whether it executes code that the model wrote."""
        return self.name.startswith(RUNS_CODE)


def parse_task(given: str, *, key: str = "evaluate.tasks") -> Task:
    """Reads `name` or `name:shots`.

    Raises:
        ConfigError: it is neither.
    """
    match = _TASK.fullmatch(given.strip())
    if not match:
        raise ConfigError(f"{key}: {given!r} is not a task. Write name or name:shots, such as mmlu:5 or wikitext.")
    return Task(match["name"], None if match["shots"] is None else int(match["shots"]))


def parse_tasks(given: Iterable[str], *, key: str = "evaluate.tasks") -> list[Task]:
    """Reads several tasks; one name twice is an error, since records hold one score a name."""
    tasks = [parse_task(g, key=key) for g in given]
    names = [t.name for t in tasks]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ConfigError(f"{key} names {', '.join(twice)} more than once. Use one number of shots per task.")
    return tasks


def paper_tasks(*, allow_code: bool) -> list[Task]:
    """The paper's six with its shots, without those that run code unless that is allowed, and two perplexities."""
    six = [Task(name, shots) for name, shots in PAPER.items()]
    return [t for t in [*six, *map(Task, PERPLEXITIES)] if allow_code or not t.runs_code]


def forbid_code(tasks: Iterable[Task], *, allowed: bool, flag: str, folder: Path | None = None) -> None:
    """Raises if a task, of the harness or of a folder, would execute third-party code without permission."""
    own = unsafe_names(folder) if folder and not allowed else set()
    for task in tasks:
        if (task.runs_code or task.name in own) and not allowed:
            raise ConfigError(
                f"{task.name} executes code (model-written code, or a function named in its task file), on this "
                f"machine and without a sandbox. Allow it with {flag}, or leave the task out."
            )


def folder_digest(folder: Path) -> str:
    """The identity of a folder of task files: the names and contents of all files in it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return files_digest(files) + "".join(f"|{p.relative_to(folder)}" for p in files)


def folder_tasks(folder: Path) -> list[str]:
    """The tasks and groups that a folder defines, without those that are part of one of its groups.

    Raises:
        ConfigError: the folder is not there, or defines none.
    """
    found = _entries(folder)
    inside = {_name_of(member) for entry in found if "group" in entry for member in _members(entry)}
    names = [name for entry in found if isinstance(name := entry.get("group") or entry.get("task"), str)]
    kept = [name for name in dict.fromkeys(names) if name not in inside]
    if not kept:
        raise ConfigError(
            f"evaluate.task_folder={folder} defines no task. Its .yaml files should be task files of the "
            "lm-evaluation-harness, with a line such as `task: my_task`."
        )
    return kept


def folder_names(folder: Path) -> set[str]:
    """Every task, group and tag that the files of a folder define."""
    names: set[str] = set()
    for entry in _entries(folder):
        names.update(n for n in (entry.get("task"), entry.get("group")) if isinstance(n, str))
        names.update(_tags_of(entry))
    return names


def unsafe_names(folder: Path) -> set[str]:
    """The tasks of a folder that say `unsafe_code: true`, or whose file holds a function's name, and what holds one."""
    entries = _entries(folder)
    unsafe = [entry for entry in entries if entry.get("unsafe_code") or FUNCTION in entry]
    names = {entry[kind] for entry in unsafe for kind in ("task", "group") if isinstance(entry.get(kind), str)}
    names.update(*(_tags_of(entry) for entry in unsafe))
    groups = [entry for entry in entries if isinstance(entry.get("group"), str)]
    for _ in groups:  # a group may hold groups: each round reaches one level further up
        names.update(g["group"] for g in groups if any(_unsafe_member(m, names) for m in _members(g)))
    return names


def _unsafe_member(member: Any, names: set[str]) -> bool:
    inside = list(_with_members(member)) if isinstance(member, dict) else []
    found = [_name_of(one) for one in (member, *inside, *(m for one in inside for m in _members(one)))]
    unsafe = any(name is not None and (name in names or Task(name).runs_code) for name in found)
    return unsafe or any(one.get("unsafe_code") for one in inside)


class Function(str):
    """What stands where a task file names a Python function (`!function`)."""


def foreign_metrics(folder: Path, known: Container[str]) -> list[str]:
    """The metrics that task files of a folder name and the harness does not know: it would load code for them."""
    inside = [one for entry in _entries(folder) for one in _with_members(entry)]
    listed = [m for entry in inside for m in _listed(entry.get("metric_list")) if isinstance(m, Mapping)]
    named = [m.get("metric") for m in listed if m.get("metric") not in known or m.get("hf_evaluate")]
    return sorted({str(name) for name in named if not isinstance(name, Function)})


def foreign_members(folder: Path) -> dict[str, bool]:
    """The tasks that groups of a folder name and no file of it defines, and whether the group may define them."""
    inside = [one for entry in _entries(folder) for one in _with_members(entry)]
    members = [m for entry in inside if "group" in entry for m in _members(entry)]
    own = folder_names(folder)
    named = {_name_of(m): isinstance(m, dict) for m in members}
    return {name: written for name, written in named.items() if name is not None and name not in own}


def _with_members(entry: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """An entry, and the tasks and groups that are written inside it."""
    yield entry
    for member in _members(entry) if depth < DEEPEST else ():
        if isinstance(member, dict):
            yield from _with_members(member, depth + 1)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _tags_of(entry: Mapping[str, Any]) -> list[str]:
    tags = entry.get("tag")
    return [tag for tag in ([tags] if isinstance(tags, str) else _listed(tags)) if isinstance(tag, str)]


def _entries(folder: Path) -> tuple[Mapping[str, Any], ...]:
    if not folder.is_dir():
        raise ConfigError(f"evaluate.task_folder={folder} is not a folder. Pass a folder of task files (.yaml).")
    return _entries_of(folder, folder_digest(folder))


@functools.lru_cache(maxsize=16)
def _entries_of(folder: Path, _digest: str) -> tuple[Mapping[str, Any], ...]:
    """A grid asks for each of its cells, so files are read again only if they have changed."""
    return tuple(_read_yaml(f) for f in sorted(folder.rglob("*.yaml")) if f.is_file())


def _read_yaml(file: Path, before: frozenset[Path] = frozenset()) -> dict[str, Any]:
    """One file over those that it includes; `before`: those that include it, lest files go round in a ring.

    It has the key `FUNCTION` if a function is named anywhere in them: the harness imports it as soon as it reads the
    name, even where another line replaces it.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads `!function` as the text it is: nothing of a user's is imported to find out names."""

    installed = importlib.util.find_spec("lm_eval")
    harness = Path(installed.origin).parent if installed and installed.origin else None
    # Functions of the harness's own files came with it: whoever includes one of those runs nothing new.
    is_known = harness is not None and harness in file.resolve().parents
    named: list[str] = []

    def name_function(loader: Any, suffix: str, node: Any) -> Function:
        named.append(suffix)
        return Function(suffix)

    Loader.add_multi_constructor("!", name_function)
    try:
        read = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not a valid YAML file: {shown(error)}.") from error
    if not isinstance(read, dict):
        return {}
    marks = {FUNCTION: True} if named and not is_known else {}
    included = read.pop("include", [])
    bases = [file.parent / str(base) for base in (included if isinstance(included, list) else [included])]
    found: dict[str, Any] = {}
    for base in bases:
        if base.is_file() and base.resolve() not in before:
            found |= _read_yaml(base, frozenset({*before, base.resolve()}))
    return found | read | marks


def _members(group: Mapping[str, Any]) -> Sequence[Any]:
    members = group.get("task", [])
    return members if isinstance(members, list) else [members]


def _name_of(member: Any) -> str | None:
    name = (member.get("group") or member.get("task")) if isinstance(member, dict) else member
    return name if isinstance(name, str) else None


def harness_folder() -> Path:
    """Where the installed harness keeps its tasks.

    Raises:
        ConfigError: it is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "benchmarks need the lm-evaluation-harness, which is not installed: pip install 'capacity_gap[eval]'. "
            "Without it, evaluate=perplexity (the default) gives held-out losses."
        )
    return Path(spec.origin).parent / "tasks"


def place(name: str) -> Path:
    """The folder of the harness whose files define task, group or tag `name`, found without loading any.

    Raises:
        ConfigError: there is none.
    """
    root = harness_folder()
    if name in KNOWN and (root / KNOWN[name]).is_dir():
        return root / KNOWN[name]
    places = _places(root)
    if name not in places:
        raise ConfigError(
            f"the lm-evaluation-harness has no task {name!r}{nearest(name, places)}. `lm_eval ls tasks` lists them; "
            "put your own tasks into a folder: evaluate=local evaluate.task_folder=FOLDER."
        )
    return places[name]


@functools.cache
def _places(root: Path) -> dict[str, Path]:
    """Folder of every name that a task file of the harness defines; the first file wins, as in the harness."""
    found: dict[str, Path] = {}
    for file in sorted(root.rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        names = _DEFINED.findall(text)
        for first, others in _TAGS.findall(text):
            names += [first] if first else re.findall(r"-[ \t]+(\S+)", others)
        for name in names:
            found.setdefault(name, root / file.relative_to(root).parts[0])
    return found


def places_of_members(folder: Path) -> list[Path]:
    """Where the harness keeps the tasks that groups of a folder name and the folder does not define."""
    found = set()
    for name in foreign_members(folder):
        with contextlib.suppress(ConfigError):  # the group itself defines it
            found.add(place(name))
    return sorted(found)


def check_tasks(tasks: Iterable[Task], folder: Path | None) -> None:
    """Raises, before anything is computed, if the harness is missing or a task is undefined."""
    tasks = list(tasks)
    if tasks:
        harness_folder()
    own = folder_names(folder) if folder else set()
    for task in tasks:
        if task.name not in own and task.name not in GENERATED:
            place(task.name)
    for name, written in (foreign_members(folder) if folder else {}).items():
        if not written:
            place(name)
