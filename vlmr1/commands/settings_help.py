"""`vlmr1 train --help`, `vlmr1 sft --help`: the settings of a run in groups, and one setting in full."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import MISSING, Field
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from vlmr1.config import GRPOConfig, SFTConfig

WIDTH = 42  # of name and default
Kind = type[GRPOConfig] | type[SFTConfig]
# Defaults of TRL's GRPOConfig that differ, and of its SFTConfig.
TRL_DEFAULTS = {
    "beta": 0.0,
    "gradient_checkpointing": True,
    "logging_steps": 10,
    "loss_type": "dapo",
    "lr_scheduler_type": "linear",
    "max_completion_length": 512,
    "output_dir": None,
    "save_steps": 500,
    "use_bias_correction_kl": True,
}
TRL_SFT_DEFAULTS = {
    "gradient_checkpointing": True,
    "logging_steps": 10,
    "max_length": 1024,
    "output_dir": None,
    "save_steps": 500,
    "shuffle_dataset": False,
}


def every_setting(kind: Kind = GRPOConfig) -> str:
    """All settings that a run may have, a line each, as wide as the terminal."""
    width = shutil.get_terminal_size().columns
    lines = [
        f"vlmr1 {kind.command} [--recipe NAME] [--config FILE] [--launch NAME] [--processes N] [--SETTING VALUE ...]",
        f"`vlmr1 {kind.command} --help SETTING` shows one setting in full.",
    ]
    for group, names in kind.groups().items():
        lines += ["", group]
        for name in names:
            head = f"  {name} = {default_text(name, kind)}"
            lines.append(f"{head:<{WIDTH}}  {help_text(name, kind)}".rstrip())
    return "\n".join(line if len(line) <= width else f"{line[: width - 3].rstrip()}..." for line in lines)


def one_setting(name: str, kind: Kind = GRPOConfig) -> str:
    """Type or choices, default, TRL's default where it differs, and help of a setting."""
    group = next((group for group, names in kind.groups().items() if name in names), None)
    rows = [("type", _type(_hints(kind)[name])), ("default", default_text(name, kind))]
    defaults = TRL_DEFAULTS if kind is GRPOConfig else TRL_SFT_DEFAULTS
    if name in defaults:
        rows.append(("TRL's default", _text(defaults[name])))
    rows.append(("group", group or "not supported: a run that sets it is refused"))
    lines = [f"--{name}", *(f"  {key + ':':<15}{value}" for key, value in rows), ""]
    width = max(20, shutil.get_terminal_size().columns - 2)
    return "\n".join([*lines, textwrap.fill(help_text(name, kind), width, initial_indent="  ", subsequent_indent="  ")])


@cache
def _hints(kind: Kind) -> dict[str, Any]:
    return get_type_hints(kind)


def help_text(name: str, kind: Kind = GRPOConfig) -> str:
    """Return the help of a setting in one line; of an inherited one that is declared again, the inherited help."""
    inherited = TrainingArguments.__dataclass_fields__.get(name)
    found = [each.metadata.get("help") for each in (kind.__dataclass_fields__[name], inherited) if each is not None]
    return " ".join(next(filter(None, found), "").split())


def default_text(name: str, kind: Kind = GRPOConfig) -> str:
    """Return the default of a setting as it is written on the command line."""
    return _text(_default(kind.__dataclass_fields__[name]))


def _default(setting: Field) -> Any:
    if setting.default_factory is not MISSING:
        return setting.default_factory()
    return None if setting.default is MISSING else setting.default


def _text(value: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value)) or "(none)"
    if isinstance(value, bool):
        return str(value).lower()
    return "(none)" if value is None or value == "" else str(getattr(value, "value", value))


def _type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_args(hint) and get_origin(hint) is not list:
        parts = [_type(each) for each in get_args(hint) if each is not type(None)]
        return " or ".join(dict.fromkeys(parts)) if get_origin(hint) in (Union, type(int | str)) else str(hint)
    return str(hint) if get_args(hint) else getattr(hint, "__name__", str(hint))
