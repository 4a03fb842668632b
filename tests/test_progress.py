import importlib.util

import pytest

from jaxbkgd._workers import progress_bar


def work_with(report):
    report(3, "loss 0.5")
    report(10, "loss 0.25")


@pytest.fixture
def at_a_terminal(monkeypatch):
    """What rich takes for a terminal of 100 columns."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def test_nothing_is_drawn_off_a_terminal(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with progress_bar(10) as report:
        work_with(report)
    assert capsys.readouterr().err.strip() == ""


@pytest.mark.usefixtures("at_a_terminal")
class TestAtATerminal:
    def test_it_says_what_is_done_and_is_gone_in_the_end(self, capsys):
        with progress_bar(10) as report:
            work_with(report)
        drawn = capsys.readouterr()
        assert "loss 0.25" in drawn.err
        assert "10/10" in drawn.err
        # Nothing but control sequences after the line was erased.
        assert drawn.err.rpartition("\x1b[2K")[2].strip() == ""
        # Programs read what is printed on stdout.
        assert drawn.out == ""

    def test_an_error_passes_and_leaves_the_cursor_shown(self, capsys):
        with pytest.raises(KeyError), progress_bar(10):
            raise KeyError
        assert capsys.readouterr().err.rfind("\x1b[?25h") > 0

    def test_it_is_left_out_on_request(self, capsys):
        with progress_bar(10, False) as report:
            work_with(report)
        assert capsys.readouterr() == ("", "")

    def test_it_is_left_out_without_rich(self, capsys, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with progress_bar(10) as report:
            work_with(report)
        assert capsys.readouterr() == ("", "")
