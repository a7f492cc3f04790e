"""Checkpoints that are whole or absent: temporary directory, sync, manifest, rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmr1.scale.ranks import ALONE, Ranks

MANIFEST = "manifest.json"
STAGING = ".staging-"


@contextmanager
def staged(output_dir: Path, name: str, ranks: Ranks = ALONE) -> Iterator[Path]:
    """Yields an empty directory; what all ranks have put into its folder `name` becomes `output_dir/name`, or nothing
    does."""
    staging = output_dir / f"{STAGING}{name}"
    if ranks.rank == 0:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
    ranks.wait()
    yield staging
    ranks.wait()
    if ranks.rank == 0:
        publish(staging / name, output_dir / name)
        staging.rmdir()
    ranks.wait()


def publish(source: Path, target: Path) -> None:
    """Sync the files of `source`, add a manifest with their sizes, and rename it to `target`."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    sizes = {str(path.relative_to(source)): path.stat().st_size for path in files}
    manifest = source / MANIFEST
    manifest.write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
    _sync(manifest)
    for folder in {source, *(path.parent for path in files)}:
        _sync(folder)
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)
    _sync(target.parent)


def is_complete(checkpoint: Path) -> bool:
    """Whether it has a manifest and every file in it has the size that the manifest says."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return False
    sizes = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    paths = {checkpoint / name: size for name, size in sizes.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def last_complete(output_dir: Path) -> Path | None:
    """The complete checkpoint of the highest step; what has no manifest is ignored."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    complete = [path for path in found if is_complete(path)]
    return max(complete, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def clean(output_dir: Path) -> None:
    """Remove what a killed run left half-written."""
    for staging in output_dir.glob(f"{STAGING}*"):
        shutil.rmtree(staging)


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of a JSONL log that a resumed run will write again: those of later steps, and half lines."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(kept), encoding="utf-8")
    replacement.replace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
