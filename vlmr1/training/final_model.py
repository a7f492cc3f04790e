"""The model directory that a finished run leaves in its output directory, beside the checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from vlmr1.distributed.preflight import undivided
from vlmr1.lifecycle.checkpoint import MANIFEST, STAGING, replace_text, sha256_of_file
from vlmr1.lifecycle.disk import guard_writes
from vlmr1.training.hub import push_model
from vlmr1.training.weights import write_merged

FINAL = "final_model.json"  # what the model is from, and its files; written last
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors")
# Files of a model directory; a checkpoint has others beside them.
MODEL_FILES = (*WEIGHTS, "model.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json")
MODEL_FILES += ("quantization_config.json", "*processor_config.json", "tokenizer*", "vocab.*", "merges.txt")
MODEL_FILES += ("special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model", "*ing_*.py", "config*.py")


def leave_model(trainer: Any, checkpoint: Path | None) -> list[str]:
    """Have an ordinary model directory in output_dir: the model files of `checkpoint`, or the trainer's model where
    nothing was saved; with `lora_merge_final` the merged model. Every rank calls it.

    Returns the names of its files, on the first rank. Files that are there already are left alone; those of an earlier
    model of this directory are removed."""
    output_dir = Path(trainer.args.output_dir)
    made_from = {"step": trainer.state.global_step, "merged": trainer.args.lora_merge_final}
    if checkpoint is not None:
        made_from |= {"checkpoint": checkpoint.name, "manifest": sha256_of_file(checkpoint / MANIFEST)}
        written = _written(output_dir, made_from) if trainer.ranks.is_first else []
        if trainer.ranks.all_gather(bool(written))[0]:
            return written
    staging = output_dir / f"{STAGING}model"
    names: list[str] = []
    with guard_writes("the trained model", output_dir):
        if checkpoint is None:
            if trainer.ranks.is_first:
                shutil.rmtree(staging, ignore_errors=True)
            trainer.ranks.barrier()
            trainer.save_model(str(staging))
        if trainer.ranks.is_first:
            names = _place(trainer.args, checkpoint or staging, output_dir, made_from)
            shutil.rmtree(staging, ignore_errors=True)
    trainer.ranks.barrier()
    return names


def leave_and_push(trainer: Any, checkpoint: Path | None, message: str = "End of training") -> str | None:
    """Leave the model and upload its files; return the repository's address on the first rank."""
    names = leave_model(trainer, checkpoint)
    return push_model(trainer.args, names, message) if trainer.ranks.is_first else None


def _place(args: Any, source: Path, output_dir: Path, made_from: dict[str, Any]) -> list[str]:
    """Put the model files of a directory into output_dir, and return their names."""
    merged = output_dir / f"{STAGING}merged"
    if args.lora_merge_final:
        shutil.rmtree(merged, ignore_errors=True)
        with undivided(args.deepspeed_plugin):
            write_merged(source, merged, getattr(torch, args.model_dtype))
        source = merged
    files = (path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    names = sorted(name for name in files if any(fnmatch(name, pattern) for pattern in MODEL_FILES))
    before = _read(output_dir).get("files", [])
    (output_dir / FINAL).unlink(missing_ok=True)
    for name in before:
        if name not in names:
            (output_dir / name).unlink(missing_ok=True)
    for name in names:
        _replace(source / name, output_dir / name)
    replace_text(output_dir / FINAL, json.dumps(made_from | {"files": names}, indent=1))
    shutil.rmtree(merged, ignore_errors=True)
    return names


def _replace(source: Path, target: Path) -> None:
    """Copy a file. Weights are linked where the file system allows it, so that they take no more room."""
    target.parent.mkdir(exist_ok=True)  # of chat templates
    replacement = target.with_name(f"{target.name}.tmp")
    replacement.unlink(missing_ok=True)
    if any(fnmatch(source.name, each) for each in WEIGHTS):
        try:
            os.link(source, replacement)
        except OSError:  # no links here
            shutil.copyfile(source, replacement)
    else:
        shutil.copyfile(source, replacement)
    replacement.replace(target)


def _written(output_dir: Path, made_from: dict[str, Any]) -> list[str]:
    """Return the files of the model in output_dir if it is the one that would be made, else []."""
    found = _read(output_dir)
    names = found.pop("files", [])
    return names if found == made_from and all((output_dir / name).is_file() for name in names) else []


def _read(output_dir: Path) -> dict[str, Any]:
    path = output_dir / FINAL
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
