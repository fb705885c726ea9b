"""The house keeps its walls: imports go downwards, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_xattn

PACKAGE = Path(lightning_xattn.__file__).parent

ROOMS = {
    "errors": set(),
    "files": set(),
    "phrases": set(),
    "attention": {"errors"},
    "functional": {"attention", "errors"},
    "group_keys": {"errors"},
    "capture": {"attention", "errors"},
    "labels": {"attention", "errors", "group_keys"},
    "groups": {"functional", "group_keys"},
    "aggregation": {"functional", "attention", "errors", "group_keys", "groups"},
    "alarms": {"aggregation", "attention", "capture", "phrases"},
    "attention_analysis": {"attention", "functional", "errors", "phrases"},
    "explanation": {"aggregation", "attention", "attention_analysis"},
    "interpretation": {"attention_analysis", "explanation", "functional", "phrases"},
    "report": {
        *("aggregation", "attention", "attention_analysis", "explanation", "functional", "interpretation", "errors"),
        *("files", "phrases"),
    },
    "grouping": {"aggregation", "errors", "labels"},
    "sums": {"aggregation", "attention", "functional", "grouping", "labels"},
    "distributed": set(),
    "schedule": {"errors"},
    "table": {"aggregation"},
    "visualizations": {"attention", "errors", "files", "functional", "phrases"},
    "epoch": {"aggregation", "attention", "functional", "visualizations", "errors"},
    "sinks": {"errors", "files"},
    "callback": {
        *("attention", "capture", "aggregation", "alarms", "grouping", "distributed", "schedule", "sums", "table"),
        *("visualizations", "epoch", "sinks", "errors", "labels", "phrases"),
    },
    "hms": {
        *("", "attention", "errors", "explainer", "explanation", "files", "functional", "phrases", "report"),
        "visualizations",
    },
    "cli": {"", "hms"},
    # The package itself: the public names.
    "": {"attention", "callback", "capture", "errors", "explainer", "interpretation", "report"},
    "explainer": {
        *("alarms", "attention", "attention_analysis", "capture", "aggregation", "errors", "functional", "labels"),
        *("epoch", "explanation", "files", "grouping", "groups", "phrases", "sums", "table", "visualizations"),
    },
}
"""What each room may import besides itself; "" is the package's public API."""

ONLY_IN = {"torch_geometric": {"hms"}, "pyarrow": {"hms", "table"}, "matplotlib": {"visualizations"}}


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


def test_every_room_is_known():
    assert {room_of(path) for path in FILES} == set(ROOMS)


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, pytorch_lightning; before = set(sys.modules); import lightning_xattn; "
        "print(*(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "lightning_xattn.callback" in loaded
    heavy = ("matplotlib", "torch_geometric", "pyarrow", "lightning_xattn.visualizations", "lightning_xattn.hms")
    assert not [name for name in loaded if name.startswith(heavy)]
