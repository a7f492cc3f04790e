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
from transformers.hf_argparser import string_to_bool

from vlmr1.commands.settings_help import every_setting, one_setting
from vlmr1.config import GRPOConfig, SFTConfig
from vlmr1.errors import SettingError, faults_of
from vlmr1.lifecycle.console import ignore_broken_pipe
from vlmr1.lifecycle.peer_flags import REPLACES, instead_of
from vlmr1.lifecycle.renamed import RENAMED, current_name, current_value

RECIPES = Path(__file__).parents[1] / "recipes"
Kind = type[GRPOConfig] | type[SFTConfig]  # of a run


class SettingsParser(HfArgumentParser):
    """The command line of a configuration, and of settings that stand for its own. What is refused is collected, and
    left out of the namespace, as what is not given is."""

    def __init__(self, kind: Kind) -> None:
        settings: Any = kind
        super().__init__(settings, allow_abbrev=False, add_help=False)
        for name, of in kind.peer_flags.items():
            names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
            switch: dict[str, Any] = {"type": string_to_bool, "nargs": "?", "const": True} if of is bool else {}
            self.add_argument(*names, dest=name, **switch)
        for action in self._actions:
            action.default = argparse.SUPPRESS
            if action.dest == "report_to":  # the library's parser takes one
                action.nargs = "+"
        self.faults: list[str] = []
        self.seen: dict[str, tuple[Any, list[str]]] = {}  # value and words of each setting of one source

    def parse(self, words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Return the settings of one source by name, and the words that are unknown."""
        self.seen.clear()
        namespace, unknown = self.parse_known_args(words)
        return vars(namespace), unknown

    def error(self, message: str) -> NoReturn:
        raise SettingError("\n".join([*self.faults, message]))

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError as error:  # no value
            self.faults.append(str(error))
            return 0

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if not arg_strings and action.nargs in (None, "+"):
            return argparse.SUPPRESS
        given = [current_value(action.dest, each) for each in arg_strings]
        try:
            found = super()._get_values(action, given)
        except argparse.ArgumentError as error:
            comma = action.nargs == "+" and any("," in each for each in arg_strings)
            self.faults.append(f"{error}; a list takes spaces" if comma else str(error))
            return argparse.SUPPRESS
        value = action.const if action.nargs == 0 else found
        before, first = self.seen.setdefault(action.dest, (value, arg_strings))
        if before != value:
            both = " and ".join(" ".join(each) or str(action.const) for each in (first, arg_strings))
            self.faults.append(f"{action.dest} is given twice: {both}")
        return found


def add_sources(parser: argparse.ArgumentParser) -> None:
    """The options that name the sources of settings beside the command line."""
    parser.add_argument("--recipe", help="a recipe shipped with the package")
    parser.add_argument("--config", type=Path, help="a YAML file of settings")


def recipe_names(kind: Kind = GRPOConfig) -> list[str]:
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return [name for name in names if name.endswith(SFTConfig.recipe_suffix) == (kind is SFTConfig)]


def parse_config(
    arguments: Sequence[str], *, recipe: str | None = None, config: Path | None = None, changes: Sequence[str] = ()
) -> GRPOConfig:
    """Settings of a run: the recipe's, then the config file's, then `--name value` of the command line, then `changes`.

    Raises one SettingError with everything that is wrong, a line each."""
    return make_config(*read_settings(arguments, recipe=recipe, config=config, changes=changes))


def read_settings(
    arguments: Sequence[str],
    *,
    recipe: str | None = None,
    config: Path | None = None,
    changes: Sequence[str] = (),
    kind: Kind = GRPOConfig,
) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that the sources give, and the faults of what cannot be read."""
    faults: list[str] = []
    sources: list[list[str]] = []
    if recipe in recipe_names(kind):
        sources.append(_words(RECIPES / f"{recipe}.yaml", faults, kind))
    elif recipe is not None:
        faults.append(f"--recipe: unknown recipe {recipe!r}; known: {', '.join(recipe_names(kind))}")
    if config is not None:
        unreadable = list(faults_of(lambda: sources.append(_words(config, faults, kind))))
        faults += unreadable
    parser = SettingsParser(kind)
    settings: dict[str, Any] = {}
    unknown: list[str] = []
    sources += [[_with_current_name(word) for word in words] for words in (arguments, changes)]
    for words in sources:
        given, more = parser.parse(words)
        unknown += more
        for name in (replaced for each in given for replaced in REPLACES.get(each, ())):
            settings.pop(name, None)
        settings |= given
    return settings, [*faults, *parser.faults, *_unknown_words(unknown, kind)]


def make_config(
    settings: dict[str, Any], faults: Sequence[str] = (), *, preflight: bool = False, kind: Kind = GRPOConfig
) -> Any:
    """Return the configuration; one SettingError with `faults` and all others. `preflight`: also with what this machine
    cannot do or does not have."""
    made: Any = kind.__new__(kind, **settings)  # type: ignore[reportArgumentType]
    found = [*faults, *faults_of(lambda: kind.__init__(made, **settings))]
    if preflight:
        found += made.device_faults()
    if found:
        raise SettingError("\n".join(dict.fromkeys("\n".join(found).splitlines())))
    return made


def show_help(name: str = "", kind: Kind = GRPOConfig) -> None:
    """Print every setting of a run, or one in full; SettingError where there is none of this name."""
    name = current_name(name.lstrip("-").replace("-", "_"))
    if name and name not in kind.__dataclass_fields__:
        raise SettingError(_unknown(name, "in --help", kind))
    text = one_setting(name, kind) if name else every_setting(kind)
    with ignore_broken_pipe():
        print(text)


def _words(path: Path, faults: list[str], kind: Kind) -> list[str]:
    """A YAML mapping of settings as command-line words; unknown names are faults."""
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text) or {}
    except OSError as error:
        raise SettingError(f"--config: {error}") from error
    except yaml.YAMLError as error:
        raise SettingError(f"{path}: not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise SettingError(f"{path}: a mapping of settings is expected")
    words = []
    names = [str(key.value) for key, _ in yaml.compose(text).value] if settings else []
    faults += [f"{name} is given twice in {path}" for name in dict.fromkeys(names) if names.count(name) > 1]
    for name, value in settings.items():
        name = current_name(str(name))
        if name in kind.__dataclass_fields__ or name in kind.peer_flags:
            words += _word(name, value)
        else:
            faults.append(_unknown(name, f"in {path}", kind))
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


def _unknown_words(words: Sequence[str], kind: Kind) -> list[str]:
    """Faults of the words that the parser did not know. Those behind an unknown setting are its values."""
    names = [word.split("=")[0] for word in words if word.startswith("--")] or words[:1]
    return [_unknown(name, "on the command line", kind) for name in names]


def _unknown(word: str, where: str, kind: Kind) -> str:
    name = word.lstrip("-")
    if not word.startswith("-") and name not in kind.__dataclass_fields__ and "in " not in where:
        return f"unexpected argument {word!r} {where}"
    other = SFTConfig if kind is GRPOConfig else GRPOConfig
    if name.replace("-", "_") in other.__dataclass_fields__:
        return f"unknown setting {name!r} {where}: only `vlmr1 {other.command}` reads it"
    instead = instead_of(name.replace("-", "_"))
    if instead is not None:
        return f"unknown setting {name!r} {where}: {instead}"
    near = get_close_matches(name, kind.__dataclass_fields__, n=1)
    return f"unknown setting {name!r} {where}" + (f"; did you mean {near[0]!r}?" if near else "")
