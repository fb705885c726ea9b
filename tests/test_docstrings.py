"""Every public name has an example in its docstring, and the examples are true."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer

import lightning_xattn
from lightning_xattn import attention_analysis, functional, hms, visualizations
from lightning_xattn.core import notices
from tests.toy import ToyModule, labelled_loader, toy_data, toy_loader

PUBLIC = (lightning_xattn, functional, visualizations, attention_analysis, hms)


class AudioText(ToyModule):
    """What examples call ``model``: of audio and text, with four classes."""

    def forward(self, *inputs):
        audio, text, *_ = inputs[0] if len(inputs) == 1 else inputs
        return super().forward(audio, text)


def given():
    """What an example may use, as the package's docstring says."""
    names = {name: getattr(home, name) for home in PUBLIC for name in home.__all__}
    data = {"model": AudioText().eval(), "loader": toy_loader(), "batch": toy_data(5)[:]}
    data["labelled_loader"] = labelled_loader()
    return names | {"torch": torch, "Path": Path, "Trainer": Trainer} | data


@pytest.mark.slow
@pytest.mark.filterwarnings("default::lightning_xattn.XAttnWarning")
def test_examples_are_true(tmp_path, monkeypatch):
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = []
    for found in pkgutil.walk_packages(lightning_xattn.__path__, "lightning_xattn."):
        for example in finder.find(importlib.import_module(found.name), found.name):
            (tmp_path / example.name).mkdir()
            monkeypatch.chdir(tmp_path / example.name)
            torch.manual_seed(0)
            notices.begin_run()
            example.globs = given() if example.examples else {}
            runner.run(example, out=said.append)
    assert runner.tries > 200
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("home", PUBLIC, ids=lambda home: home.__name__)
def test_every_public_name_has_one(home):
    described = {name: getattr(home, name) for name in home.__all__}
    described = {name: one for name, one in described.items() if inspect.isclass(one) or inspect.isfunction(one)}
    assert [name for name, one in described.items() if ">>> " not in (one.__doc__ or "")] == []
