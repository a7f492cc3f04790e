"""LoRA dropout with a shared prompt: one mask for the prompt, one for each branch, and no change of the mean."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.lora_steps import LORA, perturb
from vlmr1.config import GRPOConfig
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.trainer import GRPOTrainer

P, DRAWS = 0.4, 200


@pytest.fixture
def trainer(model: Any, processor: Any, tmp_path: Path) -> GRPOTrainer:
    config = GRPOConfig(str(tmp_path), use_cpu=True, num_generations=3, max_completion_length=8, lora_dropout=P, **LORA)
    made = GRPOTrainer(model, config, [], processor, reward_funcs=["format"])
    perturb(made.model)
    return made


def test_masks_and_mean(make: Any, trainer: GRPOTrainer) -> None:
    group = make.group(make.prompt("Locate the digit 7."), (6, 6, 6), (0.0, 0.0, 0.0))
    pack = make_pack([group])
    first = next(m for name, m in trainer.model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    kept: list[Tensor] = []
    deltas: list[Tensor] = []
    first.lora_dropout["default"].register_forward_hook(lambda _, inputs, out: kept.append((out != 0)[0]))
    first.lora_B["default"].register_forward_hook(lambda _, inputs, out: deltas.append(out[0].detach()))

    trainer.model.eval()
    trainer.policy.logprobs(pack)
    (exact,) = deltas
    kept.clear()
    deltas.clear()
    trainer.model.train()
    torch.manual_seed(0)
    for _ in range(DRAWS):
        trainer.policy.logprobs(pack)
    assert kept[0].shape[0] == len(pack.input_ids)  # the prompt's rows are there once
    branches = kept[0][-18:].split(6)
    assert not torch.equal(branches[0], branches[1]) and not torch.equal(branches[1], branches[2])
    share = torch.stack(kept).double().mean()
    assert abs(float(share) - (1 - P)) < 5 * (P * (1 - P) / torch.stack(kept).numel()) ** 0.5
    drawn = torch.stack(deltas)
    error = drawn.std(0) / DRAWS**0.5
    assert ((drawn.mean(0) - exact).abs() <= 6 * error + 1e-6).all() and float(error.max()) > 0


def test_rollout_and_old_policy_drop_nothing(make: Any, trainer: GRPOTrainer) -> None:
    """Their log-probs are those without dropout, and the same in each pass."""
    groups = trainer.rollout([make.prompt("Locate the digit 7.")])
    drawn = torch.cat([completion.logp for completion in groups[0].completions])
    pack = make_pack(groups)
    again = [trainer._policy_logprobs(trainer.model, pack) for _ in range(2)]
    assert torch.equal(*again)
    torch.testing.assert_close(again[0], drawn, rtol=1e-4, atol=1e-4)
