"""Which rank trains on which group, worked out by hand; ranks are threads that meet at a barrier."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.maker import Maker
from tests.helpers.threads import on_ranks
from vlmr1.distributed.balance import EVEN, Place, balance_over_ranks, exchange
from vlmr1.distributed.metrics import over_ranks
from vlmr1.distributed.ranks import interleaved
from vlmr1.grpo.advantages import with_advantages
from vlmr1.types import Group


def places(*tokens: list[int]) -> list[Place]:
    return interleaved([[Place(r, i, n) for i, n in enumerate(own)] for r, own in enumerate(tokens)])


def names(ranks: list[list[Place]]) -> list[list[tuple[int, int]]]:
    return [[(place.home, place.index) for place in own] for own in ranks]


def test_interleaved_is_the_order_of_the_batch():
    batch = list(range(7))
    assert interleaved([batch[rank::3] for rank in range(3)]) == batch


BALANCED = {
    "even": ([[10, 10], [10, 10]], [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]),
    "even enough": ([[11, 10], [10, 10]], [[(0, 0), (0, 1)], [(1, 0), (1, 1)]]),
    "one moves": ([[30, 20], [5, 5]], [[(0, 0)], [(1, 0), (0, 1), (1, 1)]]),  # 30 and 30
    "one group each cannot be better": ([[50], [10]], [[(0, 0)], [(1, 0)]]),
    "nothing to train on at rank 0": ([[0, 0], [8, 8]], [[(0, 0), (1, 0), (0, 1)], [(1, 1)]]),
    "a rank needs a group": ([[9, 9, 9], []], [[(0, 1), (0, 2)], [(0, 0)]]),
}


@pytest.mark.parametrize(("tokens", "expected"), BALANCED.values(), ids=BALANCED.keys())
def test_balance_over_ranks(tokens, expected):
    assert names(balance_over_ranks(places(*tokens), len(tokens))) == expected


def test_four_ranks_of_long_and_short_groups_end_within_the_bound():
    tokens = [[900, 40, 40, 40], [100] * 4, [30] * 4, [300, 300, 20, 20]]
    ranks = balance_over_ranks(places(*tokens), 4)
    loads = [sum(place.tokens for place in own) for own in ranks]
    assert sorted(place for own in names(ranks) for place in own) == [(r, i) for r in range(4) for i in range(4)]
    # The longest group alone is more than a fourth of the tokens, and its rank has nothing else.
    assert max(loads) == 900 and sum(loads) == sum(map(sum, tokens)) and max(loads) > EVEN * sum(loads) / 4


def group(make: Maker, index: int, length: int) -> Group:
    made = make.group(make.prompt(f"What is {index}?"), (length, 2))
    object.__setattr__(made.prompt.sample, "index", index)
    return made


def test_exchange_moves_whole_groups_and_makes_their_prompts_again(make):
    drawn = [[group(make, 0, 30), group(make, 2, 20)], [group(make, 1, 5), group(make, 3, 5)]]
    again = {each.prompt.sample.index: each.prompt for own in drawn for each in own}
    tokens = [[30, 20], [5, 5]]
    made: list[int] = []

    def prompt_of(index: int):
        made.append(index)
        return again[index]

    parts = on_ranks(2, lambda ranks: exchange(drawn[ranks.rank], tokens[ranks.rank], 1, ranks, prompt_of))
    assert [[g.prompt.sample.index for g in part] for rank in parts for part in rank] == [[0], [1, 2, 3]]
    assert made == [2]
    moved = parts[1][0][1]
    for one, other in zip(moved.completions, drawn[0][1].completions, strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.logp, other.logp)
    assert torch.equal(moved.advantages, drawn[0][1].advantages)


def test_parts_are_those_of_one_process(make):
    """Four updates of one generation: together the ranks have in each what one process would have."""
    drawn = [[group(make, k, 4) for k in range(rank, 8, 2)] for rank in range(2)]
    parts = on_ranks(2, lambda ranks: exchange(drawn[ranks.rank], [5] * 4, 4, ranks, lambda index: None))
    together = [sorted(g.prompt.sample.index for rank in parts for g in rank[part]) for part in range(4)]
    assert together == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_batch_scaled_advantages_are_those_of_one_process(make):
    values = [torch.tensor(row)[:, None] for row in ([0.0, 1.0], [0.2, 0.4], [0.9, 0.1], [0.5, 0.5])]
    groups = [replace(make.group(make.prompt("?"), (3, 2)), rewards=value, advantages=None) for value in values]
    alone = torch.cat([g.advantages for g in with_advantages(groups, [1.0], "batch")])
    apart = on_ranks(2, lambda ranks: with_advantages(groups[ranks.rank :: 2], [1.0], "batch", ranks))
    together = torch.cat([g.advantages for g in interleaved(apart)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)


def test_metrics_over_ranks():
    own = [
        {"packs": 2.0, "reward": 1.0, "completion_length_max": 5.0},
        {"packs": 3.0, "reward": 0.0, "completion_length_max": 9.0, "rollout/kv_peak_mib": 4.0},
    ]
    weights = [1, 3]
    expected = {"packs": 5.0, "reward": 0.25, "completion_length_max": 9.0, "rollout/kv_peak_mib": 4.0}
    assert on_ranks(2, lambda ranks: over_ranks(own[ranks.rank], weights[ranks.rank], ranks)) == [expected, expected]
