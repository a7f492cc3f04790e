"""The native engine: images encoded once, prompts prefilled once, their keys and values read by all branches."""

from __future__ import annotations

import logging

import torch

from vlmr1.errors import SettingError
from vlmr1.rollout.engine import Drawn, Request, RolloutEngine
from vlmr1.rollout.kv import Pool, block_bytes, blocks_of
from vlmr1.rollout.schedule import Done, Schedule
from vlmr1.types import Prompt

logger = logging.getLogger(__name__)
MIB = 2**20


class NativeEngine(RolloutEngine):
    """Decodes all branches in flight together, within a budget of keys and values."""

    def draw(self, request: Request) -> list[Drawn]:
        blocks = self._blocks(request)
        done: Done = {}
        while len(done) < len(request.prompts) * request.num_generations:
            pool = Pool(self._decoder, blocks, device=self.model.device, dtype=self._dtype)
            try:
                Schedule(self, request, pool, done).run()
            except torch.OutOfMemoryError:
                blocks = self._checked(request, blocks // 2)
                self.stats.out_of_memory += 1
                logger.warning("rollout: out of memory; it goes on with half the KV cache, %.0f MiB", self._mib(blocks))
            self.stats.kv_peak_mib = max(self.stats.kv_peak_mib, self._mib(pool.blocks.most))
            del pool
        return [done[key] for key in sorted(done)]

    def _blocks(self, request: Request) -> int:
        """Of the pool: for all groups at once, or what the budget allows."""
        wanted = sum(_blocks_of(prompt, request) for prompt in request.prompts)
        each = block_bytes(self._decoder, self._dtype)
        if self.kv_mib is not None:
            wanted = min(wanted, int(self.kv_mib * MIB) // each)
        elif self.model.device.type == "cuda":
            wanted = min(wanted, torch.cuda.mem_get_info(self.model.device)[0] // 2 // each)
        return self._checked(request, wanted)

    def _checked(self, request: Request, blocks: int) -> int:
        """These blocks, if the largest group alone fits in them."""
        need = max(_blocks_of(prompt, request) for prompt in request.prompts)
        if blocks < need:
            raise SettingError(
                f"rollout_kv_mib: one group needs {self._mib(need):.1f} MiB of keys and values, there are "
                f"{self._mib(blocks):.1f}: lower max_completion_length or num_generations, or raise the budget"
            )
        return blocks

    def _mib(self, blocks: int) -> float:
        return blocks * block_bytes(self._decoder, self._dtype) / MIB

    @property
    def _decoder(self) -> object:
        return self.model.config.get_text_config(decoder=True)

    @property
    def _dtype(self) -> torch.dtype:
        return self.dtype or self.model.dtype


def _blocks_of(prompt: Prompt, request: Request) -> int:
    """Of one group, however long its completions get; the last token of one is never cached."""
    own = blocks_of(request.settings.max_completion_length - 1)
    return blocks_of(len(prompt.input_ids)) + request.num_generations * own
