"""End of a run that has made all its updates: the model in its output directory, the report, the upload."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from vlmr1.commands.report import report_of_run
from vlmr1.lifecycle.checkpoint import last_complete
from vlmr1.lifecycle.console import ignore_broken_pipe
from vlmr1.training.final_model import leave_model
from vlmr1.training.hub import push_model


def finish(trainer: Any, resumed: Path | None = None) -> None:
    """Leave the model, write the report and push. Every rank calls it. `resumed` is the last checkpoint of a run that
    had finished before: only what is missing is written."""
    if not trainer.state.global_step:
        return  # nothing was trained
    args, output_dir = trainer.args, Path(trainer.args.output_dir)
    checkpoint = _checkpoint(trainer, output_dir, resumed)
    names = leave_model(trainer, checkpoint)
    if not trainer.ranks.is_first:
        return
    with ignore_broken_pipe():
        print(*([f"checkpoint {checkpoint}"] if checkpoint else []), f"model      {output_dir}", sep="\n", flush=True)
    if args.write_report and resumed is None:
        report_of_run(output_dir)
    elif resumed is None:
        with ignore_broken_pipe():
            print(f"report     vlmr1 report {shlex.quote(str(output_dir))}", flush=True)
    if args.push_to_hub:
        address = push_model(args, names)
        with ignore_broken_pipe():
            print(f"pushed to  {address}", flush=True)


def _checkpoint(trainer: Any, output_dir: Path, resumed: Path | None) -> Path | None:
    """Return the checkpoint whose model is the run's, as the first rank sees it; None where there is none."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        return Path(state.best_model_checkpoint)
    if resumed is not None:
        return resumed
    found = last_complete(output_dir) if trainer.ranks.is_first else None
    found = trainer.ranks.all_gather(found)[0]
    return found if found is not None and found.name == f"checkpoint-{state.global_step}" else None
