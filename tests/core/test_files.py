"""A file is written whole or not at all."""

import pytest

from lightning_xattn.core.files import complete_or_absent


def test_the_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "made" / "on the way" / "file.txt"
    with complete_or_absent(path) as part:
        part.write_text("half")
        assert not path.exists()
        part.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_on_failure_the_one_before_stays(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def fail_half_way():
        with complete_or_absent(path) as part:
            part.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
