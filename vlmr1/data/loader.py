"""Batches from the loader's workers, pickled to bytes, with a UserError passed on as itself.

Tensors shared by workers take a file descriptor and room in /dev/shm each; a rollout buffer holds many. An exception
raised in a worker would arrive with its traceback as message, where a UserError has one line.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, Dataset, get_worker_info

from vlmr1.errors import UserError
from vlmr1.lifecycle.processes import init_worker


@dataclass(frozen=True)
class PickledBatch:
    """A pickled batch of a worker, or the pickled UserError that it raised."""

    data: bytes


class Batches(Dataset[Any]):
    """A data set whose batches are lists of items; in a worker a batch is a list of one PickledBatch."""

    def __init__(self, items: Any):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        if get_worker_info() is None:
            return [self.items[index] for index in indices]
        try:
            return [PickledBatch(pickle.dumps([self.items[index] for index in indices]))]
        except UserError as error:
            return [PickledBatch(pickle.dumps(error))]


def unpacked(batch: Sequence[Any]) -> Sequence[Any]:
    """Return the items of a batch of `Batches`, pickled or not; raise the error of a worker."""
    if len(batch) != 1 or not isinstance(batch[0], PickledBatch):
        return batch
    found = pickle.loads(batch[0].data)
    if isinstance(found, UserError):
        raise found
    return found


def batch_loader(dataset: Any, sampler: BatchSampler, args: Any, accelerator: Any) -> DataLoader:
    """A loader of the batches that `sampler` names, by the dataloader settings of `args`."""
    names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "in_order")
    workers = {name: getattr(args, f"dataloader_{name}") for name in names}
    workers["pin_memory"] &= torch.accelerator.is_available()  # else torch warns
    workers["multiprocessing_context"] = args.dataloader_multiprocessing_context or None
    batches: dict[str, Any] = {"batch_sampler": sampler, "collate_fn": as_list, "worker_init_fn": init_worker}
    loader = DataLoader(Batches(dataset), **batches, **workers)
    config = accelerator.dataloader_config
    return prepare_data_loader(  # not the accelerator's: it would deal out batches that are dealt out already
        loader,
        num_processes=1,
        process_index=0,
        rng_types=accelerator.rng_types,
        use_seedable_sampler=config.use_seedable_sampler,
        data_seed=config.data_seed,
    )


def as_list(items: Any) -> Any:
    """The batch as it is: a collate function."""
    return items
