"""Atomic checkpoints: temporary directory, fsync, manifest, rename."""

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
HASHED_MIB = 16  # larger files (weights, optimizers) are checked by size alone: hashing them is slow


@contextmanager
def staged(
    output_dir: Path, name: str, *, first: bool = True, barrier: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Context manager that yields an empty directory, whose folder `name` becomes `output_dir/name` atomically.

    All ranks write to it; nothing is published if one of them fails. The `first` rank creates and publishes it;
    `barrier` returns when every rank has called it."""
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
    """Sync the files of `source`, add a manifest with their sizes and sha256, and rename it to `target`."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    names = {str(path.relative_to(source)): path for path in files}
    content = {
        "files": {name: path.stat().st_size for name, path in names.items()},
        "sha256": {name: sha256_of_file(path) for name, path in names.items() if _is_hashed(path)},
    }
    manifest = source / MANIFEST
    manifest.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _sync(manifest)
    for folder in {source, *(path.parent for path in files)}:
        _sync(folder)
    remove(target)
    source.rename(target)
    _sync(target.parent)


def integrity_error(checkpoint: Path) -> str | None:
    """Return why a checkpoint does not match its manifest (sizes, and sha256 of small files), or None."""
    try:
        content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, size in content["files"].items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
        for name, digest in content.get("sha256", {}).items():
            if sha256_of_file(checkpoint / name) != digest:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, LookupError, TypeError, AttributeError):  # of another program, or overwritten
        return f"{MANIFEST} is not a valid manifest"
    return None


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def last_complete(output_dir: Path) -> Path | None:
    """Return the complete checkpoint of the highest step; warn of incomplete later ones."""
    for checkpoint in reversed(_by_step(output_dir)):
        fault = integrity_error(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s is skipped: %s", checkpoint, fault)
    return None


def rotate(output_dir: Path, limit: int | None, newest: Path, best: str | None = None) -> None:
    """Remove checkpoints until `limit` are left (None or 0: no limit), `newest` and `best` among them in any case.

    Checkpoints of later steps, which a resumed run has abandoned, are removed first, then the oldest. Directories
    without a manifest are left alone."""
    if not limit or limit < 0:
        return
    others = [path for path in _by_step(output_dir) if path != newest and (path / MANIFEST).is_file()]
    others.sort(key=lambda path: _step(path) < _step(newest))  # stable: ordered by step otherwise
    removable = [path for path in others if best is None or path.name != Path(best).name]
    for checkpoint in removable[: max(0, len(others) + 1 - limit)]:
        try:
            remove(checkpoint)
        except OSError as error:
            logger.warning("%s cannot be removed: %s", checkpoint, error)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint if it exists; it is renamed first, so that it never exists in part."""
    doomed = checkpoint.with_name(f"{STAGING}old-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        checkpoint.rename(doomed)
    except FileNotFoundError:  # already removed
        return
    shutil.rmtree(doomed, ignore_errors=True)


def remove_staging(output_dir: Path) -> None:
    """Remove the temporary directories of a killed run."""
    for staging in output_dir.glob(f"{STAGING}*"):
        shutil.rmtree(staging)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: at any time it has its old or its new content."""
    with replacing(path) as replacement:
        replacement.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager for a file to be written, which then replaces the one at `path` atomically."""
    replacement = path.with_name(f"{path.name}.tmp")
    try:
        yield replacement
        _sync(replacement)
        replacement.replace(path)
    except OSError:
        replacement.unlink(missing_ok=True)
        raise


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of a JSONL log that a resumed run writes again: those of later steps and incomplete ones."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    replace_text(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))


def is_adapter(folder: str | Path) -> bool:
    """Return whether a directory holds an adapter only."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def _by_step(output_dir: Path) -> list[Path]:
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=_step)


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Return the directory of the checkpoint of a step."""
    return output_dir / f"{PREFIX}{step}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def _is_hashed(path: Path) -> bool:
    return path.stat().st_size <= HASHED_MIB * 2**20


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
