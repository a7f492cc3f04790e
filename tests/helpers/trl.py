"""Loss and advantages of TRL's own GRPOTrainer on given numbers.

What runs of TRL is `_compute_loss`, and `_generate_and_score_completions` for the advantages, on an object with the
attributes that they read. Replaced are the model pass, generation and reward functions."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmr1_kernels import GRPOSettings


def trl_loss(settings: GRPOSettings, lengths: list[int], rows: dict[str, Any]) -> Tensor:
    """The loss without entropy bonus of one padded batch of sequences of these lengths; `rows` has values by token, and
    advantages."""

    def pad(values: Tensor) -> Tensor:
        return pad_sequence(list(values.split(lengths)), batch_first=True)  # [B, C]

    mask = pad(torch.ones(sum(lengths), dtype=torch.long))
    this = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (pad(rows["logp"]), mask.float(), None),
        loss_type="grpo" if settings.loss_type == "gspo" else settings.loss_type,
        importance_sampling_level="sequence" if settings.sequence_level else "token",
        beta=settings.beta,
        epsilon_low=settings.epsilon_low,
        epsilon_high=settings.epsilon_high,
        max_completion_length=settings.max_completion_length,
        _entropy_bonus_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=settings.tis_cap is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(
            delta=settings.delta,
            use_bias_correction_kl=settings.use_bias_correction_kl,
            steps_per_generation=1,
        ),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=False
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        **{name: mask for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")},
        "advantages": rows["advantages"],
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": pad(rows["ref_logp"]),
    }
    if rows["old_logp"] is not None:
        inputs["old_per_token_logps"] = pad(rows["old_logp"])
    if settings.tis_cap is not None:
        difference = pad(rows["old_logp"] - rows["sampling_logp"])
        inputs["importance_sampling_ratio"] = difference.exp().clamp(max=settings.tis_cap)
    return pytest.importorskip("trl").GRPOTrainer._compute_loss(this, None, inputs)


def trl_advantages(rewards: Tensor, weights: Tensor, num_generations: int, scale: str, aggregation: str) -> Tensor:
    """rewards [B, R] -> [B]."""
    trl = pytest.importorskip("trl")
    size, count = rewards.shape
    trainer: Any = trl.GRPOTrainer.__new__(trl.GRPOTrainer)
    vars(trainer).update(
        _generate=lambda _: ([[1]] * size, [[1]] * size, None, [""] * size, None, {}, None, None),
        _calculate_rewards=lambda *_: rewards,
        num_generations=num_generations,
        scale_rewards=scale,
        reward_weights=weights,
        reward_func_names=[str(i) for i in range(count)],
        multi_objective_aggregation=aggregation,
        reward_funcs=[None] * count,
        **dict.fromkeys(("environment_factories", "environments", "tools", "pad_to_multiple_of")),
        mask_truncated_completions=False,
        num_iterations=1,
        use_vllm=False,
        beta=0.0,
        log_multimodal=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        args=SimpleNamespace(
            per_device_train_batch_size=size,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        accelerator=SimpleNamespace(device=torch.device("cpu"), process_index=0, gather=lambda x: x),
        _metrics={"train": defaultdict(list)},
        _logs={"prompt": [], "completion": [], "rewards": defaultdict(list), "advantages": []},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    return trainer._generate_and_score_completions([{"prompt": ""}] * size)["advantages"]
