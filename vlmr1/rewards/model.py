"""A sequence classifier with one label as a reward function: its logit is the score."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from vlmr1.errors import SettingError


class RewardModel:
    """Score a conversation by a text model; images of the prompt are left out.

    The model runs where the first call finds it best: on the process's GPU, if there is one."""

    def __init__(self, model: Any, tokenizer: Any = None):
        from transformers import AutoTokenizer  # slow to import, and worker processes need no model

        source = getattr(model.config, "_name_or_path", "")
        self.__name__ = Path(source).name or type(model).__name__
        self.tokenizer = AutoTokenizer.from_pretrained(source) if tokenizer is None else tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.chat_template is None:
            raise SettingError(f"reward_funcs: the tokenizer of {self.__name__} has no chat template")
        model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model = model.eval().requires_grad_(False)

    def __call__(self, prompts: list, completions: list, **_: Any) -> list[float]:
        if torch.cuda.is_available():
            self.model.to(torch.device("cuda", torch.cuda.current_device()))
        conversations = [_as_text(prompt) + completion for prompt, completion in zip(prompts, completions, strict=True)]
        texts = [self.tokenizer.apply_chat_template(each, tokenize=False) for each in conversations]
        options = {"padding": True, "padding_side": "right", "add_special_tokens": False, "return_tensors": "pt"}
        with torch.inference_mode():
            logits = self.model(**self.tokenizer(texts, **options).to(self.model.device)).logits
        return logits[:, 0].float().tolist()


@cache
def load_reward_model(source: str) -> RewardModel:
    """Read a reward model from a local directory or hub id. SettingError: it cannot be read."""
    from transformers import AutoModelForSequenceClassification

    try:
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, use_safetensors=True)
        return RewardModel(model)
    except (OSError, ValueError) as error:
        raise SettingError(f"reward_funcs: {source}: no reward model can be read: {error}") from error


def _as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def text(content: Any) -> str:
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

    return [{"role": message["role"], "content": text(message["content"])} for message in messages]
