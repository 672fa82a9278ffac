"""A few seconds of what ``make fuzz`` does for ten minutes, and a check that it notices a careless reader."""

from tests import fuzz


def test_no_damage_goes_unnoticed():
    lines = []
    assert fuzz.fuzz(4.0, kinds=tuple(fuzz.FILES), say=lines.append) == 0, "\n".join(lines)


def test_a_reader_that_checks_nothing_is_caught(monkeypatch):
    def careless(folder):
        (folder / "file").write_bytes(bytes(range(256)))
        return folder / "file", lambda path: path.read_bytes()

    monkeypatch.setitem(fuzz.FILES, "checkpoints", careless)
    assert fuzz.fuzz(0.2, kinds=("checkpoints",), say=lambda line: None) > 0
