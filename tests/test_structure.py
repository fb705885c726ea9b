"""The house keeps its walls: imports go downwards, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_xattn
from lightning_xattn import functional

PACKAGE = Path(lightning_xattn.__file__).parent

FLOORS = (
    {"core"},
    {"functional", "capture"},
    {"attribution", "visualizations"},
    {"evaluation"},
    {"report"},
    {"loggers", "explainer"},
    {"callback"},
    {"hms"},
)
"""The rooms, from the ground up: a room imports only from floors below its own."""

ROOMS = {room for floor in FLOORS for room in floor}

BESIDE = {("capture", "functional")}
"""What may import its neighbour."""

FACE = {"__init__.py", "attention_analysis.py", "cli.py"}
"""What users import and call; it stands above all floors."""

ONLY_IN = {
    "torch_geometric": {"hms"},
    "pyarrow": {"hms", "evaluation", "loggers"},
    "matplotlib": {"hms", "visualizations"},
}


def room_of(path):
    """The room of a module; None for the face."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def floor_of(room):
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


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
            of_package = node.module == PACKAGE.name
            yield from (f"{node.module}.{alias.name}" if of_package else node.module for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_module_is_in_a_room_or_of_the_face():
    assert {room_of(path) for path in FILES} == {*ROOMS, None}
    assert {path.name for path in FILES if room_of(path) is None} == FACE
    assert all((PACKAGE / room / "__init__.py").exists() for room in ROOMS)


def test_imports_go_downwards():
    wrong = []
    for path in FILES:
        room = room_of(path)
        for name in imports_of(path):
            top, _, rest = name.partition(".")
            homes = ONLY_IN.get(top)
            if homes is not None and room not in homes:
                wrong.append(f"{path}: {name}")
            if top != PACKAGE.name or room is None:
                continue
            target = rest.partition(".")[0]
            is_below = target in ROOMS and floor_of(target) < floor_of(room)
            if target != room and not is_below and (room, target) not in BESIDE:
                wrong.append(f"{path}: {name}")
    assert not wrong


def test_no_import_goes_in_a_circle():
    """Of single modules, as imports at their top run: a circle works or not by which of them is imported first."""
    modules = {".".join(("lightning_xattn", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in FILES}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    imported = {}
    for name, path in modules.items():
        tops = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        found = [
            f"{node.module}.{alias.name}" for node in tops if isinstance(node, ast.ImportFrom) for alias in node.names
        ]
        found += [node.module for node in tops if isinstance(node, ast.ImportFrom)]
        imported[name] = {one for one in found if one in modules and one != name and room_of(modules[one])}
    while leaves := [name for name, others in imported.items() if not others & set(imported)]:
        for name in leaves:
            del imported[name]
    assert not imported


def test_only_the_command_imports_the_reference_application():
    others = [path for path in FILES if room_of(path) != "hms"]
    importing = {path.name for path in others if any("lightning_xattn.hms" in name for name in imports_of(path))}
    assert importing == {"cli.py"}


def test_functional_exports_every_statistic_that_it_has():
    defined = {
        node.name
        for path in (PACKAGE / "functional").glob("*.py")
        if path.stem not in ("bins", "row_chunks", "row_collector")  # how rows are read, for all statistics
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    }
    assert defined | {"ROW_STATISTICS", "Rows"} == set(functional.__all__)


ALONE = """
import sys
import lightning_xattn
assert not {"torch", "pytorch_lightning"} & set(sys.modules)
from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture
assert "lightning_xattn.callback.callback" in sys.modules
heavy = ("torch_geometric", "pyarrow", "lightning_xattn.visualizations", "lightning_xattn.hms")
assert not [name for name in sys.modules if name.startswith(heavy)]
sys.modules |= {"torch_geometric": None, "pyarrow": None}
from tests.toy import ToyModule, validate
assert "xattn_alignment/val/all" in validate(ToyModule(), AttentionExplainabilityCallback())
"""


@pytest.mark.slow
def test_nothing_heavy_is_imported_before_it_is_needed_and_the_callback_runs_without_what_the_application_needs():
    ended = subprocess.run([sys.executable, "-c", ALONE], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
