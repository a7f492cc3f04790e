"""`vlmr1 train --help`: the settings of a run in groups, and one setting in full."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import MISSING, Field
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from vlmr1.config import GRPOConfig, groups

WIDTH = 42  # of name and default
# Defaults of TRL's GRPOConfig that differ.
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


def every_setting() -> str:
    """All settings that a run may have, a line each, as wide as the terminal."""
    width = shutil.get_terminal_size().columns
    lines = [
        "vlmr1 train [--recipe NAME] [--config FILE] [--launch NAME] [--processes N] [--SETTING VALUE ...]",
        "`vlmr1 train --help SETTING` shows one setting in full.",
    ]
    for group, names in groups().items():
        lines += ["", group]
        for name in names:
            head = f"  {name} = {default_text(name)}"
            lines.append(f"{head:<{WIDTH}}  {help_text(name)}".rstrip())
    return "\n".join(line if len(line) <= width else f"{line[: width - 3].rstrip()}..." for line in lines)


def one_setting(name: str) -> str:
    """Type or choices, default, TRL's default where it differs, and help of a setting."""
    group = next((group for group, names in groups().items() if name in names), None)
    rows = [("type", _type(_hints()[name])), ("default", default_text(name))]
    if name in TRL_DEFAULTS:
        rows.append(("TRL's default", _text(TRL_DEFAULTS[name])))
    rows.append(("group", group or "not supported: a run that sets it is refused"))
    lines = [f"--{name}", *(f"  {key + ':':<15}{value}" for key, value in rows), ""]
    width = max(20, shutil.get_terminal_size().columns - 2)
    return "\n".join([*lines, textwrap.fill(help_text(name), width, initial_indent="  ", subsequent_indent="  ")])


def _field(name: str) -> Field:
    return GRPOConfig.__dataclass_fields__[name]


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(GRPOConfig)


def help_text(name: str) -> str:
    """Return the help of a setting in one line; of an inherited one that is declared again, the inherited help."""
    inherited = TrainingArguments.__dataclass_fields__.get(name)
    found = [each.metadata.get("help") for each in (_field(name), inherited) if each is not None]
    return " ".join(next(filter(None, found), "").split())


def default_text(name: str) -> str:
    """Return the default of a setting as it is written on the command line."""
    return _text(_default(_field(name)))


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
