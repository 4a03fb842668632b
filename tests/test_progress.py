"""The progress bar, at a terminal and off it."""

import contextlib
import io
import time

import pytest

from jaxbkgd._workers import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def terminal():
    """What is drawn on stderr."""
    with contextlib.redirect_stderr(Terminal()) as drawn:
        yield drawn


def is_removed(drawn):
    """Whether a line that was drawn is overwritten with blanks."""
    *_, line, end, rest = drawn.getvalue().split("\r")
    return line.strip() != "" and end.strip() == rest == ""


def work_with(report):
    report(3, "loss 0.5")
    # It is drawn at most ten times a second.
    time.sleep(0.11)
    report(10, "loss 0.25")


def test_nothing_is_drawn_off_a_terminal(capsys):
    with progress_bar(10) as report:
        work_with(report)
    assert capsys.readouterr() == ("", "")


def test_it_tells_what_is_done_and_is_removed_in_the_end(capsys):
    with terminal() as drawn:
        with progress_bar(10, done=2) as report:
            assert "2/10" in drawn.getvalue()
            work_with(report)
            assert "loss 0.25" in drawn.getvalue()
            assert "10/10" in drawn.getvalue()
        assert is_removed(drawn)
    # Programs read what is printed on stdout.
    assert capsys.readouterr().out == ""


def test_an_error_passes_and_removes_it():
    with terminal() as drawn:
        with pytest.raises(KeyError), progress_bar(10):
            raise KeyError
        assert is_removed(drawn)


def test_it_is_left_out_on_request():
    with terminal() as drawn:
        with progress_bar(10, False) as report:
            work_with(report)
        assert drawn.getvalue() == ""
