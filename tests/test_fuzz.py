"""A few seconds of what ``make fuzz`` does for ten minutes, and that it would notice."""

import pytest

from tests import fuzz


def test_nothing_broken_is_taken_for_whole():
    lines = []
    assert fuzz.fuzz(4.0, kinds=tuple(fuzz.FILES), say=lines.append) == 0, "\n".join(lines)


@pytest.mark.parametrize("kind", ["checkpoints"])
def test_a_reader_that_checks_nothing_is_caught(kind, monkeypatch):
    monkeypatch.setitem(fuzz.FILES, kind, lambda folder: (_file(folder), lambda path: path.read_bytes()))
    assert fuzz.fuzz(0.2, kinds=(kind,), say=lambda line: None) > 0


def _file(folder):
    (folder / "file").write_bytes(bytes(range(256)))
    return folder / "file"
