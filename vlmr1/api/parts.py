"""Arguments of the trainer -> model, processor and reward functions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from vlmr1.api.config import GRPOConfig
from vlmr1.api.quantized import asked_for, is_in_4bit, keeping
from vlmr1.errors import SettingError, import_for
from vlmr1.models import BY_TYPE, load_model, load_processor, model_type_of
from vlmr1.models.lora import base_of
from vlmr1.rewards.model import RewardModel
from vlmr1.rewards.registry import REWARDS, Reward

logger = logging.getLogger(__name__)


def name_of(model: Any) -> str:
    """Directory or hub id of a model."""
    return model if isinstance(model, str) else str(base_of(model).config._name_or_path)


def default_config(model: Any) -> GRPOConfig:
    """TRL's settings where a script gives none."""
    return GRPOConfig(f"{Path(name_of(model)).name}-GRPO")


def load(model: Any, peft_config: Any, quantization_config: Any, args: Any) -> Any:
    """Return the model, or the `peft.PeftModel` around it; read it where its name is given."""
    faults = list(args.read_kwargs())
    if faults:
        raise SettingError("\n".join(faults))
    if isinstance(model, str):
        quantization = asked_for(quantization_config, args.quantization)
        if quantization is not None and peft_config is None:
            raise SettingError("quantization_config needs peft_config: 4-bit weights cannot be trained")
        model = _read(model, quantization, args, reads_dtype=args.reads_dtype and peft_config is not None)
    else:
        for name, value in (
            ("model_init_kwargs", args.model_init_kwargs),
            ("quantization_config", quantization_config),
        ):
            if value:
                logger.warning("%s is ignored: the model was loaded before", name)
        args.model_dtype = "bfloat16" if base_of(model).dtype == torch.bfloat16 else "float32"
    given = base_of(model) is not model
    if peft_config is not None:
        if given:
            raise SettingError(
                "peft_config: the model has an adapter; leave peft_config out, or merge the adapter first"
            )
        peft = import_for("peft_config", "peft", "vlmr1[quant]")
        if not isinstance(peft_config, peft.PeftConfig):
            raise SettingError(f"peft_config is a {type(peft_config).__name__}: give a peft.LoraConfig")
        try:
            model = peft.get_peft_model(model, peft_config)
        except ValueError as error:
            raise SettingError(f"peft_config: {error}") from error
    args.use_peft = given or peft_config is not None
    args.load_in_4bit = is_in_4bit(base_of(model))
    faults = list(args.merge_faults()) if isinstance(args, GRPOConfig) else []
    if faults:
        raise SettingError("\n".join(faults))
    if given and args.beta > 0 and args.reference == "auto":
        args.reference = "copy"  # of base and adapter as they are given
    if args.disable_dropout:
        without_dropout(model)
    return model


def _read(name: str, quantization: Any, args: Any, *, reads_dtype: bool) -> Any:
    source: dict[str, Any] = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    if reads_dtype:
        stored = AutoConfig.from_pretrained(name, **source).dtype
        args.model_dtype = "bfloat16" if stored in (torch.bfloat16, "bfloat16") else "float32"
    if quantization is not None:
        quantization = keeping(quantization, BY_TYPE[model_type_of(name, **source)]())
    options = {"attn_implementation": args.attn_implementation, "quantization": quantization}
    return load_model(name, dtype=getattr(torch, args.model_dtype), **source, **options)


def without_dropout(model: Any) -> None:
    """Set every probability of dropout to 0, those of adapters and of attention too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    config = base_of(model).config
    for each in (config, config.get_text_config(decoder=True)):
        for name in each.to_dict():
            if name.endswith("dropout") and isinstance(getattr(each, name, None), float):
                setattr(each, name, 0.0)


def processor_of(given: Any, model: Any, args: Any) -> Any:
    """Return the processor, read from the model's directory where none is given."""
    if given is None:
        given = load_processor(name_of(model), revision=args.model_revision, trust_remote_code=args.trust_remote_code)
    if isinstance(given, PreTrainedTokenizerBase) or not hasattr(given, "image_processor"):
        raise SettingError(
            f"processing_class is a {type(given).__name__}: a processor of text and images is needed "
            "(AutoProcessor.from_pretrained)"
        )
    if given.tokenizer.pad_token is None:
        given.tokenizer.pad_token = given.tokenizer.eos_token
    return given


def rewards_of(given: Any, tokenizers: Any) -> list[Any]:
    """Return the reward functions; a model, or the name of one, with its tokenizer."""
    rewards = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
    if not rewards:
        raise SettingError("reward_funcs is missing: give a function, its name, or a reward model")
    every = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(rewards)
    if len(every) != len(rewards):
        raise SettingError(f"reward_processing_classes has {len(every)} values for {len(rewards)} reward_funcs")
    return [_reward(reward, tokenizer) for reward, tokenizer in zip(rewards, every, strict=True)]


def _reward(reward: Any, tokenizer: Any) -> Any:
    if isinstance(reward, str) and reward not in REWARDS and ":" not in reward and Path(reward).is_dir():
        try:
            reward = AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1)
        except (OSError, ValueError) as error:
            raise SettingError(f"reward_funcs: {reward}: no reward model can be read: {error}") from error
    if isinstance(reward, nn.Module):
        return RewardModel(reward, tokenizer)
    return Reward(_inner(reward).__name__, reward) if isinstance(reward, partial) else reward


def _inner(function: Callable[..., Any]) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


def needed_rows(args: Any) -> int | None:
    """The rows of a stream that a run reads; None without max_steps."""
    if args.max_steps <= 0:
        return None
    generations = -(-args.max_steps // (args.updates_per_generation * args.num_iterations))
    return generations * args.prompts_per_device * args.updates_per_generation * args.world_size


def eval_sets(given: Any) -> dict[str, Sequence[Any]]:
    """Return the rows of each data set by the prefix of its metrics."""
    every = {f"eval_{name}": rows for name, rows in given.items()} if isinstance(given, dict) else {"eval": given}
    return {name: finite(rows) for name, rows in every.items()}


def finite(rows: Any) -> Any:
    """Return the rows, those of a stream as a list; what has no rows is refused where they are read."""
    return rows if hasattr(rows, "__len__") or not hasattr(rows, "__iter__") else list(rows)
