"""The package is built as docs/architecture.md says: rooms import downwards, no rings, no large files."""

import ast
import fnmatch
import re
from graphlib import TopologicalSorter

from tests.conftest import ROOT

PACKAGE = ROOT / "capacity_gap"
ROOMS, DECLARATIONS = (block.splitlines() for block in re.findall(
    r"```\n(.*?)\n```", (ROOT / "docs/architecture.md").read_text(), re.S
)[:2])  # fmt: skip
ORDER = {line.split()[0]: number for number, line in enumerate(ROOMS)}
PATTERNS = [pattern for line in DECLARATIONS for pattern in line.split()]


def module_name(file):
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(file): file for file in PACKAGE.rglob("*.py")}


def imports_of(file):
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "capacity_gap":
            room = node.module.removeprefix("capacity_gap").removeprefix(".")
            for name in (a.name for a in node.names):
                full = f"{room}.{name}".removeprefix(".")
                yield full if full in FILES else room
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("capacity_gap.") for a in node.names if a.name.startswith("capacity_gap."))


GRAPH = {name: set(imports_of(file)) - {name, ""} for name, file in FILES.items() if "." in name}


def layer(module):
    declared = any(fnmatch.fnmatch(module, p) for p in PATTERNS)
    return ORDER["declarations" if declared else module.split(".")[0]]


def test_every_room_is_in_the_list_and_every_declaration_is_a_file():
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and list(p.glob("*.py"))} == ORDER.keys() - {"declarations"}
    assert [p for p in PATTERNS if not fnmatch.filter(FILES, p)] == []


def test_imports_go_downwards():
    upwards = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if layer(other) < layer(name) and other.split(".")[0] != name.split(".")[0]
    ]
    assert upwards == []


def test_no_ring_of_imports():
    tuple(TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names the ring


def test_no_two_files_of_one_name():
    names = [f.name for f in FILES.values() if f.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


def test_no_file_and_no_room_is_large():
    lines = {name: len(file.read_text().splitlines()) for name, file in FILES.items()}
    assert {name: n for name, n in lines.items() if n > 400} == {}
    rooms = {room: sum(n for name, n in lines.items() if name.split(".")[0] == room) for room in ORDER}
    assert {room: n for room, n in rooms.items() if n > 4000} == {}
    assert len(list(PACKAGE.glob("*.py"))) <= 8
