"""Loss and gradient against TRL's own `_compute_loss`, which runs here on given log-probs."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernel_cases import Target, targets
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


def pad(values: Tensor) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(values.split(LENGTHS)), batch_first=True)


def trl_loss(trainer_class: Any, settings: GRPOSettings, rows: dict[str, Any], entropy: Tensor) -> Tensor:
    mask = pad(torch.ones(sum(LENGTHS), dtype=torch.long))
    logp, old = pad(rows["logp"]), pad(rows["old_logp"])
    this = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, pad(entropy), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if settings.sequence_level else "token",
        beta=settings.beta,
        args=SimpleNamespace(
            use_bias_correction_kl=settings.use_bias_correction_kl,
            delta=settings.delta,
            steps_per_generation=1,
            entropy_target=None,
        ),
        loss_type="grpo" if settings.loss_type == "gspo" else settings.loss_type,
        epsilon_low=settings.epsilon_low,
        epsilon_high=settings.epsilon_high,
        use_vllm=settings.tis_cap is not None,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=settings.max_completion_length,
        accelerator=SimpleNamespace(
            num_processes=1,
            gather=lambda value: value,
            reduce=lambda value, reduction: value,
            sync_gradients=False,
        ),
        _entropy_bonus_enabled=settings.entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=settings.entropy_coef,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": mask,
        "prompt_mask": mask,
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": rows["advantages"],
        "old_per_token_logps": old,
        "ref_per_token_logps": pad(rows["ref_logp"]),
        "num_items_in_batch": mask.sum(),
    }
    if settings.tis_cap is not None:
        difference = (old - pad(rows["sampling_logp"])) * mask
        inputs["importance_sampling_ratio"] = difference.exp().clamp(max=settings.tis_cap)
    return trainer_class._compute_loss(this, None, inputs)


@pytest.fixture(scope="module")
def trainer_class() -> Any:
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"written against TRL 1.16, this is {trl.__version__}")
    return trl.GRPOTrainer


def test_every_loss_type_is_compared() -> None:
    assert {options.get("loss_type", "grpo") for options in CASES.values()} == set(LOSS_TYPES)


@pytest.mark.parametrize("target", targets("grpo_loss"))
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_loss_and_gradient_are_those_of_trl(options: dict[str, Any], target: Target, trainer_class: Any) -> None:
    dtype = torch.float32 if target.unsupported_reason(torch.float64) else torch.float64
    run, settings, count = target.run(dtype), GRPOSettings(**options), sum(LENGTHS)
    logp = (-2 * torch.rand(count, dtype=dtype)).requires_grad_()
    entropy = torch.rand(count, dtype=dtype)
    rows: dict[str, Any] = {
        name: logp.detach() + 0.5 * torch.randn(count, dtype=dtype)
        for name in ("old_logp", "ref_logp", "sampling_logp")
    }
    rows |= {"logp": logp, "advantages": group_advantages(torch.tensor([1.0, 0.0, 0.2, 0.7], dtype=dtype), 2)}
    expected = trl_loss(trainer_class, settings, rows, entropy)
    without_entropy = GRPOSettings(**{**options, "entropy_coef": 0.0})
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    on_device = {name: value.to(target.device) for name, value in rows.items()}
    loss, _ = run(**on_device, seq_ids=ids.to(target.device), settings=without_entropy)
    loss = loss.cpu() - settings.entropy_coef * entropy.mean()
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logp)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
