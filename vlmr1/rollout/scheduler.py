"""Which groups are in flight, until every completion of a request is drawn.

Groups wait until the pool has room for them; when branches end, the next ones take their place. Where the pool is full
in the middle of completions, the youngest group goes back to the queue: it draws the same again, since random numbers
depend on seed, step, prompt, branch and position alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from vlmr1.models.features import encode, unique_images
from vlmr1.rollout.engine import Drawn, Request, RolloutEngine, Stops
from vlmr1.rollout.graphs import Columns, Graph, Step, rung
from vlmr1.rollout.kv_cache import BLOCK, Pool, blocks_of, prefill_attention
from vlmr1.rollout.sampling import choose, uniform
from vlmr1.rollout.sequences import Batch, Branch, Flight, seen
from vlmr1.types import Prompt
from vlmr1_kernels.linear import operand, project

STEPS_PER_LOOK = {"cuda": 16}  # steps between two looks at what has ended; where a look costs nothing, one
Done = dict[tuple[int, int], Drawn]  # by group and branch


class Schedule:
    """Draws what `done` lacks of a request, within one pool."""

    def __init__(self, engine: RolloutEngine, request: Request, pool: Pool, done: Done, *, graphs: bool = False):
        self.engine, self.request, self.pool, self.done = engine, request, pool, done
        self.model, self.family, self.stats = engine.model, engine.family, engine.stats
        self.settings = request.settings
        self.banned = engine.banned()
        self.stops = Stops(engine.model, engine.tokenizer, request.settings.stop)
        branches = range(request.num_generations)
        groups = range(len(request.prompts))
        self.queue = deque(p for p in groups if any((p, g) not in done for g in branches))
        self.live: list[Branch] = []
        self.batch: Batch | None = None
        self.with_graphs = graphs
        self.graphs: dict[int, Graph] = {}  # by rows
        self.head = self.family.head(self.model)
        self.vocabulary = len(self.head.weight)
        dtype = engine.dtype or self.head.weight.dtype
        # Half-precision logits would be rounded before the softmax, and the policy's are not.
        self.half_weight = operand(self.head.weight.to(dtype)) if dtype.itemsize < 4 else None
        self.half = dtype

    def run(self) -> None:
        room = True
        while self.queue or self.live:
            admitted = self.admit() if room or not self.live else []
            if admitted:
                self.prefill(admitted)
                room = self.settle()
                continue
            steps = self.steps()
            self.grow(steps)
            self.decode(steps)
            room = self.settle()

    # Groups come and go

    def admit(self) -> list[Flight]:
        """The next groups, as far as there is room for their prompts and for completions of the usual length."""
        size, limit = self.request.num_generations, self.settings.max_completion_length
        lengths = [len(drawn.tokens) for drawn in self.done.values()]
        usual = sum(lengths) / len(lengths) if lengths else limit
        own = min(blocks_of(int(usual)) + 1, blocks_of(limit - 1)) * size
        promised = 0
        admitted: list[Flight] = []
        while self.queue:
            index = self.queue[0]
            prompt = self.request.prompts[index]
            count = blocks_of(len(prompt.input_ids))
            block = self.pool.blocks.run(count) if self.pool.blocks.left - promised >= count + own else None
            if block is None:
                break
            self.queue.popleft()
            left = sum((index, g) not in self.done for g in range(size))
            admitted.append(Flight(index, prompt, block, left))
            promised += own
        return admitted

    def settle(self) -> bool:
        """Take out the branches that have ended, and free what they held; True where there are some."""
        before = len(self.live)
        going: list[Branch] = []
        for branch in self.live:
            drawn = self.ended(branch)
            if drawn is None:
                going.append(branch)
            else:
                self.done[branch.flight.index, branch.index] = drawn
                self.release(branch)
        self.live = going
        if len(going) < before:
            self.batch = None
        return len(going) < before

    def ended(self, branch: Branch) -> Drawn | None:
        """The completion, cut after what ended it, or None where nothing has."""
        end = self.stops.end(branch.tokens, branch.looked)
        if end is not None:
            return branch.drawn(end, "stop")
        branch.looked = len(branch.tokens)
        limit = self.settings.max_completion_length
        return branch.drawn(limit, "length") if branch.looked >= limit else None

    def grow(self, steps: int) -> None:
        """Blocks for the next steps; the youngest groups go back where there are not enough."""
        while sum(branch.lacks(steps) for branch in self.live) > self.pool.blocks.left:
            youngest = self.live[-1].flight
            for branch in [b for b in self.live if b.flight is youngest]:
                self.live.remove(branch)
                self.release(branch)
            self.queue.appendleft(youngest.index)
            self.stats.sent_back += 1
            self.batch = None
        new = False
        for branch in self.live:
            for _ in range(branch.lacks(steps)):
                block = self.pool.blocks.one()
                assert block is not None
                branch.blocks.append(block)
                new = True
        if new and self.batch is not None:
            self.batch.show_blocks()

    def release(self, branch: Branch) -> None:
        for block in branch.blocks:
            self.pool.blocks.give(block)
        flight = branch.flight
        flight.left -= 1
        if not flight.left:
            self.pool.blocks.give(flight.block, blocks_of(flight.length))

    def steps(self) -> int:
        """Steps until the next look; no branch grows beyond the limit in between."""
        left = min(self.settings.max_completion_length - len(branch.tokens) for branch in self.live)
        return min(left, STEPS_PER_LOOK.get(self.model.device.type, 1))

    # Tokens

    def prefill(self, flights: Sequence[Flight]) -> None:
        """The prompts of these groups in one row, and the first token of each of their branches."""
        clock = perf_counter()
        prompts = [flight.prompt for flight in flights]
        logits = self.prompt_logits(prompts, [flight.block * BLOCK for flight in flights])  # [P, V]
        size = self.request.num_generations
        branches = [Branch(f, g) for f in flights for g in range(size) if (f.index, g) not in self.done]
        counts = torch.tensor([flight.left for flight in flights], device=logits.device)
        prompt_keys = np.array([branch.flight.prompt.sample.index for branch in branches])
        draws = self.draws(prompt_keys, np.array([branch.index for branch in branches]), 0)
        known = None
        if self.settings.repetition_penalty != 1:
            known = torch.from_numpy(seen(branches, self.vocabulary)).to(logits.device)
        logits = logits.repeat_interleave(counts, 0)  # [S, V]
        record(branches, [choose(logits, self.banned, self.settings, draws, known)])
        self.live += branches
        self.batch = None
        self.stats.prefill_seconds += perf_counter() - clock

    def prompt_logits(self, prompts: Sequence[Prompt], starts: list[int]) -> Tensor:
        """[P, V] logits of the first tokens; keys and values go to the pool, from these rows on."""
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
            shared=prefill_attention(self.pool, lengths, starts),
        )
        return self.logits(hidden[0, torch.tensor(lengths).cumsum(0) - 1])

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V]; float32 from half-precision weights, as the policy's."""
        if self.half_weight is None:
            return self.head(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return project(operand(hidden.to(self.half)), self.half_weight, self.head.bias, 1.0)

    def decode(self, steps: int) -> None:
        """The next `steps` tokens of all branches."""
        clock = perf_counter()
        batch, step = self.prepared()
        places = batch.places + np.arange(steps)[:, None]  # [steps, S]
        draws = self.draws(batch.prompt_keys, batch.branch_keys, places)
        columns = [step(batch, row) for row in draws]
        batch.places += steps
        record(batch.branches, columns)
        self.stats.decode_seconds += perf_counter() - clock

    def prepared(self) -> tuple[Batch, Step]:
        """The batch of the branches in flight, and what makes a step on it: a graph where the engine asks for one."""
        if not self.with_graphs:
            if self.batch is None:
                self.batch = self.new_batch(len(self.live), len({id(branch.flight) for branch in self.live}))
                self.batch.fill(self.live)
            return self.batch, self.step
        rows = rung(len(self.live))
        graph = self.graphs.get(rows)
        if self.batch is None or graph is None:
            groups = min(rows, len(self.request.prompts))
            self.batch = self.new_batch(rows, groups) if graph is None else graph.batch
            self.batch.fill(self.live)
        if graph is None:
            first = next(iter(self.graphs.values()), None)
            graph = self.graphs[rows] = Graph(self.step, self.batch, None if first is None else first.pool)
        return self.batch, graph

    def new_batch(self, rows: int, groups: int) -> Batch:
        prompts = self.request.prompts
        return Batch(
            self.pool,
            rows=rows,
            groups=groups,
            columns=max(1, blocks_of(self.settings.max_completion_length)),
            kinds=len(prompts[0].positions),
            max_group=self.request.num_generations,
            max_prefix=max(len(prompt.input_ids) for prompt in prompts),
            vocabulary=None if self.settings.repetition_penalty == 1 else self.vocabulary,
        )

    def step(self, batch: Batch, draws: Tensor) -> Columns:
        """The next token of each branch; the batch is then ready for the one after it."""
        batch.attention.begin()
        positions = batch.positions.expand(batch.kinds, -1)[..., None]  # [K, S, 1]
        hidden = self.family.hidden(self.model, batch.tokens[:, None], positions, [], shared=batch.attention)
        logits = self.logits(hidden[:, 0])  # [S, V]
        batch.attention.end()
        chosen = choose(logits, self.banned, self.settings, draws, batch.seen)
        batch.advance(chosen[0])
        return chosen

    def draws(self, prompt_keys: np.ndarray, branch_keys: np.ndarray, places: np.ndarray | int) -> Tensor:
        """[S], or [steps, S] where `places` is, uniform numbers in [0, 1)."""
        numbers = uniform(self.settings.seed, self.request.step, prompt_keys, branch_keys, places)
        return torch.from_numpy(numbers).to(self.model.device)


def record(branches: Sequence[Branch], columns: Sequence[Columns]) -> None:
    """Add chosen tokens and their log-probs to the branches that they are of; padding is behind the last of them."""
    tokens, logp, sampling_logp = (torch.stack(each, 1).tolist() for each in zip(*columns, strict=True))  # [S, steps]
    for branch, *rows in zip(branches, tokens, logp, sampling_logp, strict=False):
        for kept, row in zip((branch.tokens, branch.logp, branch.sampling_logp), rows, strict=True):
            kept.extend(row)
