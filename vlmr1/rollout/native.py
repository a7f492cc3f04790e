"""The native engine: images encoded once, prompts prefilled once, their keys and values read by all branches."""

from __future__ import annotations

import logging
from typing import Any

import torch

from vlmr1.errors import MemoryShort, SettingError
from vlmr1.rollout.engine import Drawn, Request, RolloutEngine
from vlmr1.rollout.kv_cache import Pool, block_bytes, blocks_of, head_dim_of
from vlmr1.rollout.scheduler import Done, Schedule
from vlmr1.types import Prompt
from vlmr1_kernels import registry

logger = logging.getLogger(__name__)
MIB = 2**20
# Their frequencies follow the longest position: looking at it would wait for the device.
MOVING_ROPE = ("dynamic", "longrope")


class NativeEngine(RolloutEngine):
    """Decodes all branches in flight together, within a budget of keys and values."""

    most_blocks: int | None = None  # what was left of the budget when memory last ran out

    def draw(self, request: Request) -> list[Drawn]:
        blocks, graphs = self._blocks(request), self._graphs(request)
        done: Done = {}
        while len(done) < len(request.prompts) * request.num_generations:
            try:
                pool = Pool(self._decoder, blocks, device=self.model.device, dtype=self._dtype)
                try:
                    Schedule(self, request, pool, done, graphs=graphs).run()
                finally:
                    self.stats.kv_peak_mib = max(self.stats.kv_peak_mib, self._mib(pool.blocks.most))
                    del pool
            except torch.OutOfMemoryError:
                blocks = self.most_blocks = self._checked(request, blocks // 2)
                self.stats.out_of_memory += 1
                logger.warning("rollout: out of memory; it goes on with half the KV cache, %.0f MiB", self._mib(blocks))
        return [done[key] for key in sorted(done)]

    def _blocks(self, request: Request) -> int:
        """Of the pool: for all groups at once, or what the budget allows."""
        wanted = sum(_blocks_of(prompt, request) for prompt in request.prompts)
        each = block_bytes(self._decoder, self._dtype)
        if self.kv_mib is not None:
            wanted = min(wanted, int(self.kv_mib * MIB) // each)
        elif self.model.device.type == "cuda":
            held_back = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            free = torch.cuda.mem_get_info(self.model.device)[0] + held_back
            wanted = min(wanted, free // 2 // each)
        if self.most_blocks is not None:
            wanted = min(wanted, self.most_blocks)
        return self._checked(request, wanted)

    def _checked(self, request: Request, blocks: int) -> int:
        """These blocks, if the largest group alone fits in them."""
        need = max(_blocks_of(prompt, request) for prompt in request.prompts)
        if blocks < need:
            raise MemoryShort(
                f"rollout_kv_mib: one group needs {self._mib(need):.1f} MiB of keys and values, there are "
                f"{self._mib(blocks):.1f}: lower max_completion_length or num_generations, or raise the budget"
            )
        return blocks

    def _graphs(self, request: Request) -> bool:
        """Whether decode steps are CUDA graphs. SettingError where they are asked for and cannot be."""
        if self.cuda_graphs is False or (self.cuda_graphs is None and self.model.device.type != "cuda"):
            return False
        reason = self._no_graphs(request)
        if reason is not None and self.cuda_graphs:
            raise SettingError(f"cuda_graphs: {reason}")
        return reason is None

    def _no_graphs(self, request: Request) -> str | None:
        decoder = self._decoder
        kind = str((getattr(decoder, "rope_parameters", None) or {}).get("rope_type", "default"))
        if any(name in kind for name in MOVING_ROPE):
            return f"the decoder's rotary positions are of type {kind}, which follows the length"
        heads, kv_heads = decoder.num_attention_heads, decoder.num_key_value_heads
        branches = len(request.prompts) * request.num_generations
        shape = (branches, len(request.prompts), heads, kv_heads, head_dim_of(decoder))
        call = registry.Request(self.model.device, self._dtype, shape)
        name = registry.chosen("shared_prefix_decode", call).name
        return None if name == "triton" else f"shared_prefix_decode runs as {name}, which waits for the device"

    def _mib(self, blocks: int) -> float:
        return blocks * block_bytes(self._decoder, self._dtype) / MIB

    @property
    def _decoder(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

    @property
    def _dtype(self) -> torch.dtype:
        return self.dtype or self.model.dtype


def _blocks_of(prompt: Prompt, request: Request) -> int:
    """Of one group, however long its completions get; the last token of one is never cached."""
    own = blocks_of(request.settings.max_completion_length - 1)
    return blocks_of(len(prompt.input_ids)) + request.num_generations * own
