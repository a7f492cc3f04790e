"""Which rank trains on which group, worked out by hand; ranks are threads that meet at a barrier. And processes that
wait for each other: one that fails, or is gone, ends the other with its message."""

import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from tests.helpers.forked_ranks import finish_ranks, start_ranks
from tests.helpers.maker import Maker
from tests.helpers.threads import on_ranks
from vlmr1.distributed import allreduce
from vlmr1.distributed.balance import EVEN, Place, balance_over_ranks, exchange
from vlmr1.distributed.metrics import over_ranks
from vlmr1.distributed.ranks import interleaved, local_device, process_group
from vlmr1.errors import SettingError, UserError
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


# Processes that wait for each other


def meet(mode: str) -> int:
    """Two barriers, between which rank 1 does not what rank 0 waits for."""
    rank = int(os.environ["RANK"])
    try:
        with process_group(300) as ranks:
            ranks.barrier()
            if rank == 1 and mode == "fails":
                raise UserError("no disk left")
            if rank == 1 and mode == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            while (rank, mode) in ((0, "fails"), (1, "is slow")):
                ranks.raise_failure()  # as between two batches
                time.sleep(0.05)
            timeout = 1 if mode == "is slow" else 300
            replace(ranks, timeout=timedelta(seconds=timeout)).barrier()
            print("together", ranks.world_size, flush=True)
    except UserError as error:
        print(error, flush=True)
        os._exit(2)
    return 0


MODES = {
    "works": ("together 2", 0),
    "fails": ("rank 1: no disk left", 2),
    "is killed": ("another process has ended or timed out: ", 2),
    "is slow": ("another process has ended or timed out: ", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_second_process(mode, tmp_path):
    message, status = MODES[mode]
    ranks = start_ranks(meet, mode, logs=tmp_path / "rank")
    found = finish_ranks(ranks)[0]
    output = ranks[0].output
    assert found == status, output
    assert any(line.startswith(message) for line in output.splitlines()), output


def test_alone():
    with process_group(1.0) as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_first) == (0, 1, True)
        ranks.barrier()
        ranks.raise_failure()


def test_without_the_others_address(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingError, match="WORLD_SIZE is 2, but the processes cannot connect"), process_group(1.0):
        pass


def test_the_gpu_of_a_process_is_its_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert local_device(use_cpu=False) == torch.device("cuda", 2) and chosen == [torch.device("cuda", 2)]
    assert local_device(use_cpu=True) == torch.device("cpu") and len(chosen) == 1


# The bandwidth check


def test_bus_bandwidth():
    assert allreduce.bus_bandwidth(10**9, 0.5, 2) == pytest.approx(2.0)  # half of the bytes each way
    assert allreduce.bus_bandwidth(10**9, 0.5, 4) == pytest.approx(3.0)


def measure() -> int:
    sys.argv = ["allreduce", "--mib", "1", "2", "--rounds", "2"]
    allreduce.main()
    return 0


@pytest.mark.slow
def test_two_ranks_print_a_line_a_size(tmp_path):
    runs = start_ranks(measure, logs=tmp_path / "rank", variables={"CUDA_VISIBLE_DEVICES": ""})
    assert finish_ranks(runs) == [0, 0], [run.output for run in runs]
    lines = [[line.split() for line in run.output.splitlines() if " MiB " in line] for run in runs]
    assert [line[0] for line in lines[0]] == ["1", "2"] and lines[1] == []
    assert all(float(line[2]) > 0 and float(line[5]) > 0 for line in lines[0])
