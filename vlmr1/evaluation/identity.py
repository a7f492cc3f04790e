"""What a result is of: model, rows, options, versions. Two evaluations that agree in it have the same results."""

from __future__ import annotations

import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from vlmr1.data.sources import split_names
from vlmr1.errors import SettingError
from vlmr1.evaluation.options import Options
from vlmr1.evaluation.rows import Data, file_digests
from vlmr1_kernels.registry import ENVIRONMENT_VARIABLE

BEGUN = "evaluation.json"
WEIGHTS = ("*.safetensors", "*.bin")
MIB = 2**20
# Files beside the weights that have a part in what a model answers.
READ = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
PACKAGES = ("vlmr1", "torch", "transformers", "pillow", "numpy", "pycocotools")


def identity(name: str, path: str, model: Any, options: Options, data: Data) -> dict[str, Any]:
    """Everything that one needs to repeat an evaluation of the model called `name`, which is read from `path`."""
    return {
        "model": {
            "name": name,
            "model_type": model.config.model_type,
            "digest": model_digest(model_folder(path, options)),
        },
        "rows": {"count": len(data.samples), "sha256": data.digest},
        "data": file_digests(split_names(options.data)),
        "options": options.written(),
        "kernels": {"option": options.kernels, ENVIRONMENT_VARIABLE: os.environ.get(ENVIRONMENT_VARIABLE, "")},
        "device": model.device.type,
        "versions": {package: installed(package) for package in PACKAGES},
    }


def begin(folder: Path, now: dict[str, Any]) -> None:
    """Write what an evaluation is of, or hold it against what the one in this folder was begun with.

    SettingError names the first thing that differs."""
    path = folder / BEGUN
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = next(differences(before, now), None)
        if changed is not None:
            name, old, new = changed
            raise SettingError(
                f"{name} is {new!r}, but the evaluation in {folder} was begun with {old!r}: give another --output_dir, "
                "or the same settings, model and data"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    replacement = path.with_suffix(".tmp")
    replacement.write_text(as_json(now), encoding="utf-8")
    replacement.replace(path)


def differences(before: Any, now: Any, name: str = "") -> Any:
    """(name, before, now) of each value that differs, names of nested values joined by dots."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield name, before, now


def model_folder(path: str, options: Options) -> Path:
    """The directory with a model's files: its own, or the hub's copy in the cache."""
    if Path(path).is_dir():
        return Path(path)
    found = cached_file(path, CONFIG_NAME, revision=options.revision)
    if found is None:
        raise SettingError(f"--model: {path} has no {CONFIG_NAME}")
    return Path(found).parent


def model_digest(folder: Path) -> str:
    """sha256 over the files that a model is read from: names and sizes of the weights with their first and last MiB,
    and all of configuration, tokenizer and processor."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(MIB))
            file.seek(max(0, size - MIB))
            digest.update(file.read(MIB))
    for name in READ:
        if (folder / name).is_file():
            digest.update(f"{name}\n".encode())
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
