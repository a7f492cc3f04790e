"""Precision of the output head's gradient."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from vlmr1.sft.loss import CrossEntropy
from vlmr1.types import Pack
from vlmr1_kernels.testing import relative_error


def test_a_float32_head_has_a_float32_gradient_with_bfloat16_hidden() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16()
    targets = torch.randint(50, (64,), generator=generator)
    head = nn.Linear(32, 50, bias=False)
    torch.nn.init.normal_(head.weight, std=0.2, generator=generator)
    pack = Pack.__new__(Pack)
    pack.__dict__.update(targets=targets)
    CrossEntropy(64.0).fused(hidden, head, pack)[0].backward()
    weight = head.weight.detach().bfloat16().float().requires_grad_()
    cross_entropy(hidden.float() @ weight.T, targets).backward()
    found, expected = head.weight.grad, weight.grad
    assert found is not None and expected is not None and relative_error(found, expected) < 5e-3
    assert not torch.equal(found, found.bfloat16().float())
