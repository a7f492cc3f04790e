"""Base of the configurations of scripts: fields without effect, settings in dicts, evaluations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, field, fields, make_dataclass
from typing import Any, ClassVar, get_type_hints

import torch

ALREADY = (("do_sample", True), ("use_cache", True), ("use_cache", False))  # values that change nothing here


def taken(default: Any) -> Any:
    """A field without effect on results, or refused where it has another value than this."""
    return field(default=default, metadata={"help": "taken as TRL's; docs/from-trl.md says what it does here"})


def without(core: type, names: tuple[str, ...], module: str) -> type:
    """The settings of the command line, without these in the constructor and in parsers of scripts."""
    hints, known = get_type_hints(core), {each.name: each for each in fields(core)}
    left_out = []
    for each in (known[name] for name in names if name in known):
        default: dict[str, Any] = {"default": each.default, "default_factory": each.default_factory}
        given = {name: value for name, value in default.items() if value is not MISSING}
        left_out.append((each.name, hints[each.name], field(init=False, **given)))
    return make_dataclass("Base", left_out, bases=(core,), namespace={"__module__": module})


class ScriptSettings:
    """Settings that a script gives in dicts, and those of its evaluations."""

    in_dicts: ClassVar[dict[str, dict[str, str]]]  # by the name of the dict: its keys, and the settings that they are
    load_best_model_at_end: bool
    reads_dtype: bool

    def _evaluation(self) -> Iterator[str]:
        """Yield what is wrong with the settings of evaluations."""
        args: Any = self
        by, saved = (str(getattr(each, "value", each)) for each in (args.eval_strategy, args.save_strategy))
        if not self.load_best_model_at_end:
            return
        if by != saved:
            yield f"load_best_model_at_end needs eval_strategy={saved}, as save_strategy; it is {by}"
        elif by == "steps" and args.save_steps % (args.eval_steps or args.logging_steps):
            yield f"load_best_model_at_end needs save_steps, {args.save_steps}, to be a multiple of eval_steps"

    def read_kwargs(self) -> Iterator[str]:
        """Set the settings that are given in dicts; yield what is wrong with them. Scripts also set them later: the
        trainer reads them again."""
        for name, known in self.in_dicts.items():
            given = getattr(self, name) or {}
            if isinstance(given, str):
                with suppress(ValueError):
                    given = json.loads(given)
            if not isinstance(given, dict):
                yield f"{name} is {given!r}: it must be a dict, or a JSON object"
                continue
            for key, value in given.items():
                if key not in known and value is not None and (key, value) not in ALREADY:
                    yield f"{name} has {key!r}: known are {', '.join(known)}"
                elif key in known and value is not None:
                    yield from self._set(known[key], value, f"{name}: {key}")

    def _set(self, name: str, value: Any, given: str) -> Iterator[str]:
        if name == "model_dtype":
            value = str(value).removeprefix("torch.")
            if value not in ("float32", "bfloat16", "auto"):
                yield f"{given} is {value}: weights are float32 or bfloat16"
                return
            self.reads_dtype, value = value == "auto", "float32" if value == "auto" else value
        if name == "device_map":  # a process has one device, and the model is there
            if value == "auto" and torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
                yield f"{given} is auto: one process uses one GPU; start the script with `accelerate launch`"
            elif value != "auto" and (not isinstance(value, dict) or list(value) != [""]):
                yield f"{given} is {value!r}: the model is on the device of its process, leave device_map out"
            return
        setattr(self, name, value)
