"""The progress bar, at a terminal and off it."""

import contextlib
import io
import re
import time

from jaxbkgd import _workers
from jaxbkgd._workers import progress_bar, progress_lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def terminal():
    """What is drawn on stderr."""
    with contextlib.redirect_stderr(Terminal()) as drawn:
        yield drawn


def test_it_tells_what_is_done_and_is_removed_in_the_end(capsys):
    with terminal() as drawn:
        with progress_bar(10, done=2) as report:
            assert "2/10" in drawn.getvalue()
            # It is drawn at most ten times a second.
            time.sleep(0.11)
            report(10, "loss 0.25")
            assert "loss 0.25" in drawn.getvalue()
            assert "10/10" in drawn.getvalue()
        # A line that was drawn is overwritten with blanks.
        *_, line, end, rest = drawn.getvalue().split("\r")
        assert line.strip() != ""
        assert end.strip() == rest == ""
    # Programs read what is printed on stdout.
    assert capsys.readouterr().out == ""


def test_nothing_is_drawn_off_a_terminal_or_on_request(capsys):
    with progress_bar(10) as report:
        report(3, "loss 0.5")
    assert capsys.readouterr() == ("", "")
    with terminal() as drawn:
        with progress_bar(10, False) as report:
            report(3, "loss 0.5")
        assert drawn.getvalue() == ""


def test_off_a_terminal_lines_say_how_far_it_is_where_they_are_asked_for(
    capsys, monkeypatch
):
    monkeypatch.setattr(_workers, "_LINE_SECONDS", 0.05)
    with progress_lines():
        time.sleep(0.2)
        with progress_bar(10, done=2, unit="frames") as report:
            report(6, "3 Mpx/s")
            time.sleep(0.2)
    out, err = capsys.readouterr()
    assert out == ""
    first, *_, last = err.splitlines()
    assert first == "jaxbkgd: at work"
    assert re.fullmatch("jaxbkgd: 6 of 10 frames, 3 Mpx/s, 00:00 left", last)
    time.sleep(0.2)
    assert capsys.readouterr().err == ""
    with terminal() as drawn, progress_lines():
        time.sleep(0.2)
    assert drawn.getvalue() == ""
