"""Before any test is collected: others that import Triton would import it uninterpreted."""

import gc
import signal

from tests.helpers import interpreter

if interpreter.AVAILABLE:
    interpreter.load_kernels()

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script: children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, each of which would take 0.4 s."""
    gc.freeze()
