"""Models as the planner knows them: a configuration, from a shipped file or a local directory, and what it holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmr1.errors import SettingError
from vlmr1.models import adapter_for

CONFIGS = Path(__file__).parent / "configs"


def known_models() -> list[str]:
    """Hub ids whose configuration is shipped."""
    return sorted(path.stem.replace("__", "/") for path in CONFIGS.glob("*.json"))


def config_named(name: str) -> Any:
    """The configuration of a shipped model, by hub id or its last part, or of a local directory; nothing is fetched.

    SettingError: the name is neither, or its family has no adapter."""
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
    adapter_for(config)
    return config


def built(config: Any) -> nn.Module:
    """The model of a configuration on the meta device."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@dataclass(frozen=True)
class Parameters:
    """Numbers of a model, tied ones once."""

    tower: int  # the vision tower without its merger or projector
    merger: int
    decoder: int  # without embeddings and head
    embeddings: int  # and the head, where it is not tied to them
    largest_layer: int  # of the decoder
    buffers: int  # bytes

    @property
    def vision(self) -> int:
        return self.tower + self.merger

    @property
    def total(self) -> int:
        return self.vision + self.decoder + self.embeddings


def parameters_of(model: nn.Module) -> Parameters:
    """Counted on the built model."""
    adapter: Any = adapter_for(model.config)
    vision = {id(p): p for p in adapter.vision_parameters(model)}
    merger = {id(p): p for p in merger_parameters(model)}
    outer = [model.get_input_embeddings(), adapter.head(model)]  # type: ignore[operator]
    outer_ids = {id(p): p for module in outer for p in module.parameters()}
    decoder = attrgetter(adapter.decoder_path)(model)
    rest = {id(p): p for p in model.parameters() if id(p) not in vision and id(p) not in outer_ids}
    return Parameters(
        tower=_count(p for key, p in vision.items() if key not in merger),
        merger=_count(merger.values()),
        decoder=_count(rest.values()),
        embeddings=_count(outer_ids.values()),
        largest_layer=max(_count(layer.parameters()) for layer in decoder.layers),
        buffers=sum(b.numel() * b.itemsize for b in model.buffers()),
    )


def merger_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Of what maps the tower's rows to the decoder's: the later vision paths, or the tower's own mergers."""
    adapter = adapter_for(model.config)
    tower, *others = (attrgetter(path)(model) for path in adapter.vision_paths)
    found = [p for module in others for p in module.parameters()]
    if not others:
        found = [p for name, p in tower.named_parameters() if "merger" in name]
    return found


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
