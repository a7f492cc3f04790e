"""Checkpoints that are whole or absent: temporary directory, sync, manifest, rename."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
STAGING = ".staging-"
PREFIX = "checkpoint-"
ADAPTER_CONFIG = "adapter_config.json"  # of a checkpoint that holds an adapter only
HASHED_MIB = 16  # larger files (weights, optimizers) are known by their size alone: reading them takes long


@contextmanager
def staged(
    output_dir: Path, name: str, *, first: bool = True, barrier: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield an empty directory. What all ranks put into its folder `name` becomes `output_dir/name`, or nothing does.

    The `first` rank creates and publishes it; `barrier` returns when every rank has called it."""
    staging = output_dir / f"{STAGING}{name}"
    if first:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
    barrier()
    try:
        yield staging
        barrier()
        if first:
            publish(staging / name, output_dir / name)
    finally:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
    barrier()


def publish(source: Path, target: Path) -> None:
    """Sync the files of `source`, add a manifest with their sizes and digests, and rename it to `target`."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    names = {str(path.relative_to(source)): path for path in files}
    content = {
        "files": {name: path.stat().st_size for name, path in names.items()},
        "sha256": {name: _digest(path) for name, path in names.items() if _is_hashed(path)},
    }
    manifest = source / MANIFEST
    manifest.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _sync(manifest)
    for folder in {source, *(path.parent for path in files)}:
        _sync(folder)
    remove(target)
    source.rename(target)
    _sync(target.parent)


def fault_of(checkpoint: Path) -> str | None:
    """Why it is not whole, or None: every file that its manifest names has its size and, where small, its digest."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, size in content["files"].items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
        for name, digest in content.get("sha256", {}).items():
            if _digest(checkpoint / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"there is no {Path(error.filename).relative_to(checkpoint)}"
    except OSError as error:
        return str(error)
    except (ValueError, LookupError, TypeError, AttributeError):  # of another program, or overwritten
        return f"{MANIFEST} is not one of ours"
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether it has a manifest and every file in it is as the manifest says."""
    return fault_of(checkpoint) is None


def last_complete(output_dir: Path) -> Path | None:
    """The complete checkpoint of the highest step; those after it, which are not, are named in a warning."""
    for checkpoint in reversed(_by_step(output_dir)):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s is passed over: %s", checkpoint, fault)
    return None


def rotate(output_dir: Path, limit: int | None, newest: Path) -> None:
    """Remove checkpoints until `limit` are left (None or 0: no limit), never `newest`: those of later steps first, as
    the run that goes on has left them behind, then the oldest. What has no manifest is not ours to remove."""
    if not limit or limit < 0:
        return
    others = [path for path in _by_step(output_dir) if path != newest and (path / MANIFEST).is_file()]
    others.sort(key=lambda path: _step(path) < _step(newest))  # stable: the order by step stays
    for checkpoint in others[: max(0, len(others) + 1 - limit)]:
        try:
            remove(checkpoint)
        except OSError as error:
            logger.warning("%s is not removed: %s", checkpoint, error)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there: it is gone at once, its files a little later."""
    doomed = checkpoint.with_name(f"{STAGING}old-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        checkpoint.rename(doomed)
    except FileNotFoundError:  # the user was faster
        return
    shutil.rmtree(doomed, ignore_errors=True)


def clean(output_dir: Path) -> None:
    """Remove what a killed run left half-written, or half-removed."""
    for staging in output_dir.glob(f"{STAGING}*"):
        shutil.rmtree(staging)


def replace_text(path: Path, text: str) -> None:
    """Write a file of which there is the old text or the new one at any moment."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file of which there is the old content or the new one at any moment."""
    replacement = path.with_name(f"{path.name}.tmp")
    try:
        replacement.write_bytes(data)
        _sync(replacement)
        replacement.replace(path)
    except OSError:
        replacement.unlink(missing_ok=True)
        raise


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of a JSONL log that a resumed run will write again: those of later steps, and half lines."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    replace_text(path, "".join(kept))


def is_adapter(folder: str | Path) -> bool:
    """Whether a directory holds an adapter only."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def _by_step(output_dir: Path) -> list[Path]:
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def _is_hashed(path: Path) -> bool:
    return path.stat().st_size <= HASHED_MIB * 2**20


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
