"""Continuous batching: which groups are decoded, until every completion of a request is finished.

Groups wait until the KV cache has room for them and are admitted as others finish. When the cache is full, keys and
values of the youngest group are moved to host memory, and back when there is room. Random numbers depend on seed, step,
prompt, sequence and token index alone, so that a completion does not depend on what is decoded beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmr1.models.features import encode, unique_images
from vlmr1.rollout.decode_state import DecodeState
from vlmr1.rollout.engine import Request, RolloutEngine, SampledCompletion, StopCriteria
from vlmr1.rollout.graphs import Capacity, DecodeGraph, GraphKey, Step, StepOutput, capture_size
from vlmr1.rollout.kv_cache import BLOCK_SIZE, BlockAllocator, num_blocks, prefill_attention
from vlmr1.rollout.sampling import sample_tokens, uniform
from vlmr1.rollout.sequences import Batch, PreemptedGroup, RunningGroup, RunningSequence, seen_tokens
from vlmr1.types import Prompt
from vlmr1_kernels.linear import gemm_operand, project

# Decode steps between two checks of the stop criteria. On CUDA a check waits for the device; elsewhere it is free.
STEPS_PER_CHECK = {"cuda": 16}
Completions = dict[tuple[int, int], SampledCompletion]  # by (group, sequence)


class Scheduler:
    """Decodes the completions of a request that `done` lacks, within one KV cache, and adds them to `done`."""

    def __init__(
        self, engine: RolloutEngine, request: Request, state: DecodeState, done: Completions, *, graphs: bool = False
    ):
        self.engine, self.request, self.state, self.done = engine, request, state, done
        self.cache = state.cache
        self.model, self.family, self.stats = engine.model, engine.family, engine.stats
        self.settings = request.settings
        self.suppressed_ids = state.suppressed_ids
        self.stop_criteria = StopCriteria(engine.stop_ids(), engine.tokenizer, request.settings.stop)
        generations = range(request.num_generations)
        groups = range(len(request.prompts))
        self.waiting = deque(p for p in groups if any((p, g) not in done for g in generations))
        self.preempted: dict[int, PreemptedGroup] = {}  # by index; they are the first of those that wait
        self.running: list[RunningSequence] = []
        self.batch: Batch | None = None  # of the running sequences; None after they have changed
        self.graph: DecodeGraph | None = None  # that runs the batch
        self.with_graphs = graphs
        self.head = self.family.head(self.model)
        self.vocabulary = len(self.head.weight)
        dtype = engine.dtype or self.head.weight.dtype
        # The policy computes float32 logits from half-precision operands; a half-precision head would round them.
        self.half_weight = state.head_weight(self.head.weight, dtype)
        self.half = dtype
        settings, prompts = request.settings, request.prompts
        seen = None if settings.repetition_penalty == 1 else self.vocabulary
        sampling = replace(settings, max_completion_length=0, seed=0, stop=())  # these are read on the host alone
        self.graph_key = GraphKey(sampling, len(prompts[0].positions), seen, engine.dtype)
        self.limit = Capacity(
            rows=len(prompts) * request.num_generations,
            groups=len(prompts),
            columns=max(1, num_blocks(settings.max_completion_length)),
            max_group=request.num_generations,
            max_prefix=max(len(prompt.input_ids) for prompt in prompts),
        )

    def run(self) -> None:
        """Decode until no group is waiting or running."""
        room = True
        while self.waiting or self.running:
            admitted = self.admit() if room or not self.running else []
            if admitted:
                self.prefill(admitted)
                room = self.retire_finished()
                continue
            steps = self.steps_until_check()
            self.reserve_blocks(steps)
            self.decode(steps)
            room = self.retire_finished()

    # Admission, preemption, retirement

    def admit(self) -> list[RunningGroup]:
        """Admit waiting groups while the cache has room for their prompts and for completions of average length.

        Return those to prefill; preempted groups go on where they were."""
        size, limit = self.request.num_generations, self.settings.max_completion_length
        lengths = [len(completion.tokens) for completion in self.done.values()]
        average = sum(lengths) / len(lengths) if lengths else limit
        most = num_blocks(limit - 1)
        expected = min(num_blocks(int(average)) + 1, most)  # blocks of a completion
        allocator = self.cache.allocator
        promised = 0
        admitted: list[RunningGroup] = []
        while self.waiting:
            index = self.waiting[0]
            prompt = self.request.prompts[index]
            preempted = self.preempted.get(index)
            used = [0] * size if preempted is None else preempted.blocks
            suffixes = sum(expected if preempted is None else min(max(expected, each + 1), most) for each in used)
            count = num_blocks(len(prompt.input_ids))
            block = allocator.allocate_run(count) if allocator.num_free - promised >= count + suffixes else None
            if block is None:
                break
            self.waiting.popleft()
            if preempted is None:
                unfinished = sum((index, g) not in self.done for g in range(size))
                admitted.append(RunningGroup(index, prompt, block, unfinished))
            else:
                self.resume(preempted, block)
            promised += suffixes - sum(used)
        return admitted

    def preempt(self) -> None:
        """Move keys and values of the youngest group to host memory, and let it wait."""
        group = self.running[-1].group
        sequences = [sequence for sequence in self.running if sequence.group is group]
        blocks = group.blocks()
        for sequence in sequences:
            blocks += sequence.blocks[: num_blocks(sequence.cached)]
        self.preempted[group.index] = PreemptedGroup(group, sequences, self.cache.read_blocks(blocks))
        for sequence in sequences:
            self.free_blocks(sequence)
        self.running = self.running[: -len(sequences)]
        self.waiting.appendleft(group.index)
        self.stats.preemptions += 1
        self.batch = None

    def resume(self, preempted: PreemptedGroup, first_block: int) -> None:
        """Decode a preempted group further; its prompt is to be in the blocks from `first_block` on."""
        group, allocator = preempted.group, self.cache.allocator
        group.first_block, group.unfinished = first_block, len(preempted.sequences)
        blocks = group.blocks()
        for sequence, count in zip(preempted.sequences, preempted.blocks, strict=True):
            allocate_blocks(sequence, count, allocator)
            blocks += sequence.blocks
        self.cache.write_blocks(blocks, preempted.stored)
        del self.preempted[group.index]
        self.running += preempted.sequences
        self.batch = None

    def retire_finished(self) -> bool:
        """Move finished sequences to `done` and free their blocks; return whether there were any."""
        before = len(self.running)
        running: list[RunningSequence] = []
        for sequence in self.running:
            completion = self.finished(sequence)
            if completion is None:
                running.append(sequence)
            else:
                self.done[sequence.group.index, sequence.index] = completion
                self.free_blocks(sequence)
        self.running = running
        if len(running) < before:
            self.batch = None
        return len(running) < before

    def finished(self, sequence: RunningSequence) -> SampledCompletion | None:
        """Return the completion, cut after its stop token or text, or None if it is not finished."""
        end = self.stop_criteria.find_end(sequence.tokens, sequence.checked)
        if end is not None:
            return sequence.completion(end, "stop")
        sequence.checked = len(sequence.tokens)
        limit = self.settings.max_completion_length
        return sequence.completion(limit, "length") if sequence.checked >= limit else None

    def reserve_blocks(self, steps: int) -> None:
        """Allocate the blocks of the next `steps` steps; preempt the youngest groups if there are too few."""
        allocator = self.cache.allocator
        while sum(sequence.missing_blocks(steps) for sequence in self.running) > allocator.num_free:
            self.preempt()
        before = allocator.num_free
        for sequence in self.running:
            allocate_blocks(sequence, sequence.missing_blocks(steps), allocator)
        if allocator.num_free < before and self.batch is not None:
            self.batch.update_block_table()

    def free_blocks(self, sequence: RunningSequence) -> None:
        """Free the blocks of a sequence, and of its prompt after the last sequence of the group."""
        for block in sequence.blocks:
            self.cache.allocator.free(block)
        sequence.blocks = []
        group = sequence.group
        group.unfinished -= 1
        if not group.unfinished:
            self.cache.allocator.free(group.first_block, num_blocks(group.prompt_length))

    def steps_until_check(self) -> int:
        """Return the decode steps until the next check; no sequence exceeds the maximum length in between."""
        left = min(self.settings.max_completion_length - len(sequence.tokens) for sequence in self.running)
        return min(left, STEPS_PER_CHECK.get(self.model.device.type, 1))

    # Forward passes

    def prefill(self, groups: Sequence[RunningGroup]) -> None:
        """Compute the prompts of `groups` in one packed row and sample the first token of each sequence."""
        clock = perf_counter()
        prompts = [group.prompt for group in groups]
        logits = self.prompt_logits(prompts, [group.first_block * BLOCK_SIZE for group in groups])  # [P, V]
        size = self.request.num_generations
        sequences = [RunningSequence(p, g) for p in groups for g in range(size) if (p.index, g) not in self.done]
        counts = torch.tensor([group.unfinished for group in groups], device=logits.device)
        prompt_keys = np.array([sequence.group.prompt.sample.index for sequence in sequences])
        draws = self.draws(prompt_keys, np.array([sequence.index for sequence in sequences]), 0)
        seen = None
        if self.settings.repetition_penalty != 1:
            seen = torch.from_numpy(seen_tokens(sequences, self.vocabulary)).to(logits.device)
        logits = logits.repeat_interleave(counts, 0)  # [S, V]
        append_tokens(sequences, [sample_tokens(logits, self.suppressed_ids, self.settings, draws, seen)])
        self.running += sequences
        self.batch = None
        self.stats.prefill_seconds += perf_counter() - clock

    def prompt_logits(self, prompts: Sequence[Prompt], starts: list[int]) -> Tensor:
        """Return the logits [P, V] of the first tokens; write keys and values to the cache rows `starts` on."""
        device = self.model.device
        lengths = [len(prompt.input_ids) for prompt in prompts]
        images, refs, image_ids = unique_images(prompts)
        with self.family.attention(self.model):
            features = encode(self.family, self.model, refs, images, self.engine.features)
            hidden = self.family.hidden(
                self.model,
                torch.cat([prompt.input_ids for prompt in prompts])[None].to(device),
                torch.cat([prompt.positions for prompt in prompts], dim=1)[:, None].to(device),
                [features[i] for i in image_ids],
                shared=prefill_attention(self.cache, lengths, starts),
            )
        return self.logits(hidden[0, torch.tensor(lengths).cumsum(0) - 1])

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V]; float32 for half-precision weights, as in the policy."""
        if self.half_weight is None:
            return self.head(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return project(gemm_operand(hidden.to(self.half)), self.half_weight, self.head.bias, 1.0)

    def decode(self, steps: int) -> None:
        """Decode the next `steps` tokens of all running sequences."""
        clock = perf_counter()
        batch, step = self.batch_and_step()
        indices = batch.token_indices + np.arange(steps)[:, None]  # [steps, S]
        draws = self.draws(batch.prompt_keys, batch.sequence_keys, indices)
        outputs = [step(batch, row) for row in draws]
        batch.token_indices += steps
        append_tokens(batch.sequences, outputs)
        self.stats.decode_seconds += perf_counter() - clock

    def batch_and_step(self) -> tuple[Batch, Step]:
        """Return the batch of the running sequences and its step function, a CUDA graph if enabled."""
        if self.batch is None:
            needed = replace(self.limit, rows=len(self.running), groups=len({id(each.group) for each in self.running}))
            self.graph = self.graph_for(needed) if self.with_graphs else None
            self.batch = self.new_batch(needed) if self.graph is None else self.graph.batch
            self.batch.fill(self.running)
        return self.batch, self.step if self.graph is None else self.graph

    def graph_for(self, needed: Capacity) -> DecodeGraph | None:
        """Return a graph that holds a batch of this size, or None; sizes that vary between generations are rounded
        up, so that later ones need no other graph."""
        limit = replace(
            self.limit,
            groups=capture_size(self.limit.groups),
            max_prefix=1 << (self.limit.max_prefix - 1).bit_length(),
        )
        longest = self.settings.max_completion_length - min(len(sequence.tokens) for sequence in self.running)
        steps_left = 0 if self.waiting else longest
        return self.state.graph(self.graph_key, needed, limit, self.capture, steps_left=steps_left)

    def padded(self, rows: int) -> int:
        """Return the rows of the batch that this many sequences are decoded in, if a graph is captured for them."""
        return capture_size(rows) if self.with_graphs else rows

    def new_batch(self, capacity: Capacity) -> Batch:
        """Return an empty batch of this capacity."""
        key = self.graph_key
        return Batch(self.cache, **asdict(capacity), position_dims=key.position_dims, vocabulary=key.vocabulary)

    def capture(self, capacity: Capacity, pool: Any) -> DecodeGraph:
        """Return a graph of the step on a batch of this capacity."""
        batch = self.new_batch(capacity)
        batch.fill(self.running)
        self.stats.captures += 1
        return DecodeGraph(self.step, batch, capacity, pool)

    def step(self, batch: Batch, draws: Tensor) -> StepOutput:
        """Sample the next token of each sequence with `draws` [S] and advance the batch."""
        batch.attention.begin_step()
        logits = self.logits(self.hidden(batch))  # [S, V]
        batch.attention.end_step()
        output = sample_tokens(logits, self.suppressed_ids, self.settings, draws, batch.seen)
        batch.advance(output[0])
        return output

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states [S, D] of a decode step."""
        forward = self.engine.decode_forward
        if forward is not None:
            return forward.hidden(batch)
        positions = batch.positions.expand(batch.position_dims, -1)[..., None]  # [K, S, 1]
        return self.family.hidden(self.model, batch.tokens[:, None], positions, [], shared=batch.attention)[:, 0]

    def draws(self, prompt_keys: np.ndarray, sequence_keys: np.ndarray, indices: np.ndarray | int) -> Tensor:
        """Return uniform float64 in [0, 1): [S], or [steps, S] for `indices` [steps, S]."""
        numbers = uniform(self.settings.seed, self.request.step, prompt_keys, sequence_keys, indices)
        return torch.from_numpy(numbers).to(self.model.device)


def allocate_blocks(sequence: RunningSequence, count: int, allocator: BlockAllocator) -> None:
    """Give `count` more blocks to a sequence; there are as many."""
    for _ in range(count):
        block = allocator.allocate()
        assert block is not None
        sequence.blocks.append(block)


def append_tokens(sequences: Sequence[RunningSequence], outputs: Sequence[StepOutput]) -> None:
    """Append the tokens and log-probs of one or more steps to their sequences; padding rows come last and are dropped.

    Waits for the device: the stop criteria need the tokens on the host."""
    tokens, logp, sampling_logp = (torch.stack(each, 1).tolist() for each in zip(*outputs, strict=True))  # [S, steps]
    for sequence, *rows in zip(sequences, tokens, logp, sampling_logp, strict=False):
        for values, row in zip((sequence.tokens, sequence.logp, sequence.sampling_logp), rows, strict=True):
            values.extend(row)
