"""Operations counted from tokens against what torch counts while the model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scaling
from benchmarks.flops import FORWARD, TRAINED, chunks, pack_flops, update_flops
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.policy import PackedPolicy
from vlmr1_kernels import use
from vlmr1_kernels.reference.shared_prefix_attention import visible


def attention_of(config: Any, pack: Any) -> float:
    """By the mask of the packed row, and by the tower's windows of 4 x 4 patches."""
    text, vision = config.text_config, config.vision_config
    total = 4.0 * text.hidden_size * int(visible(pack.layout).sum()) * text.num_hidden_layers
    for image in pack.images:
        _, height, width = image["image_grid_thw"][0].tolist()
        y, x = torch.meshgrid(torch.arange(height) // 4, torch.arange(width) // 4, indexing="ij")
        window = (100 * y + x).flatten()
        pairs = 2 * int((window[:, None] == window).sum()) + 2 * len(window) ** 2
        total += 4.0 * vision.hidden_size * pairs
    return total


def test_a_pack_costs_what_torch_counts(model, make):
    groups = [
        make.group(make.prompt("Locate the digit 7.", (112,)), (5, 9, 3)),
        make.group(make.prompt("Which of the two has a 4?", (56, 140)), (4, 2)),
    ]
    pack = make_pack(groups)
    policy = PackedPolicy(model, make.family, temperature=1.0)
    with use("linear_logprob=reference"), FlopCounterMode(display=False) as counter:
        policy.logprobs(pack)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    assert pack_flops(model.config, pack) == pytest.approx(products + attention_of(model.config, pack), rel=1e-12)


def test_sharing_costs_less_by_the_repeated_prompt(model, make):
    group = make.group(make.prompt("Locate the digit 7.", (112,)), (5, 9, 3))
    alone = [make.group(group.prompt, (len(c.token_ids),)) for c in group.completions]
    shared, repeated = make_pack([group]), make_pack(alone, share_vision=False)
    plain = make_pack([make.group(group.prompt, (1,))])
    head = 2 * model.config.text_config.vocab_size * 192  # of the one row that predicts
    prompt = pack_flops(model.config, plain) - head
    assert pack_flops(model.config, repeated) - pack_flops(model.config, shared) == pytest.approx(2 * prompt, rel=1e-12)


def test_an_update_is_four_forwards_and_three_without_a_reference(model, make):
    pack = make_pack([make.group(make.prompt("What is seven?"), (4, 2))])
    once = pack_flops(model.config, pack)
    assert (FORWARD, TRAINED) == (1, 3)
    assert update_flops(model.config, [pack, pack], reference=True) == 8 * once
    assert update_flops(model.config, [pack], reference=False) == 3 * once


def test_chunks():
    assert (chunks(8, 4), chunks(10, 4), chunks(3, 4)) == ([4, 4], [4, 4, 2], [3])


def test_scaling_tables_of_two_cells():
    cell = {"generations": 2, "prompt": 128, "completion": 32, "time": {"value": 1.654, "low": 1.5, "high": 1.8}}
    cell |= {"predicted": 1.811, "memory": 1.26, "peak_mib": {"naive": 239.0, "shared": 190.0}}
    cell |= {"seconds": {"naive": [1.0, 2.0]}}
    more = cell | {"generations": 4, "memory": 2.0}
    assert scaling.pivot([cell, more]).splitlines() == [
        "| prompt x completion |              G 2 |              G 4 |",
        "| :------------------ | ---------------: | ---------------: |",
        "| 128 x 32            | 1.65 (1.81), 1.3 | 1.65 (1.81), 2.0 |",
    ]
    assert scaling.row(cell) == ["2 x 128 x 32", "1.65 (1.50 to 1.80)", "2", "1.81", "1.26", "239 / 190"]
