"""Before any test is collected: others that import Triton would import it uninterpreted."""

import gc
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import interpreter
from tests.helpers.optional import missing

os.environ["HF_HUB_OFFLINE"] = "1"  # an unknown model is refused without tries over the network
gc.disable()  # while much is imported: each collection would look through all of it

if interpreter.AVAILABLE:
    interpreter.load_kernels()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script: children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as below nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# DeepSpeed compiles an extension under a lock, which a killed process leaves: each worker has a directory of its own.
EXTENSIONS = Path(__file__).parents[1] / "build" / f"torch_extensions-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"
os.environ["TORCH_EXTENSIONS_DIR"] = str(EXTENSIONS)  # workers inherit that of the main process
for lock in EXTENSIONS.glob("*/lock"):
    lock.unlink()


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, each of which would take 0.4 s."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """Skip a file whose optional package is missing."""
    report = yield
    error = report.call.excinfo and report.call.excinfo.value.__cause__  # type: ignore[attr-defined]
    if package := missing(error):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {package} is not installed")
    return report
