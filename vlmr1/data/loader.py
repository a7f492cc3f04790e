"""Batches from the loader's workers: they come through its pipe as bytes, and a fault of a row as what it is.

Tensors that workers share take a file descriptor each while they live, and room in /dev/shm; a rollout buffer holds
many. An exception that a worker raises comes with its traceback as message; the user's mistakes are one line.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from vlmr1.errors import UserError
from vlmr1.types import Prompt


@dataclass(frozen=True)
class Parcel:
    """A batch that a worker made, or the UserError that it met, pickled."""

    data: bytes


class Batches(Dataset[Prompt]):
    """A data set whose batches are lists of its items; in a worker lists of one Parcel."""

    def __init__(self, items: Any):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Prompt:
        return self.items[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        if get_worker_info() is None:
            return [self.items[index] for index in indices]
        try:
            return [Parcel(pickle.dumps([self.items[index] for index in indices]))]
        except UserError as error:
            return [Parcel(pickle.dumps(error))]


def unpacked(batch: Sequence[Any]) -> Sequence[Prompt]:
    """The items of a batch of `Batches`, wherever it was made; raises the error that a worker met."""
    if len(batch) != 1 or not isinstance(batch[0], Parcel):
        return batch
    found = pickle.loads(batch[0].data)
    if isinstance(found, UserError):
        raise found
    return found
