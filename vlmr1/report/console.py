"""Output of a run while it goes on: a progress line, and a line of metrics every tenth of the run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlmr1.lifecycle.console import ignore_broken_pipe
from vlmr1.telemetry.phases import peak_memory_mib
from vlmr1.telemetry.screen import WIDTH, Screen
from vlmr1.training.pending_metrics import PendingMetrics

LINES = 10  # lines of metrics of a run


class Console:
    """A progress line, and lines of the metrics since the last one: every tenth of the run. Where stdout is a file or a
    pipe, they follow `logging_steps` instead if it was given."""

    def __init__(self) -> None:
        self.screen: Screen | None = None
        self.unshown = PendingMetrics()

    def begin(self, state: Any) -> None:
        """Open the progress line."""
        self.unshown = PendingMetrics()
        with ignore_broken_pipe():
            self.screen = Screen(total=state.max_steps, done=state.global_step)

    def step(self, trainer: Any, args: Any, state: Any, control: Any) -> None:
        """Show an update that has been made."""
        if self.screen is None:
            return
        made = trainer.pending.steps[-1]
        values = {"loss": trainer.last_loss, "grad_norm": trainer.last_grad_norm} | made.values
        self.unshown.steps.append(replace(made, values=values))
        headline = "reward" if "reward" in values else "loss"
        with ignore_broken_pipe():
            self.screen.advance(f"{headline} {values[headline]:.3f}")
        if self._is_due(args, state, control):
            self._show_line(state.global_step)

    def end(self, state: Any) -> None:
        """Show what was not shown, and remove the progress line."""
        if self.unshown.steps:
            self._show_line(state.global_step)
        if self.screen is not None:
            with ignore_broken_pipe():
                self.screen.close()
        self.screen = None

    def interrupt(self) -> None:
        """Keep the last progress line where it is still open, and begin a new line below it."""
        if self.screen is not None and self.screen.line is not None:
            with ignore_broken_pipe():
                self.screen.line.close()
        self.screen = None

    def _is_due(self, args: Any, state: Any, control: Any) -> bool:
        if self.screen is not None and self.screen.plain and "logging_steps" in getattr(args, "given", ()):
            return control.should_log
        done, total = state.global_step, max(state.max_steps, 1)
        return LINES * done // total > LINES * (done - 1) // total

    def _show_line(self, step: int) -> None:
        logs = self.unshown.take() | {"memory/peak_mib": peak_memory_mib()}
        if self.screen is not None:
            with ignore_broken_pipe():
                self.screen.say(step_line(logs, step, self.screen.width))


# Importance, 0 the highest, names and format of a line's parts behind the rewards. Parts of metrics that a run does not
# have are left out.
PARTS: tuple[tuple[int, tuple[str, ...], str], ...] = (
    (2, ("kl",), "kl {:.4f}"),
    (4, ("entropy",), "ent {:.2f}"),
    (5, ("clip_low", "clip_high"), "clip {:.1%}/{:.1%}"),
    (3, ("grad_norm",), "grad {:.2f}"),
    (2, ("completion_length",), "len {:.0f}"),
    (2, ("zero_variance_groups",), "zero_var {:.0%}"),
    (4, ("truncated",), "truncated {:.0%}"),
    (3, ("parse_failures",), "no_answer {:.0%}"),
    (6, ("tokens_per_second",), "{:.0f} t/s"),
    (5, ("memory/peak_gib",), "{:.1f} GiB"),
    (1, ("seconds",), "{:.2f} s"),
)


def step_line(logs: dict[str, float], step: int, width: int = WIDTH) -> str:
    """Return the main metrics in one line; the least important are left out where it would exceed `width`."""
    logs = logs | {"seconds": sum(v for k, v in logs.items() if k.startswith("seconds/"))}
    logs["memory/peak_gib"] = logs["memory/peak_mib"] / 1024
    rewards = [k[8:-5] for k in logs if k.startswith("rewards/") and k.endswith("/mean")]
    parts = [(0, f"step {step}")] + ([] if "kl" in logs else [(1, f"loss {logs['loss']:.4f}")])
    for place, name in enumerate(rewards):
        mean, std = (logs[f"rewards/{name}/{kind}"] for kind in ("mean", "std"))
        parts.append((1 + place, f"{name.rpartition(':')[2]} {mean:.3f}\u00b1{std:.2f}"))
    for importance, names, form in PARTS:
        if all(name in logs for name in names):
            text = form.format(*(logs[name] for name in names))
            parts.append((importance, text.replace("%/", "/")))
    while len(parts) > 1 and len("  ".join(text for _, text in parts)) > width:
        parts.remove(max(reversed(parts), key=lambda part: part[0]))
    return "  ".join(text for _, text in parts)
