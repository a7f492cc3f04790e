"""The tokens that end a completion, for rollouts, evaluation and sampling alike; and the text of a completion."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from vlmr1.errors import SettingError

WORDS = "words of the assistant"  # a turn whose end is looked for


def stop_token_ids(model: Any, tokenizer: Any, chat_template: str | None = None) -> frozenset[int]:
    """Return the ids of the tokens that end a completion.

    They are those of the generation config, or else of the config; the tokenizer's end token; and the special token
    with which the chat template (default: the tokenizer's) ends a turn. SettingError where there is none.
    """
    found = _ids(model.generation_config) or _ids(model.config.get_text_config(decoder=True)) or _ids(model.config)
    found |= _ids(tokenizer) | end_of_turn(tokenizer, chat_template)
    if not found:
        raise SettingError(
            "no token ends a completion: generation_config.json and config.json have no eos_token_id, the tokenizer "
            "has no eos_token, and the chat template ends a turn without a special token; set eos_token in "
            "tokenizer_config.json"
        )
    return found


def end_of_turn(tokenizer: Any, chat_template: str | None = None) -> frozenset[int]:
    """Return the id of the first special token behind an assistant's words in the chat template, if there is one."""
    template = chat_template or tokenizer.chat_template
    if not isinstance(template, str):
        return frozenset()
    return _end_of_turn(tokenizer, template)


@lru_cache(maxsize=8)
def _end_of_turn(tokenizer: Any, template: str) -> frozenset[int]:
    from jinja2 import TemplateError  # with the template, not with the trainer

    turns = [("user", "question"), ("assistant", WORDS), ("user", "question")]
    for as_parts in (True, False):  # templates of text models take strings only
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text} for role, text in turns
        ]
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except (TemplateError, TypeError):  # the template refuses such messages
            continue
        _, words, rest = text.rpartition(WORDS)
        special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        places = {rest.find(token): i for token, i in special.items() if words and token in rest}
        if places:
            return frozenset([places[min(places)]])
    return frozenset()


def decode(tokenizer: Any, ids: Iterable[int], stops: frozenset[int], *, skip_special: bool = False) -> str:
    """Return the text of a completion without end and padding tokens; other special tokens, such as tags, stay.

    With `skip_special` no special token stays, and end tokens that are none do, as in TRL."""
    if skip_special:
        return tokenizer.decode(list(ids), skip_special_tokens=True)
    left_out = stops | {tokenizer.pad_token_id, tokenizer.eos_token_id}
    return tokenizer.decode([each for each in ids if each not in left_out], skip_special_tokens=False)


def _ids(source: Any) -> frozenset[int]:
    """Return the `eos_token_id` of a config or tokenizer as a set."""
    eos = getattr(source, "eos_token_id", None)
    return frozenset([eos] if isinstance(eos, int) else eos or [])
