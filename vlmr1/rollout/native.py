"""The native engine: encodes each image once, prefills each prompt once, and shares its KV cache among branches."""

from __future__ import annotations

import logging
from typing import Any

import torch

from vlmr1.errors import MemoryShort, SettingError
from vlmr1.rollout.decode_state import DecodeState
from vlmr1.rollout.decoder import DecodeForward
from vlmr1.rollout.engine import Request, RolloutEngine, SampledCompletion
from vlmr1.rollout.kv_cache import KVCache, block_bytes, head_dim_of, num_blocks, rounded_up
from vlmr1.rollout.scheduler import Completions, Scheduler
from vlmr1.rollout.settings import COPIES_SHARE, KEPT_SHARE
from vlmr1.types import Prompt
from vlmr1_kernels import registry

logger = logging.getLogger(__name__)
MIB = 2**20
# RoPE types whose frequencies depend on the largest position, which would have to be read from the device.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
NO_MEMORY = "there is no memory for copies of the weights"


class NativeEngine(RolloutEngine):
    """Decodes all sequences together (continuous batching) within a KV cache of fixed size."""

    max_blocks: int | None = None  # size of the KV cache after the last out-of-memory error
    stock_reason: str | None = None  # why decode steps run the stock forward
    state: DecodeState | None = None  # kept from the last generation

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
                forward.release(keep_copies=self.state is not None)  # whose graphs read them

    def prepare_decode(self) -> None:
        """Make the forward of decode steps, or let it read the weights anew; after it has run out of memory twice the
        stock forward runs in all generations."""
        before, reason = self.stock_reason, "fused_layers is torch"
        if self.fused_layers != "torch":
            reason = DecodeForward.supports(self.model, self.family, self.dtype)
        if reason is None and (before == NO_MEMORY or not (self._read_weights() or self._read_weights())):
            reason = NO_MEMORY
        if reason is not None:
            self.decode_forward = None
            if reason != before:
                level = logging.WARNING if reason == NO_MEMORY else logging.INFO
                logger.log(level, "rollout: decode steps run the stock forward: %s", reason)
        self.stock_reason = reason

    def _read_weights(self) -> bool:
        """Return whether there is memory for the copies of weights; if not, free the kept KV cache."""
        try:
            if self.decode_forward is None or self.decode_forward.autocast != self.dtype:
                self.decode_forward = None  # frees its copies
                self.decode_forward = DecodeForward(self.model, self.family, self.dtype)
            else:
                self.decode_forward.refresh()
        except torch.OutOfMemoryError:
            self.state = None
            return False
        return True

    def _sample(self, request: Request) -> list[SampledCompletion]:
        blocks, graphs = self._blocks(request), self._graphs(request)
        done: Completions = {}
        while len(done) < len(request.prompts) * request.num_generations:
            try:
                state = self._take_state(blocks)
                try:
                    Scheduler(self, request, state, done, graphs=graphs).run()
                finally:
                    peak = self._mib(state.cache.allocator.peak_used)
                    self.stats.kv_peak_mib = max(self.stats.kv_peak_mib, peak)
                    kept, state = state, None
            except torch.OutOfMemoryError:
                kept = None
                blocks = self.max_blocks = self._checked(request, blocks // 2)
                self.stats.out_of_memory += 1
                logger.warning("rollout: out of memory, retrying with half the KV cache, %.0f MiB", self._mib(blocks))
            else:
                self._keep(kept)
        return [done[key] for key in sorted(done)]

    def _take_state(self, blocks: int) -> DecodeState:
        """Return the kept state if its KV cache has this many blocks, else a new one.

        The engine has none until `_keep`: a rollout that fails leaves nothing behind."""
        state, self.state = self.state, None
        if state is None or state.cache.allocator.count < blocks or state.cache.data.dtype != self._dtype:
            state = None  # the old cache is freed before a new one is allocated
            state = self.new_state(blocks)
        addresses: tuple[int, ...] = ()
        if self.keeps(state.cache.data.nbytes, self._device_bytes):  # sharded weights have none
            addresses = tuple(each.data_ptr() for each in (*self.model.parameters(), *self.model.buffers()))
            addresses += () if self.decode_forward is None else self.decode_forward.addresses
        state.begin_generation(addresses)
        return state

    def new_state(self, blocks: int) -> DecodeState:
        """Return the state of decode steps with a KV cache of this size."""
        cache = KVCache(self._decoder, blocks, device=self.model.device, dtype=self._dtype)
        return DecodeState(cache, self.suppressed_ids())

    def _keep(self, state: DecodeState) -> None:
        """Keep the state for the next generation where `keeps` says so; graphs only if that one can use them."""
        if self.keeps(state.cache.data.nbytes, self._device_bytes):
            if not self.fixed_addresses:
                state.drop_graphs()
            self.state = state

    def free_cache(self) -> None:
        self.state = None
        if self.decode_forward is not None:
            self.decode_forward.release()

    def keeps(self, cache_bytes: int, device_bytes: int | None) -> bool:
        """Return whether a KV cache of this size is kept between generations; `device_bytes` is None without a GPU."""
        if self.keep_cache is not None:
            return self.keep_cache
        if device_bytes is None or self.cuda_graphs is False or not self.fixed_addresses:
            return False
        copied = 0 if self.decode_forward is None else self.decode_forward.copied_bytes
        return cache_bytes <= KEPT_SHARE * device_bytes and copied <= COPIES_SHARE * device_bytes

    @property
    def fixed_addresses(self) -> bool:
        """Whether the next generation reads weights at the same addresses.

        Autocast copies float32 weights that are trained, and frees the copies after the generation."""
        if self.decode_forward is not None:
            return self.decode_forward.fixed_addresses
        trained = (each for each in self.model.parameters() if each.requires_grad)
        return self.dtype is None or all(each.dtype != torch.float32 for each in trained)

    @property
    def _device_bytes(self) -> int | None:
        if self.model.device.type != "cuda":
            return None
        return torch.cuda.get_device_properties(self.model.device).total_memory

    def _blocks(self, request: Request) -> int:
        """Return the size of the KV cache in blocks: for all groups at once, or what the budget allows."""
        wanted = sum(_worst_case_blocks(prompt, request) for prompt in request.prompts)
        size = block_bytes(self._decoder, self._dtype)
        if self.keeps(wanted * size, self._device_bytes):
            wanted = rounded_up(wanted)
        if self.kv_mib is not None:
            wanted = min(wanted, int(self.kv_mib * MIB) // size)
        elif self.model.device.type == "cuda":
            cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by torch's allocator
            kept = 0 if self.state is None else self.state.cache.data.nbytes
            free = torch.cuda.mem_get_info(self.model.device)[0] + cached + kept
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
