"""`vlmr1 demo --controls`: what the demo's table compares with, trained once and kept in a file of the package."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlmr1.commands.arguments import make_config, parse_config, read_settings
from vlmr1.commands.held_out import changes, checkpoint_of, held_out, measure
from vlmr1.commands.sft import sft
from vlmr1.commands.train import train
from vlmr1.config import GRPOConfig, SFTConfig
from vlmr1.lifecycle.checkpoint import replace_text, sha256_of_file
from vlmr1.lifecycle.disk import check_output_dir
from vlmr1.tiny import CHECKPOINT, DIGITS

CONTROLS = CHECKPOINT.with_name("controls.json")
COMMAND = "vlmr1 demo --controls --seed SEED"
ARMS: Mapping[str, list[str]] = {  # each a recipe and its changes
    "sloppy": ["tiny-digits-sft"],
    "exact": ["tiny-digits-sft", "--response_column", "exact_response"],
    "format": ["tiny-digits", "--reward_weights", "0", "1"],
}


def run_controls(seed: int, output_dir: Path, words: Sequence[str] = ()) -> None:
    """Train every arm from the shipped start for as many updates as the demo makes; add this seed's scores to the file.
    Other seeds are kept where they had the same start, updates and images.

    `words` are further settings of all arms."""
    common = ["--seed", str(seed), "--data_file_paths", DIGITS, *words]
    config = parse_config([*common, "--output_dir", str(output_dir)], recipe="tiny-digits")
    for folder in (output_dir, CONTROLS.parent):
        check_output_dir(folder)
    samples = held_out(config, output_dir)
    before = measure(config, str(config.model_name_or_path), samples)
    found = {}
    for name, (recipe, *settings) in ARMS.items():
        folder = output_dir / name
        given = [*common, "--output_dir", str(folder), "--max_steps", str(config.max_steps), *settings]
        work: Any
        kind, work = (SFTConfig, sft) if recipe.endswith(SFTConfig.recipe_suffix) else (GRPOConfig, train)
        work(make_config(*read_settings(given, recipe=recipe, kind=kind), kind=kind))
        after = measure(config, checkpoint_of(folder), samples)
        found[name] = {
            metric: {"value": float(after.rows[metric].mean()), "change": [change.value, change.low, change.high]}
            for metric, change in changes(before, after).items()
        }
        print(f"{name}: " + ", ".join(f"{metric} {score['value']:.3f}" for metric, score in found[name].items()))
    made = {
        "updates": config.max_steps,
        "rows": len(samples),
        "start": sha256_of_file(CHECKPOINT / "model.safetensors"),
    }
    old: dict[str, Any] = json.loads(CONTROLS.read_text(encoding="utf-8")) if CONTROLS.exists() else {}
    kept = old["seeds"] if old and made.items() <= old.items() else {}
    content = {"command": COMMAND, **made, **provenance(), "seeds": kept | {str(seed): found}}
    replace_text(CONTROLS, json.dumps(content, indent=1) + "\n")


def provenance() -> dict[str, str]:
    """Return what made the file: the commit, the machine and the library."""
    git = ["git", "-C", str(CONTROLS.parent), "rev-parse", "--short", "HEAD"]
    known = shutil.which("git") is not None
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() if known else ""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.partition(": ")[2] for line in cpu.splitlines() if line.startswith("model name")), "")
    return {
        "commit": commit,
        "machine": f"{name or platform.machine()}, threads {torch.get_num_threads()}, torch {torch.__version__}",
    }


def read_controls(seed: int) -> tuple[dict[str, dict[str, float]], str]:
    """Return the scores of each arm by metric, of this seed where it was run, else of the first; and a note on them."""
    content = json.loads(CONTROLS.read_text(encoding="utf-8"))
    known = content["seeds"]
    shown = str(seed) if str(seed) in known else min(known, key=int)
    arms = {name: {metric: score["value"] for metric, score in scores.items()} for name, scores in known[shown].items()}
    updates, command = content["updates"], content["command"].replace("SEED", shown)
    return arms, (
        f"sloppy and exact: {updates} supervised updates on such labels; format: {updates} of GRPO without the "
        f"accuracy reward; from the same start, seed {shown}, measured earlier: {command}; commit {content['commit']}; "
        f"{content['machine']}."
    )
