"""What a run shows and which signals end it; and `vlmr1 bench`."""

import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.console import Progress, duration, seconds_left
from tests.helpers.python import python
from vlmr1.commands.bench import bench
from vlmr1.errors import UserError


def run(program: str, ignored: int | None = None) -> Any:
    """Run a program that starts with a signal ignored, as under nohup."""
    ignore = None if ignored is None else lambda: signal.signal(ignored, signal.SIG_IGN)
    return python("-c", program, cwd=Path(), preexec_fn=ignore)


KILL = """
import os, signal
from benchmarks.console import stop_on_signals
stop_on_signals()
try:
    os.kill(os.getpid(), {number})
    print("goes on")
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_stops_a_run_unless_the_parent_ignores_it(number: int):
    program = KILL.format(number=int(number))
    assert run(program).stdout == "stopped\n"
    assert run(program, ignored=number).stdout == "goes on\n"


def test_messages_of_libraries_stay_off_the_screen():
    noise = """
from benchmarks.console import quiet
quiet()
import logging, warnings
for name in ("torchao", "torch.utils._pytree", "DeepSpeed", "transformers", "bitsandbytes"):
    logger = logging.getLogger(name)
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.DEBUG)
    logger.warning("noise")
warnings.warn("noise", FutureWarning)
logging.getLogger("vlmr1").error("heard")
"""
    done = run(noise)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == "heard\n"


def test_a_line_says_which_arm_and_round_runs_and_how_long_is_left():
    times, lines = iter([100.0, 101.0, 175.4]), []
    progress = Progress(lambda: next(times), lines.append)
    warm = {"naive": 20.0, "all": 5.0}
    progress.round("naive", 1, 4, {}, warm)
    progress.round("all", 2, 4, {"naive": [10.0, 10.0], "all": [4.0]}, warm)
    # 4 rounds of 20 + 5 s; then two of 10 and three of 4
    assert lines == [
        "[     1 s] round 1 of 4: naive; about 100 s left",
        "[    75 s] round 2 of 4: all; about 32 s left",
    ]


def test_what_is_left_ends_with_the_last_sample():
    assert seconds_left(2, {"a": [1.0]}, {"a": 4.0}) == 1 and seconds_left(2, {"a": [1.0, 1.0]}, {"a": 4.0}) == 0
    assert (duration(119.0), duration(600.0)) == ("119 s", "10 min")


def test_bench_runs_the_benchmarks_of_the_checkout_where_the_caller_is(tmp_path: Path, monkeypatch: Any):
    package = tmp_path / "root" / "benchmarks"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    written = "import sys, pathlib\npathlib.Path('words').write_text(' '.join(sys.argv[1:]))\nsys.exit(7)\n"
    (package / "__main__.py").write_text(written)
    monkeypatch.chdir(tmp_path)
    program = "from pathlib import Path; from vlmr1.commands.bench import bench; bench({}, root=Path({!r}))"
    assert run(program.format(["compare", "A", "--fail-over", "5"], str(tmp_path / "root"))).returncode == 7
    assert Path("words").read_text() == "compare A --fail-over 5"


def test_bench_without_the_checkout_is_one_message(tmp_path: Path):
    with pytest.raises(UserError, match="bench needs a checkout of vlmr1"):
        bench([], root=tmp_path)


def test_the_command_passes_its_words_on(monkeypatch: Any):
    from vlmr1 import cli

    called = []
    monkeypatch.setattr("vlmr1.commands.bench.bench", called.append)
    cli.main(["bench", "--quick", "-h"])
    assert called == [["--quick", "-h"]]
