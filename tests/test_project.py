"""The project's own files agree with each other."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from benchmarks.mutants import DURATIONS, pytest_collection_modifyitems
from tests.conftest import require_recordings

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML by itself.")

ROOT = Path(__file__).parents[1]
LINTERS = {"ruff", "mypy"}
"""They check the source against the newest types, and no test runs them."""


def requirements():
    """Every requirement of the package and of its extras, but for the extras themselves."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # Loggers' clients and other programs are run in their newest versions alone, and have no lower bounds.
    for group in (project["dependencies"], *(extras[name] for name in extras if name not in {"clients", "docs"})):
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


@pytest.mark.slow
def test_the_readme_of_a_wheel_leads_to_addresses():
    """A package index has no file beside it."""
    command = [sys.executable, "-m", "hatchling", "metadata"]
    made = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    targets = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", made["readme"]["text"])
    pictures, links = ([target for mark, target in targets if mark == kind] for kind in ("!", ""))
    repository = made["urls"]["Repository"]
    assert pictures
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    assert all(target.startswith(raw) for target in pictures)
    assert len(links) > 10
    assert all(target.startswith(f"{repository}/blob/main/") for target in links)
    here = (ROOT / target.removeprefix(raw).removeprefix(f"{repository}/blob/main/") for _, target in targets)
    assert all(path.exists() for path in here)


def test_the_site_has_the_projects_addresses():
    addresses = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    site = (ROOT / "mkdocs.yml").read_text()
    assert f"site_url: {addresses['Documentation']}\n" in site
    assert f"link: {addresses['Repository']}\n" in site


def test_the_mutation_run_names_files_that_are_there():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    assert [pattern for pattern in settings["only_mutate"] if not list(ROOT.glob(pattern))] == []
    tests = [name.partition("::") for name in settings["pytest_add_cli_args_test_selection"]]
    for file, _, test in tests:
        assert (ROOT / file).exists(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("variable", ["CI", "XATTN_CI"])
def test_what_is_not_in_the_repository_is_needed_in_its_own_ci_alone(variable, tmp_path, monkeypatch):
    """Any public CI sets CI, and has no folder of recordings beside the clone."""
    monkeypatch.delenv("XATTN_CI", raising=False)
    monkeypatch.setenv(variable, "true")
    ends = pytest.skip.Exception if variable == "CI" else pytest.fail.Exception
    with pytest.raises(ends, match="recordings at"):
        require_recordings(tmp_path / "absent")
    assert require_recordings(tmp_path) == tmp_path
    assert "export CI=true XATTN_CI=true" in (ROOT / ".ci/run").read_text()


def test_mutants_meet_the_fastest_tests_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = ("b.py::slow", "a.py::slow", "a.py::slower", "b.py::middle", "a.py::middle", "b.py::fast", "a.py::new")
    items = [SimpleNamespace(nodeid=name) for name in names]
    before = list(items)
    pytest_collection_modifyitems(items)
    assert items == before, "nothing is known yet"
    seconds = {"b.py::fast": 0.1, "b.py::middle": 0.4, "a.py::middle": 0.4}
    seconds |= {"b.py::slow": 3.0, "a.py::slow": 6.5, "a.py::slower": 7.0}
    DURATIONS.write_text(json.dumps({"duration_by_test": seconds}))
    pytest_collection_modifyitems(items)
    quick = ["b.py::fast", "b.py::middle", "a.py::new", "a.py::middle"]
    # Of the slow ones those that together take ten seconds.
    assert [item.nodeid for item in items] == [*quick, "b.py::slow", "a.py::slow"]
    alone = before[:3]
    pytest_collection_modifyitems(alone)
    assert sorted(item.nodeid for item in alone) == sorted(names[:3]), "where no quick test reaches a mutant"
