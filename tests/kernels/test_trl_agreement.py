"""Loss and gradient against TRL's own `_compute_loss`, which runs here on given log-probs."""

from typing import Any

import pytest
import torch

from tests.helpers.kernel_cases import Target, targets
from tests.helpers.trl import trl_loss
from vlmr1_kernels import GRPOSettings, group_advantages
from vlmr1_kernels.settings import LOSS_TYPES

LENGTHS = [3, 1, 5, 2]

CASES: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.1},
    "grpo, two-sided clip": {"delta": 1.3, "epsilon_high": 0.4},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 8, "beta": 0.1},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3, "beta": 0.1},
    "gspo": {"loss_type": "gspo"},
    "corrected KL": {"beta": 0.1, "use_bias_correction_kl": True},
    "corrected KL, sequence level": {"loss_type": "gspo", "beta": 0.1, "use_bias_correction_kl": True},
    "truncated importance sampling": {"tis_cap": 1.2, "beta": 0.1},
    "bnpo, entropy": {"loss_type": "bnpo", "entropy_coef": 0.2},
}


def test_every_loss_type_is_compared() -> None:
    assert {options.get("loss_type", "grpo") for options in CASES.values()} == set(LOSS_TYPES)


@pytest.mark.parametrize("target", targets("grpo_loss"))
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_loss_and_gradient_are_those_of_trl(options: dict[str, Any], target: Target) -> None:
    dtype = torch.float32 if target.unsupported_reason(torch.float64) else torch.float64
    run, settings, count = target.run(dtype), GRPOSettings(**options), sum(LENGTHS)
    logp = (-2 * torch.rand(count, dtype=dtype)).requires_grad_()
    entropy = torch.rand(count, dtype=dtype)
    rows: dict[str, Any] = {
        name: logp.detach() + 0.5 * torch.randn(count, dtype=dtype)
        for name in ("old_logp", "ref_logp", "sampling_logp")
    }
    rows |= {"logp": logp, "advantages": group_advantages(torch.tensor([1.0, 0.0, 0.2, 0.7], dtype=dtype), 2)}
    expected = trl_loss(settings, LENGTHS, rows, entropy)
    without_entropy = GRPOSettings(**{**options, "entropy_coef": 0.0})
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    on_device = {name: value.to(target.device) for name, value in rows.items()}
    loss, _ = run(**on_device, seq_ids=ids.to(target.device), settings=without_entropy)
    loss = loss.cpu() - settings.entropy_coef * entropy.mean()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logp)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
