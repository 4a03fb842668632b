"""The progress bar, at a terminal, off it and in a notebook."""

import io
import sys
import time

import pytest

from jaxbkgd._workers import end_progress, progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work_with(report):
    report(3, "loss 0.5")
    # It is drawn at most ten times a second.
    time.sleep(0.11)
    report(10, "loss 0.25")


@pytest.fixture
def terminal(monkeypatch):
    """What is drawn on stderr."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def is_removed(terminal):
    """Whether a line that was drawn is overwritten with blanks."""
    *_, line, end, rest = terminal.getvalue().split("\r")
    return line.strip() != "" and end.strip() == rest == ""


def test_nothing_is_drawn_off_a_terminal(capsys):
    with progress_bar(10) as report:
        work_with(report)
    assert capsys.readouterr() == ("", "")


def test_it_tells_what_is_done_and_is_removed_in_the_end(terminal, monkeypatch):
    # Programs read what is printed there.
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stdout)
    with progress_bar(10, done=2) as report:
        assert "2/10" in terminal.getvalue()
        work_with(report)
        assert "loss 0.25" in terminal.getvalue()
        assert "10/10" in terminal.getvalue()
    # The line is overwritten with blanks.
    assert terminal.getvalue().rstrip("\r").rpartition("\r")[2].strip() == ""
    assert stdout.getvalue() == ""


def test_an_error_passes_and_removes_it(terminal):
    with pytest.raises(KeyError), progress_bar(10):
        raise KeyError
    assert terminal.getvalue().rstrip("\r").rpartition("\r")[2].strip() == ""


def test_it_is_left_out_on_request(terminal):
    with progress_bar(10, False) as report:
        work_with(report)
    assert terminal.getvalue() == ""


def test_it_can_be_ended_from_anywhere(terminal):
    with progress_bar(10):
        end_progress()
        drawn = terminal.getvalue()
        assert drawn.rstrip("\r").rpartition("\r")[2].strip() == ""
