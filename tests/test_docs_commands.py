"""The commands of every page of docs/ are commands: runs are planned, other commands parse, outputs are as shown.

A block is code between fences. What can't be planned here has the comment `<!-- needs the hub -->` right before its
block; its commands are only parsed. A block `text` right behind commands shows lines of
what they print: of runs in the plan, of all others in what the block really prints (slow).
"""

import contextlib
import io
import re
import shlex
import subprocess
from dataclasses import dataclass, replace

import pytest

from capacity_gap.commands import cli
from tests.conftest import ROOT, run_here, run_py

PAGES = sorted(p.name for p in (ROOT / "docs").glob("*.md"))
NEEDS = {"the hub"}
ABSENT = "SmolLM2-135M-Instruct.Q4_1.gguf"  # of a package that is not installed for tests
FENCE = re.compile(r"(?:<!-- (?P<note>[^>]*) -->\n)?(?P<pad> *)```(?P<kind>\w*)\n(?P<text>.*?)\n(?P=pad)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Code of a page; `shown`: the lines that the page says it prints."""

    kind: str
    text: str
    note: str
    shown: tuple[str, ...] = ()

    @property
    def commands(self):
        """What is typed, without comments."""
        lines = [re.split(r"\s+#", line)[0].strip() for line in self.text.splitlines()]
        parts = [part.strip() for line in lines for part in line.split("&&")]
        return [p for p in parts if re.match(r"python |make ", p)] if not self.kind else []


def blocks_of(page):
    found = []
    for match in FENCE.finditer(page):
        text = "\n".join(line.removeprefix(match["pad"]) for line in match["text"].splitlines())
        if match["kind"] == "text":
            found[-1] = replace(found[-1], shown=tuple(line for line in text.splitlines() if line.strip()))
        else:
            found.append(Block(match["kind"], text, match["note"] or ""))
    return found


BLOCKS = {name: blocks_of((ROOT / "docs" / name).read_text(encoding="utf-8")) for name in PAGES}
COMMANDS = {name: [(c, b) for b in blocks for c in b.commands] for name, blocks in BLOCKS.items()}
RUNS = re.compile(r"python (?:-m capacity_gap\.runtime\.one_machine \d+ )?run\.py ")


def words_of(run):
    """What a run is given, as a grid that is planned."""
    words = shlex.split(RUNS.sub("", run))
    return [*([] if "-m" in words else ["-m"]), *words, "plan=true"]


def plannable(block, command):
    return RUNS.match(command) and not block.note.startswith("needs ") and ABSENT not in command


PLANNED = {name: [c for c, b in found if plannable(b, c)] for name, found in COMMANDS.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages name as the reader's own: a text, tasks, a model's config.json, a module."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "my-text").mkdir()
    (folder / "my-text" / "some.txt").write_text("Some text.\n\n" * 2000)
    (folder / "my-tasks").mkdir()
    task = next(b.text for b in BLOCKS["howto_benchmarks.md"] if b.kind == "yaml")
    (folder / "my-tasks" / "capitals.yaml").write_text(task)
    (folder / "my_loss.py").write_text(next(b.text for b in BLOCKS["howto_extend.md"] if b.kind == "python"))
    (folder / "my_mixtral").mkdir()
    (folder / "my_mixtral" / "config.json").write_text(MIXTRAL)
    return folder


MIXTRAL = """{"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3584,
"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 8,
"head_dim": 64, "num_local_experts": 8, "num_experts_per_tok": 2,
"tie_word_embeddings": false, "max_position_embeddings": 4096}"""


def test_notes_before_blocks_are_known():
    notes = {b.note.removeprefix("needs ") for blocks in BLOCKS.values() for b in blocks if b.note.startswith("needs ")}
    assert notes <= NEEDS


def test_there_are_commands_to_check():
    assert sum(map(len, PLANNED.values())) >= 30
    assert sum(map(len, COMMANDS.values())) >= 80


# Whose plans take long: grids of hundreds of cells, rounds of them, and commands in processes of their own.
LARGE = {"study.md", "replicate.md", "next.md", "howto_extend.md", "architecture.md"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n, commands in PLANNED.items() if commands],
)
def test_runs_plan(name, place):
    for command in PLANNED[name]:
        words = [*words_of(command), f"store={place / 'empty'}"]
        # What a module registers stays in its process, where it would be on the page of settings too.
        own = any(word.startswith("extend=") for word in words)
        done = run_py(*words, cwd=place, check=False) if own else run_here(*words, cwd=place)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "plan: " in done.stdout, command
        shown = next(b.shown for c, b in COMMANDS[name] if c == command)
        assert [line for line in shown if line not in done.stdout] == [], f"{command}\n{done.stdout}"


@pytest.mark.parametrize("name", [n for n, commands in COMMANDS.items() if commands])
def test_other_commands_parse(name):
    for command, _ in COMMANDS[name]:
        words = shlex.split(command)
        if command.startswith("python -m capacity_gap "):
            assert callable(cli.parser().parse_args(words[3:]).run), command
        elif command.startswith("python -m benchmarks."):
            assert (ROOT / f"{words[2].replace('.', '/')}.py").exists(), command
        elif command.startswith("make "):
            done = subprocess.run(["make", "-n", words[1]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}\n{done.stderr}"
        else:
            assert RUNS.match(command), f"{command} is none of the commands that this test knows"


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, blocks in BLOCKS.items() if any(b.shown for b in blocks)])
def test_blocks_print_what_the_page_shows(name, tmp_path, monkeypatch):
    """In order, in one folder: a block may read what one before it has written. Needs no training and no network."""
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    known: dict = {}
    for block in BLOCKS[name]:
        if not block.shown or any(map(RUNS.match, block.commands)):
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            if block.kind == "python":
                exec(block.text, known)
            for command in block.commands:
                assert cli.main(shlex.split(command)[3:]) == 0, command
        assert [line for line in block.shown if line not in out.getvalue()] == [], f"{block.text}\n{out.getvalue()}"
