"""The suite's command line, and what is refused by name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.attention import DTYPES
from benchmarks.device import default_device, free_bytes
from benchmarks.harness import MIB
from benchmarks.model import SHAPES
from benchmarks.suite import peers, sizes
from vlmr1.errors import SettingError

SECTIONS = ("ops", "attention", "rollout", "update", "step", "memory")
WITH_MODEL = ("rollout", "update", "step", "memory")
WITH_PEERS = ("update", "step")
ROUNDS = {"cpu": 5, "cuda": 3}
QUICK_ROUNDS = 3
LONGEST = 10**6  # seconds; what select takes
PEER_LIMIT = 1800  # seconds; the first answer loads a library and a model, and runs two samples


@dataclass(frozen=True)
class Options:
    """What a run measures. `shapes` are run one after another, each with a result file of its own."""

    only: tuple[str, ...]
    quick: bool
    peers: tuple[str, ...]
    left_out: dict[str, str]  # peers that cannot run here, and why
    shapes: tuple[str, ...]
    rounds: int
    threads: int
    dtype: str
    out: Path
    device: str
    peer_limit: float  # seconds for an answer of a peer's process


def parse(arguments: Sequence[str]) -> Options:
    """SettingError for what is unknown, cannot run here, or would have no effect."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite",
        description="What sharing gains on this machine, and which switch gains it. Also: compare A B, report FILE, "
        "readme [--check].",
        allow_abbrev=False,
    )
    parser.add_argument("--only", nargs="+", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="the tiny shape and few rounds: a look in minutes")
    parser.add_argument("--peers", help="comma-separated, or none; default: all that can run here")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help=f"of {', '.join(SHAPES)}; default: on a GPU the largest that fits, on a CPU bench",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"samples an arm; {ROUNDS['cpu']}, on a GPU {ROUNDS['cuda']}; of ops at least 5, of the grid at most 3",
    )
    parser.add_argument("--threads", type=int, help="on a CPU; default 2")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, on a GPU bfloat16")
    parser.add_argument(
        "--peer-limit", type=float, metavar="SECONDS", help=f"for one answer of a peer's process; {PEER_LIMIT}"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), help="folder of the result files")
    given = parser.parse_args(arguments)
    device = default_device()
    only = tuple(dict.fromkeys(given.only or SECTIONS))
    _known("--only", only, SECTIONS)
    if given.rounds is not None and given.rounds < 1:
        raise SettingError(f"--rounds is {given.rounds}: it must be at least 1")
    if given.threads is not None and device == "cuda":
        raise SettingError("--threads has no effect on a GPU")
    if given.threads is not None and given.threads < 1:
        raise SettingError(f"--threads is {given.threads}: it must be at least 1")
    if given.peer_limit is not None and not 0 < given.peer_limit <= LONGEST:
        raise SettingError(f"--peer-limit is {given.peer_limit:g}: it must be above 0, and at most {LONGEST}")
    dtype = given.dtype or ("bfloat16" if device == "cuda" else "float32")
    names, left_out = _peers(given.peers, only, device)
    if given.peer_limit is not None and not names:
        raise SettingError("--peer-limit has no effect: no peer is run")
    return Options(
        only=only,
        quick=given.quick,
        peers=names,
        left_out=left_out,
        shapes=_shapes(given.shapes, only, device, dtype, quick=given.quick),
        rounds=given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS[device]),
        threads=given.threads or 2,
        dtype=dtype,
        out=given.out,
        device=device,
        peer_limit=given.peer_limit or PEER_LIMIT,
    )


def _shapes(
    given: Sequence[str] | None, only: Sequence[str], device: str, dtype: str, *, quick: bool
) -> tuple[str, ...]:
    if given is None:
        if quick:
            return ("tiny",)
        return ("bench",) if device == "cpu" else (sizes.largest(free_bytes(device), dtype),)
    names = tuple(dict.fromkeys(given))
    _known("--shapes", names, tuple(SHAPES))
    for name in names:
        need, free = sizes.needed_bytes(SHAPES[name], dtype), free_bytes(device)
        if need > free and set(only) & set(WITH_MODEL):
            raise SettingError(f"--shapes {name} needs {need / MIB:.0f} MiB in {dtype}, {free / MIB:.0f} MiB are free")
    return names


def _peers(given: str | None, only: Sequence[str], device: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """(peers to run, reasons of those left out)"""
    if given is not None and not set(only) & set(WITH_PEERS):
        raise SettingError(
            f"--peers has no effect with --only {' '.join(only)}: peers are in {' and '.join(WITH_PEERS)}"
        )
    if given == "none" or not set(only) & set(WITH_PEERS):
        return (), {}
    known = peers.table()
    names = tuple(dict.fromkeys(given.split(","))) if given is not None else tuple(known)
    _known("--peers", names, ("none", *known) if len(names) == 1 else tuple(known))
    reasons = {name: reason for name in names if (reason := known[name].why_not(device)) is not None}
    if given is not None and reasons:
        raise SettingError("; ".join(f"--peers {name} cannot run here: {why}" for name, why in reasons.items()))
    return tuple(name for name in names if name not in reasons), reasons


def _known(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise SettingError(f"{option}: {name!r} is unknown; known: {', '.join(known)}")
