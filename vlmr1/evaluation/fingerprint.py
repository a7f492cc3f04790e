"""Fingerprint of model, data and options. Evaluations with equal fingerprints have the same results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from vlmr1.data.sources import split_names
from vlmr1.errors import SettingError
from vlmr1.evaluation.rows import Data, file_digests
from vlmr1.lifecycle.checkpoint import is_adapter, replace_text, sha256_of_file
from vlmr1.models.adapters import base_name
from vlmr1_kernels.registry import ENVIRONMENT_VARIABLE

BEGUN = "evaluation.json"
SAFETENSORS = "*.safetensors"
WHOLE_WEIGHTS = "*.bin"
PART = 4096  # bytes that are hashed of a tensor's start, middle and end
# Files beside the weights that affect a model's answers.
READ = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
READ += ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")
READ += ("video_preprocessor_config.json", "adapter_config.json", "quantization_config.json", "vocab.json")
READ += ("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer.model")
CODE = "*.py"  # run with trust_remote_code
PACKAGES = ("vlmr1", "torch", "transformers", "pillow", "numpy", "pycocotools")


class Inputs(Protocol):
    """Options that determine results: those of `vlmr1 evaluate`, or of `vlmr1 data rate`."""

    @property
    def revision(self) -> str: ...
    @property
    def data(self) -> list[str]: ...
    @property
    def kernels(self) -> str: ...
    def written(self) -> dict[str, Any]: ...


def fingerprint(name: str, path: str, model: Any, options: Inputs, data: Data) -> dict[str, Any]:
    """Return all that determines the results of the model called `name`, read from `path`."""
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
    """Write the fingerprint, or compare it with the one that the evaluation in this folder was started with.

    SettingError names the first difference."""
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
    replace_text(path, as_json(now))


def differences(before: Any, now: Any, name: str = "") -> Any:
    """Yield (name, before, now) of each difference, with names of nested values joined by dots."""
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
    """Return a sha256 over the files of a model: weights, configuration, tokenizer, processor and code.

    Of safetensors it covers the name, the size, the header and parts of each tensor. Of an adapter it also covers the
    digest of the base model."""
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
            digest.update(bytes.fromhex(sha256_of_file(path)))
    if is_adapter(folder):
        digest.update(f"base {model_digest(model_folder(*base_name(folder)))}\n".encode())
    return digest.hexdigest()


def tensor_parts(path: Path) -> Iterator[bytes]:
    """Yield the header of a safetensors file, then up to `PART` bytes of each tensor's start, middle and end.

    Training, or a merged adapter, changes values all over a tensor. SettingError for an invalid file."""
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
