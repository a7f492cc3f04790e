"""The native engine: encodes each image once, prefills each prompt once, and shares its KV cache among branches."""

from __future__ import annotations

import logging
from typing import Any

import torch

from vlmr1.errors import MemoryShort, SettingError
from vlmr1.rollout.decoder import DecodeForward
from vlmr1.rollout.engine import Request, RolloutEngine, SampledCompletion
from vlmr1.rollout.kv_cache import KVCache, block_bytes, head_dim_of, num_blocks
from vlmr1.rollout.scheduler import Completions, Scheduler
from vlmr1.types import Prompt
from vlmr1_kernels import registry

logger = logging.getLogger(__name__)
MIB = 2**20
# RoPE types whose frequencies depend on the largest position, which would have to be read from the device.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class NativeEngine(RolloutEngine):
    """Decodes all sequences together (continuous batching) within a KV cache of fixed size."""

    max_blocks: int | None = None  # size of the KV cache after the last out-of-memory error
    decode_forward: DecodeForward | None = None  # of decode steps; None: the stock forward

    def sample(self, request: Request) -> list[SampledCompletion]:
        self.prepare_decode()
        forward = self.decode_forward
        # A second copy of the weights, autocast's, would serve the prefill alone.
        cached = forward is None or not forward.copies
        options: dict[str, Any] = {"enabled": self.dtype is not None, "cache_enabled": cached}
        try:
            with torch.autocast(self.model.device.type, dtype=self.dtype, **options):
                return self._sample(request)
        finally:
            if forward is not None:
                forward.release(keep_copies=self.cuda_graphs is not False and self.model.device.type == "cuda")

    def prepare_decode(self) -> None:
        """Make the forward of decode steps, or let it read the weights anew."""
        reason = DecodeForward.supports(self.model, self.family, self.dtype)
        if self.fused_layers == "torch" or reason is not None:
            self.decode_forward = None
            logger.info("rollout: decode steps run the stock forward: %s", reason or "fused_layers is torch")
        elif self.decode_forward is None:
            self.decode_forward = DecodeForward(self.model, self.family, self.dtype)
        else:
            self.decode_forward.refresh()

    def _sample(self, request: Request) -> list[SampledCompletion]:
        blocks, graphs = self._blocks(request), self._graphs(request)
        done: Completions = {}
        while len(done) < len(request.prompts) * request.num_generations:
            try:
                cache = KVCache(self._decoder, blocks, device=self.model.device, dtype=self._dtype)
                try:
                    Scheduler(self, request, cache, done, graphs=graphs).run()
                finally:
                    self.stats.kv_peak_mib = max(self.stats.kv_peak_mib, self._mib(cache.allocator.peak_used))
                    del cache
            except torch.OutOfMemoryError:
                blocks = self.max_blocks = self._checked(request, blocks // 2)
                self.stats.out_of_memory += 1
                logger.warning("rollout: out of memory, retrying with half the KV cache, %.0f MiB", self._mib(blocks))
        return [done[key] for key in sorted(done)]

    def _blocks(self, request: Request) -> int:
        """Return the size of the KV cache in blocks: for all groups at once, or what the budget allows."""
        wanted = sum(_worst_case_blocks(prompt, request) for prompt in request.prompts)
        size = block_bytes(self._decoder, self._dtype)
        if self.kv_mib is not None:
            wanted = min(wanted, int(self.kv_mib * MIB) // size)
        elif self.model.device.type == "cuda":
            cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by torch's allocator
            free = torch.cuda.mem_get_info(self.model.device)[0] + cached
            wanted = min(wanted, free // 2 // size)
        if self.max_blocks is not None:
            wanted = min(wanted, self.max_blocks)
        return self._checked(request, wanted)

    def _checked(self, request: Request, blocks: int) -> int:
        """Return `blocks`; MemoryShort if they do not hold the largest group."""
        need = max(_worst_case_blocks(prompt, request) for prompt in request.prompts)
        if blocks < need:
            raise MemoryShort(
                f"rollout_kv_mib: one group needs {self._mib(need):.1f} MiB, there are {self._mib(blocks):.1f}: "
                "lower max_completion_length or num_generations, or raise rollout_kv_mib"
            )
        return blocks

    def _graphs(self, request: Request) -> bool:
        """Return whether to capture decode steps. SettingError if requested but not supported."""
        if self.cuda_graphs is False or (self.cuda_graphs is None and self.model.device.type != "cuda"):
            return False
        reason = self._graphs_unsupported_reason(request)
        if reason is not None and self.cuda_graphs:
            raise SettingError(f"cuda_graphs: {reason}")
        return reason is None

    def _graphs_unsupported_reason(self, request: Request) -> str | None:
        decoder = self._decoder
        kind = str((getattr(decoder, "rope_parameters", None) or {}).get("rope_type", "default"))
        if any(name in kind for name in LENGTH_DEPENDENT_ROPE):
            return f"the decoder's RoPE type {kind} depends on the sequence length"
        heads, kv_heads = decoder.num_attention_heads, decoder.num_key_value_heads
        branches = len(request.prompts) * request.num_generations
        shape = (branches, len(request.prompts), heads, kv_heads, head_dim_of(decoder))
        call = registry.Request(self.model.device, self._dtype, shape)
        name = registry.select("shared_prefix_decode", call).name
        return None if name == "triton" else f"shared_prefix_decode implementation {name} waits for the device"

    def _mib(self, blocks: int) -> float:
        return blocks * block_bytes(self._decoder, self._dtype) / MIB

    @property
    def _decoder(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

    @property
    def _dtype(self) -> torch.dtype:
        return self.dtype or self.model.dtype


def _worst_case_blocks(prompt: Prompt, request: Request) -> int:
    """Worst-case number of KV blocks for one group; the last token of a completion is never cached."""
    suffix = num_blocks(request.settings.max_completion_length - 1)
    return num_blocks(len(prompt.input_ids)) + request.num_generations * suffix
