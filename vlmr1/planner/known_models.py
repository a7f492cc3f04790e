"""Configurations of models, from a shipped file or a local directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vlmr1.errors import SettingError
from vlmr1.models import family_for
from vlmr1.models.quantization import check_not_quantized

CONFIGS = Path(__file__).parent / "configs"


def known_models() -> list[str]:
    """Hub ids of the models whose configuration is shipped."""
    return sorted(path.stem.replace("__", "/") for path in CONFIGS.glob("*.json"))


def config_named(name: str) -> Any:
    """The configuration of a shipped model, by hub id or its last part, or of a local directory; nothing is fetched.

    SettingError: the name is neither, or its family is not supported."""
    check_not_quantized(name)
    shipped = {id_.split("/")[-1]: id_ for id_ in known_models()} | {id_: id_ for id_ in known_models()}
    if name in shipped:
        values = json.loads((CONFIGS / f"{shipped[name].replace('/', '__')}.json").read_text(encoding="utf-8"))
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    elif (Path(name) / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=True)
        except ValueError as error:
            raise SettingError(f"model_name_or_path: {name}: {str(error).splitlines()[0]}") from error
    else:
        raise SettingError(
            f"model_name_or_path: {name!r} is no local directory with a config.json, and `vlmr1 plan` fetches nothing; "
            f"it knows {', '.join(known_models())}"
        )
    check_not_quantized(name, config)
    family_for(config)
    return config
