"""Update times of two checkouts, in processes that take turns: `python -m tests.golden.speed OLD NEW --rounds 5`.

Each process trains the embedded model for some updates by the command line. The update time is the sum of the phases in
metrics.jsonl, without the first two updates; the time of the rollout is compared too. For `trl` each process is the
benchmark's own worker of that checkout, and makes as many steps of TRL's trainer. The ratio of the medians new / old is
printed for each kind of step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

STEPS = {"shared": "", "naive": "--share_vision false --share_prompt false --pack false --rollout_engine transformers"}
TRL = "trl"
# Start of a checkout's worker of TRL's trainer, by its module; the older one reads the model from the folder.
WORKERS = {
    "worker": "",
    "steps": "from benchmarks import model; model.write(Path(words[-1]), model.SHAPES['tiny']); "
    "words += ['--kind', 'step', '--prompts', '2']; ",
}
SETTINGS = """--use_cpu true --model_name_or_path tiny --reward_funcs accuracy format --prompts_per_device 4
    --num_generations 8 --max_completion_length 48 --save_strategy no --report_to none --write_report false"""


def update_seconds(tree: Path, rows: Path, step: str, updates: int) -> list[tuple[float, float]]:
    """Seconds of each update of one run, and of its rollout; 0 where it is not known."""
    if step == TRL:
        return [(seconds, 0.0) for seconds in trl_seconds(tree, updates)]
    with TemporaryDirectory() as folder:
        words = [*SETTINGS.split(), *STEPS[step].split(), "--max_steps", str(updates), "--output_dir", folder]
        words += ["--data_file_paths", str(rows / "train.jsonl"), "--image_folders", str(rows / "images")]
        paths = {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "vlmr1.cli", "train", *words]
        subprocess.run(command, env=os.environ | paths, check=True, capture_output=True, cwd=folder)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows_of = [json.loads(line) for line in lines]
    phases = [{name: value for name, value in row.items() if name.startswith("seconds/")} for row in rows_of[2:]]
    return [(sum(row.values()), row["seconds/rollout"]) for row in phases]


def trl_seconds(tree: Path, steps: int) -> list[float]:
    """Seconds of each step of TRL's trainer at the benchmark's tiny shape, without the first two."""
    name = next(name for name in WORKERS if (tree / f"benchmarks/peers/{name}.py").exists())
    with TemporaryDirectory() as folder:
        words = ["--peer", TRL, "--shape", "tiny", "--threads", "1", "--folder", folder]
        code = f"import sys; from pathlib import Path; words = sys.argv[1:]; {WORKERS[name]}"
        code += f"from benchmarks.peers.{name} import main; main(words)"
        paths = {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *words]
        options = {"input": "seconds\n" * steps, "text": True, "check": True, "capture_output": True}
        answers = subprocess.run(command, env=os.environ | paths, cwd=tree, **options).stdout
    return [float(line) for line in answers.splitlines()[-steps:][2:]]  # after those of libraries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--steps", nargs="+", choices=(*STEPS, TRL), default=(*STEPS, TRL))
    options = parser.parse_args()
    from vlmr1.tiny import digits

    with TemporaryDirectory() as folder:
        digits.write(Path(folder), "train", count=64, seed=0)
        for step in options.steps:
            seconds: dict[Path, list[tuple[float, float]]] = {options.old: [], options.new: []}
            for number in range(options.rounds):
                for tree in (options.old, options.new)[:: 1 if number % 2 == 0 else -1]:
                    seconds[tree] += update_seconds(tree.resolve(), Path(folder), step, options.updates)
            for index, name in enumerate((step, f"{step}, rollout")):
                old, new = (median(each[index] for each in seconds[tree]) for tree in (options.old, options.new))
                if old:
                    print(
                        f"{name}: new/old {new / old:.3f} ({old:.3f} s, {new:.3f} s, {options.rounds} runs each)",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
