"""Rows -> groups: the prompt of a row, and its answers as completions with the end of turn of the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlmr1.data.faults import row_fault
from vlmr1.data.prompts import PromptBuilder, PromptDataset
from vlmr1.rollout.stop_tokens import end_of_turn, stop_token_ids
from vlmr1.types import Completion, Group, Prompt, Sample

SHORTER = "Set max_prompt_length below it and overlong_prompts=filter to leave such rows out before training"


class AnswerEncoder:
    """Tokenizes the answers of a prompt's sample."""

    def __init__(self, builder: PromptBuilder, max_length: int | None = None):
        self.builder = builder
        self.max_length = max_length
        processor = builder.processor
        self.tokenizer = processor.tokenizer
        self.ends = stop_token_ids(builder.model, self.tokenizer, processor.chat_template)
        own = end_of_turn(self.tokenizer, processor.chat_template) or self.ends & {self.tokenizer.eos_token_id}
        self.end = min(own or self.ends)

    def __call__(self, prompt: Prompt) -> Group:
        """The group of a prompt and its answers; DataError where nothing of an answer can be trained on."""
        sample = prompt.sample
        opening = self.builder.text(sample.messages)
        answers = (sample.solution, *sample.other_solutions)
        return Group(prompt, tuple(self._completion(prompt, opening, answer) for answer in answers))

    def _completion(self, prompt: Prompt, opening: str, answer: str) -> Completion:
        source = prompt.sample.source
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        text = self.builder.text([*prompt.sample.messages, turn], opens=False)
        if not text.startswith(opening):
            what = "the chat template renders this answer in another way than it opens the model's turn, with"
            raise row_fault(source, "chat template", f"{what} {opening[-40:]!r}; see chat_template_kwargs")
        ids = self.tokenizer(text[len(opening) :], add_special_tokens=False).input_ids
        if not self.ends.intersection(ids):  # the template ends a turn by the beginning of the next one
            ids = [*ids, self.end]
        room = None if self.max_length is None else self.max_length - len(prompt.input_ids)
        if room is not None and room < 1:
            what = f"the prompt has {len(prompt.input_ids)} tokens, and max_length is {self.max_length}"
            raise row_fault(source, "max_length", f"{what}: nothing is left of its answer. {SHORTER}")
        ended = room is None or len(ids) <= room
        kept = torch.tensor(ids[:room])
        return Completion(kept, None, None, answer, "stop" if ended else "length")


class AnswerDataset(PromptDataset):
    """Groups by index; `of_sample` is the prompt of one, as in `PromptDataset`."""

    def __init__(self, samples: Sequence[Sample], builder: PromptBuilder, max_length: int | None = None):
        super().__init__(samples, builder)
        self.encode = AnswerEncoder(builder, max_length)

    def __getitem__(self, index: int) -> Any:
        return self.encode(super().__getitem__(index))
