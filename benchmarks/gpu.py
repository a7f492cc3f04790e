"""All that needs a GPU, in one command and 300 seconds: parts in the order of what decides most.

    python -m benchmarks.gpu                      every part; results in $OUT, or benchmarks/results
    python -m benchmarks.gpu ops step3b           these parts
    python -m benchmarks.gpu --device cpu --tiny  every part on a CPU, to see that it runs

Each part is a process with a time limit of its own, within what is left of --seconds. It writes what it finds as it
comes, a line of JSON each, to gpu-PART.jsonl; gpu.log has the ends of all outputs. It needs torch, triton,
transformers, accelerate, numpy and pillow; what is missing beyond that is left out with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.console import quiet

if __name__ == "__main__":
    quiet()  # before torch is imported

ROOT = Path(__file__).parents[1]
SECONDS = 300.0
SLOWER = 20  # a CPU, which others may be using
LIMITS = {"imports": 45.0, "ops": 70.0, "step3b": 100.0, "attention": 40.0, "tests": 90.0, "cap7b": 100.0}
LOG_BYTES = 2**19  # of a part's output; the end counts
RESULT_BYTES = 2**20  # of a part's file of results
WIDTH = 220  # of a line of the table


def results_in(path: Path) -> Callable[[str, object], None]:
    """Return a function that writes a result at once, a line of JSON: a part that is stopped leaves what it found."""
    path.write_text("", encoding="utf-8")

    def write(name: str, value: object) -> None:
        line = json.dumps({name: value}, default=str) + "\n"
        if path.stat().st_size + len(line) <= RESULT_BYTES:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        print(f"{name}: {value}"[:WIDTH], flush=True)

    return write


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where a part failed or was stopped."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        return run_part(options)
    outcomes = run_parts(options, lambda name: command(name, options))
    print(f"\n{summary(options.out, outcomes)}")
    return 0 if all(outcome.startswith("ok") for outcome in outcomes.values()) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(LIMITS)}; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the tiny model, few rounds")
    parser.add_argument("--seconds", type=float, help=f"in all; default: {SECONDS:g}, on a CPU {SLOWER} times as many")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "benchmarks/results"))
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)  # in this process
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in LIMITS]:
        parser.error(f"{', '.join(unknown)}: unknown; parts: {', '.join(LIMITS)}")
    options.slower = 1 if options.device == "cuda" else SLOWER
    options.seconds = options.seconds or options.slower * SECONDS
    options.parts = [name for name in LIMITS if name in options.parts or not options.parts]
    return options


def command(name: str, options: argparse.Namespace) -> list[str]:
    words = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--device", options.device]
    return [*words, "--out", str(options.out), *(["--tiny"] if options.tiny else [])]


def run_parts(options: argparse.Namespace, command_of: Callable[[str], list[str]]) -> dict[str, str]:
    """Run each part in a process of its own; return the outcome of each."""
    start, outcomes = monotonic(), {}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    log = options.out / "gpu.log"
    log.write_text("", encoding="utf-8")
    for name in options.parts:
        limit = min(options.slower * LIMITS[name], options.seconds - (monotonic() - start))
        if limit <= 1:
            outcomes[name] = "skipped: no time left"
            continue
        begun = monotonic()
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        status, output = run_limited(command_of(name), limit, environment)
        said = "ok" if status == 0 else f"stopped after {limit:.0f} s" if status is None else f"failed ({status})"
        outcomes[name] = f"{said}, {monotonic() - begun:.0f} s"
        with log.open("a", encoding="utf-8") as file:
            file.write(f"== {name}: {outcomes[name]}\n{output[-LOG_BYTES:].decode(errors='replace')}\n")
    return outcomes


def run_limited(words: Sequence[str], limit: float, environment: dict[str, str]) -> tuple[int | None, bytes]:
    """Return (exit status, output); the status is None where process and children were killed at the limit."""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "process_group": 0}
    process: Any = subprocess.Popen(words, cwd=ROOT, env=environment, **options)
    status = None
    try:
        output, _ = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return status, output


def summary(out: Path, outcomes: dict[str, str]) -> str:
    """Return the table: each part's outcome and its results."""
    lines = []
    for name, outcome in outcomes.items():
        lines.append(f"{name}: {outcome}")
        path = out / f"gpu-{name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with suppress(ValueError):  # a part that was killed while it wrote
                lines += [f"    {key}: {value}"[:WIDTH] for key, value in json.loads(line).items()]
    return "\n".join(lines)


def run_part(options: argparse.Namespace) -> int:
    """Run one part in this process."""
    from benchmarks.gpu_parts import Note
    from benchmarks.gpu_training import PARTS

    note = Note(results_in(options.out / f"gpu-{options.part}.jsonl"))
    PARTS[options.part](note, options.device, options.tiny)
    print(*(f"failed: {name}" for name in note.failed), sep="\n", file=sys.stderr)
    return 1 if note.failed else 0


if __name__ == "__main__":
    sys.exit(main())
