"""Each flag of the trainer changes what it says, and nothing else."""

import json
import math

import pytest
import torch

import vlmr1_kernels
from tests.helpers.trainers import even, gradients, relative, shift, trainer_of
from vlmr1.config import GRPOConfig
from vlmr1.errors import SettingError
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.report.progress import Progress
from vlmr1.rewards.registry import get_reward

SAME = {"reference attention": ({"kernels": "shared_prefix_attention=reference"}, 1e-5), "bf16": ({"bf16": True}, 5e-2)}


@pytest.mark.parametrize(("settings", "tolerance"), SAME.values(), ids=SAME.keys())
def test_how_it_is_computed_does_not_change_the_gradient(settings, tolerance, model, processor, make, tmp_path):
    loss, plain = gradients(trainer_of(model, processor, tmp_path), make)
    make.random.manual_seed(0)
    trainer = trainer_of(model, processor, tmp_path, **settings)
    loss_, other = gradients(trainer, make)
    assert loss_ == pytest.approx(loss, rel=tolerance)
    assert relative(other, plain) < tolerance
    assert (relative(other, plain) > 1e-5) == ("bf16" in settings)


def test_kernels_setting_chooses_the_implementation(model, processor, make, tmp_path, monkeypatch):
    from vlmr1_kernels.reference import shared_prefix_attention as reference

    calls = []
    original = reference.shared_prefix_attention
    monkeypatch.setattr(reference, "shared_prefix_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    vlmr1_kernels.registry._loaded.clear()
    trainer_of(model, processor, tmp_path).train()
    assert calls == []
    trainer_of(model, processor, tmp_path, kernels="shared_prefix_attention=reference").train()
    layers = model.config.text_config.num_hidden_layers
    assert len(calls) == 3 * layers  # prefill, reference pass and policy pass
    vlmr1_kernels.registry._loaded.clear()


@pytest.mark.parametrize(
    ("scale", "weights"),
    [("group", None), ("batch", None), ("none", None), ("none", [1.0, 0.0]), ("none", [0.0, 0.5])],
    ids=["group", "batch", "none", "first reward", "half the second"],
)
def test_advantages_follow_scale_and_weights(scale, weights, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, scale_rewards=scale)
    if weights is not None:
        trainer.reward_weights = weights
    trainer.train()
    rewards = torch.stack([group.rewards for group in trainer.last_groups])  # [P, G, R]
    assert rewards[..., 0].tolist() == [[0.0, 1.0, 2.0]] * 2
    assert rewards[..., 1].tolist() == [[0.0, 10.0, 0.0], [10.0, 0.0, 10.0]]
    total = rewards @ torch.tensor(weights or [1.0, 1.0])
    expected = total - total.mean(1, keepdim=True)
    std = {"group": total.std(1, keepdim=True), "batch": total.std(), "none": 1 - 1e-4}[scale]
    found = torch.stack([group.advantages for group in trainer.last_groups])
    assert torch.allclose(found, expected / (std + 1e-4), rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_reference_is_held_only_with_beta(beta, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, beta=beta, max_steps=2, max_completion_length=24)
    trainer.train()
    kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert (trainer.reference is None) == (beta == 0)
    assert (kl[1] > 1e-4) == (beta > 0)


@pytest.mark.parametrize("source", ["rollout", "recompute"])
def test_old_logprobs(source, model, processor, tmp_path):
    """The rollout's are the policy's too, but for rounding; wrong ones tell them apart."""
    trainer = trainer_of(model, processor, tmp_path, old_logprobs=source)
    shift(trainer, 1.0)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["ratio_max"] == pytest.approx(math.e if source == "rollout" else 1.0, rel=1e-4)


def test_an_engine_whose_logprobs_are_not_the_policys_is_noticed(model, processor, tmp_path, caplog):
    for off, alarm in ((0.0, False), (0.05, False), (0.3, True)):
        trainer = trainer_of(model, processor, tmp_path)
        shift(trainer, off)
        caplog.clear()
        trainer.train()
        row = trainer.state.log_history[0]
        assert row["rollout/logp_difference"] == pytest.approx(off, abs=1e-4)
        assert off - 1e-4 < row["rollout/logp_difference_max"] < off + 1e-3
        assert ("rollout_logp_warn_threshold is 0.1" in caplog.text) == alarm


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_sampling_settings_reach_the_rollout(engine, model, processor, tmp_path):
    """top_k 1 leaves one token at each place: all completions of a group are the same."""
    for settings, kinds in (({}, 3), ({"top_k": 1}, 1), ({"top_p": 1e-6}, 1), ({"min_p": 1.0}, 1)):
        trainer = trainer_of(
            model, processor, tmp_path, rollout_engine=engine, temperature=3.0, prompts_per_device=1, **settings
        )
        trainer.train()
        row = trainer.state.log_history[0]
        assert row["ratio_max"] == pytest.approx(1, abs=1e-4)  # the engine's log-probs are the policy's
        (group,) = trainer.last_groups
        assert len({tuple(c.token_ids.tolist()) for c in group.completions}) == kinds
        assert all(bool((c.sampling_logp.abs() < 1e-5).all()) == (kinds == 1) for c in group.completions)


@pytest.mark.parametrize("count", [0, 2])
def test_log_completions(count, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, log_completions=count)
    progress = Progress(tmp_path, console=False)
    progress.trainer = trainer
    trainer.add_callback(progress)
    trainer.train()
    path = tmp_path / "completions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert len(rows) == count
    for row in rows:
        assert row["step"] == 1 and len(row["rewards"]) == 2 and row["images"][0].endswith(".png")


def test_a_reward_that_overruns_scores_0_and_is_recorded(model, processor, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import time\n\n\ndef slow(prompts, completions, **columns):\n    time.sleep(60)\n\n\nslow.isolated = True\n"
    )
    trainer = trainer_of(model, processor, tmp_path, prompts_per_device=1, reward_workers=1, reward_timeout=0.3)
    trainer.rewards = [get_reward(f"{path}:slow"), trainer.rewards[0]]
    progress = Progress(tmp_path, console=False)
    progress.trainer = trainer
    trainer.add_callback(progress)
    trainer.train()
    assert trainer.state.log_history[0]["reward_timeouts"] == 3
    (group,) = trainer.last_groups
    assert group.rewards.tolist() == [[0, 0], [0, 1], [0, 2]]
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert rows and all(row["timed_out"] == [trainer.rewards[0].name] for row in rows)


def test_a_reward_that_raises_on_one_row_does_not_stop_the_run(model, processor, tmp_path, caplog):
    trainer = trainer_of(model, processor, tmp_path, max_steps=2)  # each of the four rows once
    row = trainer.train_dataset.samples[0]

    def picky(prompts, completions, *, solution, **columns):
        if row.solution in solution:
            raise KeyError("label")
        return [float(i % 2) for i in range(len(completions))]

    trainer.rewards[0] = get_reward(picky)
    progress = Progress(tmp_path, console=False)
    progress.trainer = trainer
    trainer.add_callback(progress)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert sum(log.get("reward_errors", 0) for log in logs) == 3 and all(log["reward_timeouts"] == 0 for log in logs)
    assert caplog.text.count(f"reward picky raised KeyError('label') for the row {row.source} and") == 3
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert {each["source"] for each in rows if each.get("raised") == ["picky"]} == {row.source}
    assert all(each["rewards"][0] == 0 and not each["timed_out"] for each in rows if "raised" in each)


def test_overlong_prompts_are_left_out(model, processor, tmp_path, caplog):
    every = trainer_of(model, processor, tmp_path).train_dataset
    lengths = sorted(len(every[i].input_ids) for i in range(len(every)))
    assert lengths[0] < lengths[-1]
    limit = lengths[-1] - 1
    trainer = trainer_of(model, processor, tmp_path, max_prompt_length=limit, overlong_prompts="filter")
    kept = [sample.index for sample in trainer.train_dataset.samples]
    assert kept == [i for i in range(len(every)) if len(every[i].input_ids) <= limit]
    assert f"{len(every) - len(kept)} of {len(every)} rows are left out" in caplog.text
    trainer.train()


def test_reward_weights_must_fit_the_rewards(model, processor, tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, reward_weights=[1.0, 2.0])
    with pytest.raises(SettingError, match="reward_weights has 2 values for 1 rewards"):
        GRPOTrainer(model, config, [], processor, reward_funcs=[even])
