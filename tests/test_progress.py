"""The progress bar, at a terminal and off it."""

import contextlib
import io
import time

from jaxbkgd._workers import progress_bar


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
