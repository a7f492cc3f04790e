"""The progress line, on a stream that says it is a terminal."""

import logging
import sys

import pytest

from tests.helpers.terminal import Tty, rendered, terminals
from vlmr1.telemetry.screen import Screen


def test_what_others_write_stands_above_the_progress_line(monkeypatch):
    written = terminals(monkeypatch)
    streams = sys.stdout, sys.stderr
    handler = logging.StreamHandler()
    logger = logging.getLogger("of a library")
    logger.addHandler(handler)
    screen = Screen(total=4, done=1)
    screen.advance("reward 0.250")
    screen.line.refresh()
    print("a reward", "prints")
    screen.advance("reward 0.500")
    logger.warning("a warning")
    screen.line.refresh()
    print("another", file=sys.stderr)
    screen.say("step 3  a permanent line")
    lines = rendered("".join(written))
    assert lines[:4] == ["a reward prints", "a warning", "another", "step 3  a permanent line"]
    assert lines[4].startswith("step 3/4 ###############       reward 0.500") and "ETA 00:00" in lines[4]
    screen.close()
    assert rendered("".join(written))[4:] == [""]  # removed, the cursor is on its line
    assert (sys.stdout, sys.stderr) == streams and handler.stream is streams[1]
    logger.removeHandler(handler)


def test_a_run_that_breaks_off_leaves_its_last_line(monkeypatch):
    written = terminals(monkeypatch)
    screen = Screen(total=4, done=0)
    screen.advance("loss 1.000")
    screen.line.close()
    print("an error")
    lines = rendered("".join(written))
    assert lines[0].startswith("step 1/4") and lines[1:] == ["an error", ""]


def test_the_line_is_not_wider_than_the_terminal(monkeypatch):
    written = terminals(monkeypatch)
    monkeypatch.setattr("vlmr1.telemetry.screen.columns", lambda stream: 30)
    screen = Screen(total=4, done=0)
    screen.advance("reward 0.250")
    assert screen.width == 30
    screen.close()
    assert max(map(len, rendered("".join(written).replace("\r", "\n")))) <= 30


def test_a_stream_that_another_has_replaced_stays(monkeypatch):
    written = terminals(monkeypatch)
    screen = Screen(total=1, done=0)
    sys.stdout = other = Tty(written)
    screen.close()
    assert sys.stdout is other


@pytest.mark.parametrize("terminal", ["stdout", "stderr", None])
def test_plain_lines_and_the_progress_line_go_by_their_streams(terminal, monkeypatch):
    """Lines of metrics are on stdout and are plain where it is no terminal; the progress line needs stderr."""
    written = terminals(monkeypatch)
    for name in {"stdout", "stderr"} - {terminal}:
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda: False)
    screen = Screen(total=2, done=0)
    screen.advance("reward 0.250")
    screen.say("line")
    screen.close()
    assert screen.plain == (terminal != "stdout")
    assert ("ETA" in "".join(written)) == (terminal == "stderr")
    assert "line\n" in "".join(written)
