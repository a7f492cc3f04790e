"""Output of a run: lines of metrics, and the progress line."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.digit_runs import command
from tests.helpers.forked import finish
from tests.helpers.terminal import on_terminal, rendered, terminals
from tests.helpers.tiny_runs import command as run_of_mine
from tests.helpers.tiny_runs import during, write_data
from vlmr1.report.console import Console, step_line
from vlmr1.report.progress import read_metrics
from vlmr1.training.pending_metrics import PendingMetrics
from vlmr1.types import StepMetrics


def shown(total: int, *, done: int = 0, every: int | None = None, until: int | None = None, given: str = "") -> Any:
    """The lines of a run whose reward `mine` is its step, by step: the mean of `mine` and seconds."""
    console = Console()
    state = SimpleNamespace(max_steps=total, global_step=done)
    args = SimpleNamespace(given={given})
    trainer = SimpleNamespace(pending=PendingMetrics(), last_loss=0.5, last_grad_norm=1.0)
    console.begin(state)
    for step in range(done + 1, (until or total) + 1):
        state.global_step = step
        values = {"reward": step, "rewards/mine/mean": float(step), "rewards/mine/std": 0.0, "tokens": 1.0, "kl": 0.0}
        trainer.pending.steps.append(StepMetrics(values, {"forward": 2.0 * step}))
        console.step(trainer, args, state, SimpleNamespace(should_log=every is not None and step % every == 0))
    console.end(state)


def lines_of(text: str) -> dict[int, tuple[float, float]]:
    """Mean reward and seconds by step."""
    found = re.findall(r"^step (\d+)  mine ([\d.]+)±0.00  kl 0.0000  grad 1.00 .* ([\d.]+) s$", text, re.MULTILINE)
    return {int(step): (float(mean), float(seconds)) for step, mean, seconds in found}


CASES = {  # settings of a run -> steps with a line, mean of the steps of each
    "tenths": (dict(total=40), {step: step - 1.5 for step in range(4, 41, 4)}),
    "fewer than ten": (dict(total=3), {1: 1.0, 2: 2.0, 3: 3.0}),
    "no multiple of ten": (dict(total=13), {2: 1.5, 3: 3, 4: 4, 6: 5.5, 7: 7, 8: 8, 10: 9.5, 11: 11, 12: 12, 13: 13}),
    "resumed": (dict(total=40, done=38), {40: 39.5}),
    "ended early": (dict(total=40, until=6), {4: 2.5, 6: 5.5}),
    "logging_steps that was not given": (dict(total=20, every=1), {step: step - 0.5 for step in range(2, 21, 2)}),
    "logging_steps": (dict(total=20, every=1, given="logging_steps"), {step: step for step in range(1, 21)}),
    "logging_steps above a tenth": (dict(total=20, every=8, given="logging_steps"), {8: 4.5, 16: 12.5, 20: 18.5}),
}


@pytest.mark.parametrize(("run", "expected"), CASES.values(), ids=CASES)
def test_steps_with_a_line_and_their_means(run, expected, capsys):
    shown(**run)
    assert lines_of(capsys.readouterr().out) == {step: (mean, 2 * mean) for step, mean in expected.items()}


def test_a_terminal_has_a_line_every_tenth_whatever_logging_steps_is(monkeypatch):
    written = terminals(monkeypatch)
    shown(total=600, every=1, given="logging_steps")
    lines = rendered("".join(written))
    assert list(lines_of("\n".join(lines))) == list(range(60, 601, 60)) and len(lines) == 11


def test_the_line_of_a_run_without_rewards_has_its_loss():
    logs = {"loss": 1.25, "grad_norm": 0.5, "memory/peak_mib": 1024.0, "seconds/forward": 0.5}
    assert step_line(logs, 3) == "step 3  loss 1.2500  grad 0.50  1.0 GiB  0.50 s"


def run_on_terminal(words: list[str], log: Any) -> tuple[int, str]:
    """Exit status, and what was written."""
    statuses: list[int] = []
    written = on_terminal(lambda attach: statuses.append(finish(words, log, attach)[0]))
    return statuses[0], written


@pytest.mark.slow
def test_a_run_on_a_terminal_and_in_a_file(data, tmp_path):
    """On a terminal one line is rewritten. Lines of metrics have the means of metrics.jsonl, the last lines say what to
    open, and nothing else is said."""
    out = tmp_path / "out"
    words = ["--max_steps", "12", "--save_strategy", "no"]
    words = command(data, out, *words, "--write_report", "false", "--logging_steps", "1")
    status, written = run_on_terminal(words, tmp_path / "log")
    screen, end = rendered(written), [f"model      {out}", f"report     vlmr1 report {out}"]
    lines = [line for line in screen if line.startswith("step ")]
    rows = {row["step"]: row["rewards/accuracy/mean"] for row in read_metrics(out)}
    steps = [2, 3, 4, 5, 6, 8, 9, 10, 11, 12]
    assert status == 0 and [int(line.split()[1]) for line in lines] == steps and list(rows) == list(range(1, 13))
    for first, last, line in zip([0, *steps], steps, lines, strict=False):
        mean = sum(rows[step] for step in range(first + 1, last + 1)) / (last - first)
        assert f"  accuracy {mean:.3f}±" in line
    assert {line.split()[1] for line in re.split("[\r\n]", written) if "ETA" in line} == {f"{i}/12" for i in range(13)}
    start = ["8 rows; an update", "question_template: rec"]
    rest = [line for line in screen if not line.startswith(("step ", *start))]
    assert rest == ["8 of 8 rows have images", *end, ""]
    status, text = finish(words, tmp_path / "log")
    rest = [line for line in text.splitlines() if not line.startswith(("step ", *start))]
    assert status == 0 and "\r" not in text and rest == ["8 of 8 rows have images", *end]
    assert re.findall(r"^step (\d+) ", text, re.MULTILINE) == [str(step) for step in range(1, 13)]


BROKEN_OFF = {
    "Ctrl-C": ("os.kill(os.getpid(), signal.SIGINT)", 130, "vlmr1: stopped by Ctrl-C after step 3 of 6"),
    "error": ("raise ValueError('no score')", 2, "mine: raised ValueError('no score')"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("code", "status", "said"), BROKEN_OFF.values(), ids=BROKEN_OFF)
def test_a_run_that_breaks_off_leaves_the_cursor_on_a_line_of_its_own(code, status, said, tmp_path):
    """In step 3, the first on the second generation."""
    data = write_data(tmp_path)
    during(data, 2, code)
    found, written = run_on_terminal(run_of_mine(data, tmp_path / "out"), tmp_path / "log")
    *_, last, cursor = rendered(written)
    assert found == status and said in last and not last.startswith("step") and cursor == ""
