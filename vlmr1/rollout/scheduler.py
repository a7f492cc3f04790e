"""Continuous batching: which groups are decoded, until every completion of a request is finished.

Groups wait until the KV cache has room for them and are admitted as others finish. When the cache is full, the youngest
group is preempted and decoded again later. It samples the same tokens again, since random numbers depend on seed, step,
prompt, sequence and token index alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from vlmr1.models.features import encode, unique_images
from vlmr1.rollout.engine import Request, RolloutEngine, SampledCompletion, StopCriteria
from vlmr1.rollout.graphs import DecodeGraph, Step, StepOutput, capture_size
from vlmr1.rollout.kv_cache import BLOCK_SIZE, KVCache, num_blocks, prefill_attention
from vlmr1.rollout.sampling import sample_tokens, uniform
from vlmr1.rollout.sequences import Batch, RunningGroup, RunningSequence, seen_tokens
from vlmr1.types import Prompt
from vlmr1_kernels.linear import gemm_operand, project

# Decode steps between two checks of the stop criteria. On CUDA a check waits for the device; elsewhere it is free.
STEPS_PER_CHECK = {"cuda": 16}
Completions = dict[tuple[int, int], SampledCompletion]  # by (group, sequence)


class Scheduler:
    """Decodes the completions of a request that `done` lacks, within one KV cache, and adds them to `done`."""

    def __init__(
        self, engine: RolloutEngine, request: Request, cache: KVCache, done: Completions, *, graphs: bool = False
    ):
        self.engine, self.request, self.cache, self.done = engine, request, cache, done
        self.model, self.family, self.stats = engine.model, engine.family, engine.stats
        self.settings = request.settings
        self.suppressed_ids = engine.suppressed_ids()
        self.stop_criteria = StopCriteria(engine.stop_ids(), engine.tokenizer, request.settings.stop)
        generations = range(request.num_generations)
        groups = range(len(request.prompts))
        self.waiting = deque(p for p in groups if any((p, g) not in done for g in generations))
        self.running: list[RunningSequence] = []
        self.batch: Batch | None = None  # of the running sequences; None after they have changed
        self.with_graphs = graphs
        self.graphs: dict[int, DecodeGraph] = {}  # by rows
        self.head = self.family.head(self.model)
        self.vocabulary = len(self.head.weight)
        dtype = engine.dtype or self.head.weight.dtype
        # The policy computes float32 logits from half-precision operands; a half-precision head would round them.
        self.half_weight = gemm_operand(self.head.weight.to(dtype)) if dtype.itemsize < 4 else None
        self.half = dtype

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
        """Admit waiting groups while the cache has room for their prompts and for completions of average length."""
        size, limit = self.request.num_generations, self.settings.max_completion_length
        lengths = [len(completion.tokens) for completion in self.done.values()]
        average = sum(lengths) / len(lengths) if lengths else limit
        suffixes = min(num_blocks(int(average)) + 1, num_blocks(limit - 1)) * size  # expected blocks
        allocator = self.cache.allocator
        promised = 0
        admitted: list[RunningGroup] = []
        while self.waiting:
            index = self.waiting[0]
            prompt = self.request.prompts[index]
            count = num_blocks(len(prompt.input_ids))
            block = allocator.allocate_run(count) if allocator.num_free - promised >= count + suffixes else None
            if block is None:
                break
            self.waiting.popleft()
            unfinished = sum((index, g) not in self.done for g in range(size))
            admitted.append(RunningGroup(index, prompt, block, unfinished))
            promised += suffixes
        return admitted

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
            youngest = self.running[-1].group
            for sequence in [s for s in self.running if s.group is youngest]:
                self.running.remove(sequence)
                self.free_blocks(sequence)
            self.waiting.appendleft(youngest.index)
            self.stats.preemptions += 1
            self.batch = None
        changed = False
        for sequence in self.running:
            for _ in range(sequence.missing_blocks(steps)):
                block = allocator.allocate()
                assert block is not None
                sequence.blocks.append(block)
                changed = True
        if changed and self.batch is not None:
            self.batch.update_block_table()

    def free_blocks(self, sequence: RunningSequence) -> None:
        """Free the blocks of a sequence, and of its prompt after the last sequence of the group."""
        for block in sequence.blocks:
            self.cache.allocator.free(block)
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
        if not self.with_graphs:
            if self.batch is None:
                groups = len({id(sequence.group) for sequence in self.running})
                self.batch = self.new_batch(len(self.running), groups)
                self.batch.fill(self.running)
            return self.batch, self.step
        rows = capture_size(len(self.running))
        graph = self.graphs.get(rows)
        if self.batch is None or graph is None:
            groups = min(rows, len(self.request.prompts))
            self.batch = self.new_batch(rows, groups) if graph is None else graph.batch
            self.batch.fill(self.running)
        if graph is None:
            first = next(iter(self.graphs.values()), None)
            graph = self.graphs[rows] = DecodeGraph(self.step, self.batch, None if first is None else first.pool)
        return self.batch, graph

    def new_batch(self, rows: int, groups: int) -> Batch:
        """Return an empty batch of up to `rows` sequences in `groups` groups."""
        prompts = self.request.prompts
        return Batch(
            self.cache,
            rows=rows,
            groups=groups,
            columns=max(1, num_blocks(self.settings.max_completion_length)),
            position_dims=len(prompts[0].positions),
            max_group=self.request.num_generations,
            max_prefix=max(len(prompt.input_ids) for prompt in prompts),
            vocabulary=None if self.settings.repetition_penalty == 1 else self.vocabulary,
        )

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
        forward = getattr(self.engine, "decode_forward", None)
        if forward is not None:
            return forward.hidden(batch)
        positions = batch.positions.expand(batch.position_dims, -1)[..., None]  # [K, S, 1]
        return self.family.hidden(self.model, batch.tokens[:, None], positions, [], shared=batch.attention)[:, 0]

    def draws(self, prompt_keys: np.ndarray, sequence_keys: np.ndarray, indices: np.ndarray | int) -> Tensor:
        """Return uniform float64 in [0, 1): [S], or [steps, S] for `indices` [steps, S]."""
        numbers = uniform(self.settings.seed, self.request.step, prompt_keys, sequence_keys, indices)
        return torch.from_numpy(numbers).to(self.model.device)


def append_tokens(sequences: Sequence[RunningSequence], outputs: Sequence[StepOutput]) -> None:
    """Append the tokens and log-probs of one or more steps to their sequences; padding rows come last and are dropped.

    Waits for the device: the stop criteria need the tokens on the host."""
    tokens, logp, sampling_logp = (torch.stack(each, 1).tolist() for each in zip(*outputs, strict=True))  # [S, steps]
    for sequence, *rows in zip(sequences, tokens, logp, sampling_logp, strict=False):
        for values, row in zip((sequence.tokens, sequence.logp, sequence.sampling_logp), rows, strict=True):
            values.extend(row)
