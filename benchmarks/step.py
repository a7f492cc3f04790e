"""Whole training steps, arm by arm: planned, checked against each other, then timed in turn.

    python -m benchmarks --quick
    python -m benchmarks --arms naive all --peers trl --rounds 9 --out result.json

Every arm is planned before it runs; one that is planned above --limit GiB is left out. Arms must agree on loss and
gradient norm of fixed groups. The result file keeps every sample.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from benchmarks.console import Progress, duration, stop_on_signals
from benchmarks.harness import CheckFailed, default_device, write_result
from benchmarks.model import SHAPES
from benchmarks.peers.client import PEERS
from benchmarks.process_tree import TreePeak
from benchmarks.step_session import Session, new_figures
from vlmr1.errors import SettingError

ROUNDS, QUICK_ROUNDS = 5, 3
LIMIT_GIB = 20.0
PEER_LIMIT = 900.0  # seconds; the first answer loads a library and a model
ROLLOUT_ARMS = ("naive", "native", "cuda_graphs", "all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its table, write the result file and its page."""
    from benchmarks import report

    options = parse(arguments)
    stop_on_signals()
    path = run(options)
    print(f"\n{report.text(report.read(path))}\n\nwritten: {path}, {report.write_page(path)}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """SettingError for names that are unknown or cannot run here."""
    parser = argparse.ArgumentParser(
        prog="vlmr1 bench",
        description="Training steps switch by switch. Also: vlmr1 bench compare A B | report FILE | readme [--check]",
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help=f"the tiny shape, {QUICK_ROUNDS} rounds")
    parser.add_argument("--shape", choices=SHAPES, help="default: bench, on a GPU 3b")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="default: all; their bases come with them")
    parser.add_argument("--peers", nargs="+", metavar="PEER", help=f"none, or of {', '.join(PEERS)}; default: trl")
    parser.add_argument("--rounds", type=int, help=f"samples an arm; default: {ROUNDS}")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the passes; default: bfloat16 on a GPU")
    parser.add_argument("--limit", type=float, metavar="GIB", help=f"memory of an arm; {LIMIT_GIB:g}, on a GPU its own")
    parser.add_argument("--peer-limit", type=float, default=PEER_LIMIT, metavar="S", help="seconds for a peer's answer")
    parser.add_argument("--memory", action="store_true", help="peak memory by phase, measured and planned, too")
    parser.add_argument("--rollout", action="store_true", help="time rollouts instead of whole steps")
    parser.add_argument("--grid", action="store_true", help="naive and all over group and image sizes, too")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), help="result file, or its folder")
    options = parser.parse_args(arguments)
    options.device = default_device()
    on_gpu = options.device == "cuda"
    options.shape = options.shape or ("tiny" if options.quick else "3b" if on_gpu else "bench")
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    for name in ("rounds", "threads", "peer_limit"):
        if getattr(options, name) <= 0:
            raise SettingError(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be above 0")
    if options.limit is None:
        options.limit = torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else LIMIT_GIB
    if options.rollout:
        options.arms = options.arms or list(ROLLOUT_ARMS)
    options.skipped, options.peers = _peers(options)
    if options.out.suffix != ".json":
        what = "rollout" if options.rollout else "step"
        options.out /= f"{what}-{options.shape}-{options.device}.json"
    return options


def _peers(options: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """Return (reasons of the peers that are left out, names of the others)."""
    if options.rollout and options.peers not in (None, ["none"]):
        raise SettingError("--peers has no effect with --rollout: peers are timed by the step")
    names = [] if options.rollout or options.peers == ["none"] else options.peers or ["trl"]
    if unknown := [name for name in names if name not in PEERS]:
        raise SettingError(f"--peers: {', '.join(unknown)}: unknown; known: none, {', '.join(PEERS)}")
    reasons = {name: reason for name in names if (reason := PEERS[name].why_not()) is not None}
    if options.peers is not None and reasons:
        raise SettingError("; ".join(f"--peers {name} cannot run here: {why}" for name, why in reasons.items()))
    return reasons, [name for name in names if name not in reasons]


def run(options: argparse.Namespace, progress: Progress | None = None) -> Path:
    """Measure and write the result file; a run that is stopped leaves what it has, `complete` being false.

    CheckFailed where arms compute different things: nothing is written then."""
    progress, start = progress or Progress(), perf_counter()
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    shape = SHAPES[options.shape]
    figures = new_figures(options, shape)
    figures["skipped"] |= options.skipped
    with TemporaryDirectory() as folder, TreePeak() as tree:
        session = Session(options, shape, Path(folder), progress, figures)
        try:
            session.measure()
            figures["complete"] = True
        except CheckFailed:
            raise
        except BaseException:
            session.keep_whole_rounds()
            if figures["arms"]:
                progress.say(f"stopped; what was measured is kept in {options.out}")
                _write(options.out, figures, tree, start)
            raise
        finally:
            session.close()
    _write(options.out, figures, tree, start)
    took, peak = figures["wall_seconds"], figures["tree_peak_mib"]
    progress.say(f"done after {duration(took)}; peak of the process tree {peak / 1024:.1f} GiB")
    return options.out


def _write(path: Path, figures: dict[str, Any], tree: TreePeak, start: float) -> None:
    figures |= {"wall_seconds": perf_counter() - start, "tree_peak_mib": tree.mib}
    write_result(path, "step", figures)
