"""A notice is given once a run, by the first process, at the user's line."""

import logging
import sys
import warnings

import pytest
import torch
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_xattn import XAttnWarning
from lightning_xattn.attention_analysis import AttentionAnalyzer
from lightning_xattn.core.notices import _StandardError, begin_run, info, is_new, warn


def given(*notices, **settings):
    """The texts of the warnings that are given."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for notice in notices:
            warn(notice, **settings)
    return [str(one.message) for one in caught]


def test_a_notice_is_given_once_in_each_run():
    assert given("a", ["b", "a"], "c", once=True) == ["a", "b", "c"]
    assert given("a", "d", once=True) == ["d"]
    assert given("a", "a") == ["a", "a"], "nobody asked for once"
    begin_run()
    assert given("a", once=True) == ["a"]


def test_notices_about_one_thing_are_given_once_whatever_they_say():
    assert given([], "1 head is dead", "2 heads are dead", once="dead heads") == ["1 head is dead"]
    assert given("3 heads are asleep", once="sleepy heads") == ["3 heads are asleep"]
    assert not is_new("dead heads")
    assert is_new(("layer", 1))
    assert not is_new(("layer", 1))


def test_information_is_given_once_too(infos):
    for _ in range(2):
        info(["first", "second"], once=True)
    assert infos.messages == ["first", "second"]


def test_another_process_than_the_first_says_nothing(monkeypatch, infos):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    info("a")
    assert given("a") == []
    assert infos.messages == []


def test_a_warning_points_at_the_users_line():
    with pytest.warns(XAttnWarning, match="a single key") as caught:
        AttentionAnalyzer().analyze_attention_weights(torch.ones(1, 1, 2, 1))
    assert [one.filename for one in caught] == [__file__]


def test_a_standard_error_that_cannot_be_written_ends_nothing(monkeypatch):
    """As behind ``python train.py 2>&1 | head``."""

    class Broken:
        def write(self, text):
            raise BrokenPipeError("nobody reads")

        flush = write

    monkeypatch.setattr(sys, "stderr", Broken())
    monkeypatch.setattr(logging, "raiseExceptions", False)
    _StandardError().emit(logging.LogRecord("x", logging.INFO, __file__, 1, "found", (), None))
