"""The project's own files agree with each other."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML by itself.")

ROOT = Path(__file__).parents[1]
LINTERS = {"ruff", "mypy"}
"""They check the source against the newest types, and no test runs them."""


def requirements():
    """Every requirement of the package and of its extras, but for the extras themselves."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # Loggers' clients and other programs are run in their newest versions alone, and have no lower bounds.
    for group in (project["dependencies"], *(extras[name] for name in extras if name != "clients")):
        for line in group:
            requirement = Requirement(line)
            if requirement.name not in {project["name"], *LINTERS}:
                yield requirement


def versions(requirement, operator):
    """What stands behind the requirement's only operator."""
    (specifier,) = requirement.specifier
    assert specifier.operator == operator, f"{requirement}: expected one {operator}"
    return Version(specifier.version)


def test_the_oldest_set_that_ci_runs_is_the_lower_bounds():
    lines = (ROOT / ".ci/oldest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert len({pin.name for pin in pins}) == len(pins)
    pinned = {(pin.name, versions(pin, "==")) for pin in pins}
    assert pinned == {(bound.name, versions(bound, ">=")) for bound in requirements()}
