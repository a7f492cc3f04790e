"""Recipes, config files and the command line -> GRPOConfig; later sources win, unknown settings are errors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from vlmr1.commands.settings_help import every_setting, one_setting
from vlmr1.config import GRPOConfig
from vlmr1.errors import SettingError
from vlmr1.lifecycle.console import surviving
from vlmr1.lifecycle.renamed import RENAMED, current_name, current_value

RECIPES = Path(__file__).parents[1] / "recipes"


class SettingsParser(HfArgumentParser):
    """The command line of GRPOConfig. Values that are refused are collected, and their settings left out."""

    def __init__(self) -> None:
        settings: Any = GRPOConfig
        super().__init__(settings, allow_abbrev=False, add_help=False)
        self.faults: list[str] = []

    def error(self, message: str) -> NoReturn:
        raise SettingError("\n".join([*self.faults, message]))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        given = [current_value(action.dest, each) for each in arg_strings]
        try:
            return super()._get_values(action, given)
        except argparse.ArgumentError as error:
            self.faults.append(str(error))
            return action.default


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The options that name the sources of settings beside the command line."""
    parser.add_argument("--recipe", help="a recipe shipped with the package")
    parser.add_argument("--config", type=Path, help="a YAML file of settings")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse_config(arguments: Sequence[str], *, recipe: str | None = None, config: Path | None = None) -> GRPOConfig:
    """Settings of a run: the recipe's, then the config file's, then `--name value` of the command line.

    Raises one SettingError with everything that is wrong, a line each."""
    faults: list[str] = []
    words: list[str] = []
    if recipe is not None:
        path = RECIPES / f"{recipe}.yaml"
        if recipe not in recipe_names():
            raise SettingError(f"--recipe: unknown recipe {recipe!r}; known: {', '.join(recipe_names())}")
        words += _words(path, faults)
    if config is not None:
        words += _words(config, faults)
    parser = SettingsParser()
    namespace, unknown = parser.parse_known_args([*words, *map(_with_current_name, arguments)])
    faults += [*parser.faults, *_unknown_words(unknown)]
    try:
        made = GRPOConfig(**vars(namespace))
    except SettingError as error:
        faults += str(error).splitlines()
    if faults:
        raise SettingError("\n".join(faults))
    return made


def show_help(name: str = "") -> None:
    """Print every setting of a run, or one in full; SettingError where there is none of this name."""
    name = current_name(name.lstrip("-").replace("-", "_"))
    if name and name not in GRPOConfig.__dataclass_fields__:
        raise SettingError(_unknown(name, "in --help"))
    text = one_setting(name) if name else every_setting()
    with surviving():
        print(text)


def _words(path: Path, faults: list[str]) -> list[str]:
    """A YAML mapping of settings as command-line words; unknown names are faults."""
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
        name = current_name(str(name))
        if name in GRPOConfig.__dataclass_fields__:
            words += _word(name, value)
        else:
            faults.append(_unknown(name, f"in {path}"))
    return words


def _word(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _with_current_name(word: str) -> str:
    """A word of the command line, with today's name where it is `--name` or `--name=value`."""
    name, equals, value = word.partition("=")
    plain = name[2:].replace("-", "_")
    return f"--{current_name(plain)}{equals}{value}" if name.startswith("--") and plain in RENAMED else word


def _unknown_words(words: Sequence[str]) -> list[str]:
    """Faults of the words that the parser did not know. Those behind an unknown setting are its values."""
    names = [word.split("=")[0] for word in words if word.startswith("--")] or words[:1]
    return [_unknown(name, "on the command line") for name in names]


def _unknown(word: str, where: str) -> str:
    name = word.lstrip("-")
    if not word.startswith("-") and name not in GRPOConfig.__dataclass_fields__ and "in " not in where:
        return f"unexpected argument {word!r} {where}"
    near = get_close_matches(name, GRPOConfig.__dataclass_fields__, n=1)
    return f"unknown setting {name!r} {where}" + (f"; did you mean {near[0]!r}?" if near else "")
