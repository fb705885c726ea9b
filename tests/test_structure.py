"""The house keeps its walls: imports go downwards, and importing the package stays light."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import lightning_xattn
from lightning_xattn import functional

PACKAGE = Path(lightning_xattn.__file__).parent

ROOMS = {
    "names": set(),
    "errors": {"names"},
    "files": set(),
    "distributed": set(),
    "stages": {"names"},
    "notebook": set(),
    "messages": {"errors", "names"},
    "attention": {"errors", "names"},
    "functional": {"attention", "errors"},
    "columns": {"attention", "errors", "functional"},
    "group_keys": {"errors", "names"},
    "groups": {"functional", "group_keys"},
    "capture": {"attention", "errors"},
    "labels": {"attention", "errors", "group_keys"},
    "aggregation": {"attention", "columns", "errors", "functional", "groups"},
    "summary": {"aggregation", "attention", "columns", "functional", "group_keys", "messages", "notebook"},
    "fusion": {
        *("aggregation", "attention", "capture", "columns", "distributed", "errors", "functional", "group_keys"),
        *("labels", "messages", "notebook", "summary"),
    },
    "peers": {"attention", "capture", "distributed", "errors", "fusion", "labels"},
    "recording": {"attention", "capture", "distributed", "errors", "fusion", "labels", "messages", "peers"},
    "maps": {"functional", "fusion"},
    "results": {"attention", "errors", "functional", "fusion", "labels", "maps", "notebook", "summary"},
    "classes": {"aggregation", "errors", "labels", "messages", "names"},
    "checks": {"attention", "capture", "columns", "fusion", "messages", "summary"},
    "table": {"aggregation", "columns", "files", "messages", "names"},
    "findings": {"checks", "files", "fusion", "messages", "summary"},
    "evaluation": {
        *("aggregation", "attention", "capture", "checks", "classes", "columns", "distributed", "errors", "functional"),
        *("fusion", "group_keys", "labels", "maps", "messages", "recording", "results", "summary"),
    },
    "visualizations": {"attention", "errors", "files", "functional", "messages", "names"},
    "sinks": {"files", "messages", "names", "visualizations"},
    "curves": {"aggregation", "attention", "columns", "fusion", "names", "summary"},
    "history": {"curves"},
    "figures": {
        *("aggregation", "attention", "columns", "curves", "functional", "fusion", "messages", "names", "results"),
        *("sinks", "summary", "visualizations"),
    },
    "report": {
        *("aggregation", "attention", "columns", "errors", "figures", "files", "functional", "fusion", "messages"),
        *("names", "notebook", "results", "summary", "table", "visualizations"),
    },
    "trainer": {"attention", "curves", "distributed", "errors", "names"},
    "epoch_log": {
        *("checks", "classes", "curves", "evaluation", "figures", "messages", "report", "results", "sinks", "summary"),
        "trainer",
    },
    "callback": {
        *("capture", "distributed", "epoch_log", "errors", "evaluation", "findings", "fusion", "history", "labels"),
        *("messages", "recording", "results", "summary", "table", "trainer"),
    },
    "explainer": {
        *("aggregation", "attention", "capture", "checks", "classes", "columns", "errors", "evaluation", "figures"),
        *("files", "functional", "fusion", "group_keys", "groups", "labels", "maps", "messages", "names", "recording"),
        *("results", "stages", "table"),
    },
    # The guide's names stand on top; the two files are where the guide imports them from.
    "guide": {"attention", "errors", "functional", "messages", "report", "results"},
    "attention_analysis": {"guide"},
    "interpretation": {"guide"},
    # The package itself: the public names.
    "": {"attention", "callback", "capture", "errors", "explainer", "guide", "report"},
    "hms": {
        *("", "attention", "columns", "errors", "explainer", "files", "functional", "group_keys", "messages", "names"),
        *("report", "results", "stages", "visualizations"),
    },
    "commands": {"errors", "explainer", "messages", "names", "report", "stages", "visualizations"},
    "cli": {"", "commands", "errors", "hms", "stages"},
}
"""What each room may import besides itself; "" is the package's public API."""

ONLY_IN = {"torch_geometric": {"hms"}, "pyarrow": {"hms", "sinks", "table"}, "matplotlib": {"visualizations"}}


def room_of(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if part == "__init__" else part


def imports_of(path):
    """Every module that is imported, but for types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    room = room_of(path)
    for name in imports_of(path):
        top, _, rest = name.partition(".")
        if top == PACKAGE.name:
            target = rest.partition(".")[0]
            assert target == room or target in ROOMS[room], f"{room} imports {name}"
        for library, homes in ONLY_IN.items():
            if top == library:
                assert room in homes, f"{room} imports {name}"


def test_every_room_is_known_and_stands_above_what_it_imports():
    rooms = list(ROOMS)
    assert {room_of(path) for path in FILES} == set(rooms)
    for room, imported in ROOMS.items():
        assert all(rooms.index(below) < rooms.index(room) for below in imported), room


def test_each_thing_has_a_name_of_its_own():
    """Classes and functions of the whole package, private ones too."""
    homes = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                homes[node.name].append(path.name)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_functional_exports_every_statistic_that_it_has():
    defined = {
        node.name
        for path in (PACKAGE / "functional").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    }
    assert defined | {"ROW_STATISTICS"} == set(functional.__all__)


@pytest.mark.slow
def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, pytorch_lightning; before = set(sys.modules); import lightning_xattn; "
        "print(*(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "lightning_xattn.callback.callback" in loaded
    heavy = ("matplotlib", "torch_geometric", "pyarrow", "lightning_xattn.visualizations", "lightning_xattn.hms")
    assert not [name for name in loaded if name.startswith(heavy)]


@pytest.mark.slow
def test_the_callback_runs_without_torch_geometric_and_pyarrow():
    code = """
import sys
sys.modules |= {"torch_geometric": None, "pyarrow": None}
import lightning_xattn
from tests.toy import ToyModule, validate
assert "xattn_alignment/val/all" in validate(ToyModule(), lightning_xattn.AttentionExplainabilityCallback())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
