"""Rows of supervised fine-tuning as samples whose solutions are the answers, made when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import SequentialSampler

from vlmr1.api.rows import StreamRows, rows_of
from vlmr1.api.sft_config import SFTConfig
from vlmr1.data.faults import row_fault
from vlmr1.data.folder import ImageFolder
from vlmr1.data.formats import Columns
from vlmr1.data.messages import QUESTION, short
from vlmr1.data.rows import Row, Rows
from vlmr1.data.samples import OnFault, Samples
from vlmr1.sft.rows import check_answer
from vlmr1.types import Sample

CHATS = ("messages", "conversations")


class AnswerSamples(Samples):
    """Rows in the formats of TRL: `prompt` and `completion`, or `messages`; `image` or `images`. Other formats of data
    files are read too."""

    def __init__(self, rows: Rows, columns: Columns, assistant_only: bool):
        super().__init__([(rows, ImageFolder(Path()))], QUESTION, columns)
        self.assistant_only = assistant_only

    def _sample(self, row: Row, source: str, index: int, folder: ImageFolder, on_fault: OnFault) -> Sample:
        if isinstance(row.get("prompt"), str):
            what = "the prompt is text, and a chat model is trained"
            raise row_fault(source, "prompt", f'{what}: give a list of messages, [{{"role": "user", "content": ...}}]')
        chat = next((name for name in CHATS if row.get(name) is not None), None)
        if chat is not None and not self.assistant_only:
            what = f"{chat}: TRL trains on all of their tokens with assistant_only_loss=False, and here only the answer"
            raise row_fault(source, "assistant_only_loss", f"{what} is trained on: set assistant_only_loss=True")
        sample = super()._sample(row, source, index, folder, on_fault)
        if self.assistant_only and any(each["role"] == "assistant" for each in sample.messages):
            what = "assistant_only_loss trains on every turn of the assistant, and here on the last one alone"
            raise row_fault(source, "assistant_only_loss", f"{what}: give each turn a row; this one is {short(row)}")
        for each in sample.each_solution():
            check_answer(each)
        return sample


class StreamedAnswers(AnswerSamples):
    """Rows that come in an order of their own."""

    def sampler(self, seed: int, buffer_size: int) -> SequentialSampler:
        return SequentialSampler(self)


def samples_of(data: Any, name: str, args: SFTConfig, needed: int | None = None) -> AnswerSamples:
    """Return the samples of a data set, a list of rows or a stream, of which `needed` rows are read. The first row is
    checked."""
    columns = Columns(images_outside=True, answers=args.answer_columns)
    rows = rows_of(data, name, needed)
    kind = StreamedAnswers if isinstance(rows, StreamRows) else AnswerSamples
    samples = kind(rows, columns, args.assistant_only_loss)
    samples[0]
    return samples
