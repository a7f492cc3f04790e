"""What a dry run counts, against bytes counted by hand, and against the same code on real tensors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.helpers.jobs import Allocated
from vlmr1.planner.dry_run import HOST, DryRun, without_data

KIB = 1024


def dry_layer(dry: DryRun, *sizes: int) -> nn.Module:
    """Linear layers of these widths, without bias and without data."""
    module = Layers(*sizes)
    module = without_data(lambda: module.to("meta"), dry.fake)
    dry.leave_out(module.parameters())
    return module


class Layers(nn.Sequential):
    def __init__(self, *sizes: int):
        super().__init__(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)))


def test_what_is_alive_counts_and_views_do_not():
    dry = DryRun("a")
    with dry:
        x = torch.empty(256, KIB, dtype=torch.float32)  # 1 MiB
        y = x.view(-1)[:10]
        with dry.of("b"):
            z = x + 1
        del x
        assert dry.total == 2 * KIB**2  # y is a view of it
        del y
        assert dry.live["a"] == 0 and dry.total == KIB**2
        del z
    assert dry.total == 0
    assert dry.peak == 2 * KIB**2 and dry.at_peak == {"a": KIB**2, "b": KIB**2}


def test_causes_change_and_host_memory_is_apart():
    dry = DryRun("a", uncounted=["free"])
    with dry:
        x = torch.empty(KIB)
        dry.is_of(x, "b")
        assert (dry.live["a"], dry.live["b"], dry.cause_of(x)) == (0, 4 * KIB, "b")
        with dry.of(HOST):
            x.clone()
        dry.is_of(x, "free")
        assert dry.total == 0
        dry.transient("c", 100 * KIB)
    assert dry.most_on_host == 4 * KIB
    assert dry.peak == 100 * KIB and dry.at_peak["c"] == 100 * KIB


def test_forward_and_backward_of_two_layers_by_hand():
    """Rows 64, widths 32, 128, 16, float32. Forward keeps the input of the second layer, [64, 128]; at the peak, in
    that layer's backward, there are the gradients of it and of the weight too, the loss, and a gradient of one
    number."""
    dry = DryRun("a")
    module = dry_layer(dry, 32, 128, 16)
    x = torch.ones(64, 32)
    with dry:
        out = module(x).sum()
        assert dry.total == 4 * (64 * 128 + 1)
        out.backward()
        assert dry.total == 4 * (32 * 128 + 128 * 16 + 1)
    assert [p.grad.shape for p in module.parameters()] == [(128, 32), (16, 128)]
    assert dry.peak == 4 * (64 * 128 + 64 * 128 + 128 * 16 + 2)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_a_dry_run_counts_what_a_real_run_does(dtype):
    def run(dry: DryRun, module: nn.Module) -> tuple[int, int]:
        x = torch.ones(48, 64)
        with dry:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                hidden = module(x)
                mask = torch.arange(48) % 3 == 0
                picked = hidden[mask].softmax(-1)
            picked.float().square().sum().backward()
        return dry.peak, dry.total

    dry, real = DryRun("a"), Allocated("a")
    without = dry_layer(dry, 64, 96, 32)
    module = Layers(64, 96, 32)
    real.leave_out(module.parameters())
    assert run(dry, without) == run(real, module)
