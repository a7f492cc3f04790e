"""Recipes, config files and the command line -> GRPOConfig; later sources win, unknown settings are errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from vlmr1.config import GRPOConfig
from vlmr1.errors import SettingError

RECIPES = Path(__file__).parents[1] / "recipes"


class _Parser(HfArgumentParser):
    def __init__(self, **kwargs: Any):
        settings: Any = GRPOConfig
        super().__init__(settings, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise SettingError(message)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse_config(arguments: Sequence[str], *, recipe: str | None = None, config: Path | None = None) -> GRPOConfig:
    """Settings of a run: the recipe's, then the config file's, then `--name value` of the command line."""
    words: list[str] = []
    if recipe is not None:
        path = RECIPES / f"{recipe}.yaml"
        if recipe not in recipe_names():
            raise SettingError(f"--recipe: unknown recipe {recipe!r}; known: {', '.join(recipe_names())}")
        words += _words(path)
    if config is not None:
        words += _words(config)
    parser = _Parser()
    namespace, unknown = parser.parse_known_args([*words, *arguments])
    if unknown:
        raise SettingError(_unknown(unknown[0].split("=")[0], "on the command line"))
    return GRPOConfig(**vars(namespace))


def help_text() -> str:
    """Every setting of a run with its default."""
    return _Parser(prog="vlmr1 train --recipe NAME | --config FILE").format_help()


def _words(path: Path) -> list[str]:
    """A YAML mapping of settings as command-line words, each name checked."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise SettingError(f"--config: {error}") from error
    except yaml.YAMLError as error:
        raise SettingError(f"{path}: not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise SettingError(f"{path}: a mapping of settings is expected")
    words = []
    for name, value in settings.items():
        if name not in GRPOConfig.__dataclass_fields__:
            raise SettingError(_unknown(str(name), f"in {path}"))
        words += _word(str(name), value)
    return words


def _word(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _unknown(word: str, where: str) -> str:
    name = word.lstrip("-")
    if not word.startswith("-") and name not in GRPOConfig.__dataclass_fields__ and "in " not in where:
        return f"unexpected argument {word!r} {where}"
    near = get_close_matches(name, GRPOConfig.__dataclass_fields__, n=1)
    return f"unknown setting {name!r} {where}" + (f"; did you mean {near[0]!r}?" if near else "")
