"""What a result is of: model, rows, options, versions. Two evaluations that agree in it have the same results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from vlmr1.data.sources import split_names
from vlmr1.errors import SettingError
from vlmr1.evaluation.options import Options
from vlmr1.evaluation.rows import Data, file_digests, sha256
from vlmr1.lifecycle.checkpoint import is_adapter
from vlmr1.models.lora import base_name
from vlmr1_kernels.registry import ENVIRONMENT_VARIABLE

BEGUN = "evaluation.json"
SAFETENSORS = "*.safetensors"
WHOLE_WEIGHTS = "*.bin"
PART = 4096  # bytes of a tensor's start, middle and end
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
    "video_preprocessor_config.json",
    "adapter_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.model",
)
CODE = "*.py"  # what trust_remote_code runs
PACKAGES = ("vlmr1", "torch", "transformers", "pillow", "numpy", "pycocotools")


def identity(name: str, path: str, model: Any, options: Options, data: Data) -> dict[str, Any]:
    """Everything that one needs to repeat an evaluation of the model called `name`, which is read from `path`."""
    return {
        "model": {
            "name": name,
            "model_type": model.config.model_type,
            "digest": model_digest(model_folder(path, options.revision)),
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


def model_folder(path: str, revision: str) -> Path:
    """The directory with a model's files: its own, or the hub's copy in the cache."""
    if Path(path).is_dir():
        return Path(path)
    found = cached_file(path, CONFIG_NAME, revision=revision)
    if found is None:
        raise SettingError(f"--model: {path} has no {CONFIG_NAME}")
    return Path(found).parent


def model_digest(folder: Path) -> str:
    """sha256 over the files that a model is read from: names and sizes of the weights, of safetensors the header and a
    part of each tensor, of others all; all of configuration, tokenizer, processor and code; of an adapter also the
    digest of its base model."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(SAFETENSORS)):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for part in tensor_parts(path):
            digest.update(part)
    code = sorted(path.name for path in folder.glob(CODE))
    weights = sorted(path.name for path in folder.glob(WHOLE_WEIGHTS))
    for path in (folder / name for name in (*weights, *READ, *code)):
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(bytes.fromhex(sha256(path)))
    if is_adapter(folder):
        digest.update(f"base {model_digest(model_folder(*base_name(folder)))}\n".encode())
    return digest.hexdigest()


def tensor_parts(path: Path) -> Iterator[bytes]:
    """The header of a safetensors file, then up to `PART` bytes of each tensor's start, middle and end.

    Training moves, and an adapter merged into it too, values all over a tensor. SettingError for another file."""
    with path.open("rb") as file:
        length = file.read(8)
        start = 8 + int.from_bytes(length, "little")
        try:
            if start > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = file.read(start - 8)
            spans = [each["data_offsets"] for name, each in json.loads(header).items() if name != "__metadata__"]
        except ValueError as error:
            raise SettingError(f"--model: {path} is no whole safetensors file: {error}") from error
        yield length + header
        for first, end in spans:
            for at in sorted({first, max(first, (first + end - PART) // 2), max(first, end - PART)}):
                file.seek(start + at)
                yield file.read(min(PART, end - at))


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
