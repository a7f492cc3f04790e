"""Each flag of the trainer changes what it says, and nothing else. One generation serves several updates: which rows,
in which order, with which log-probs. And the reference model: what it owns, how it follows the policy, and what a
checkpoint holds of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler

import vlmr1_kernels
from tests.helpers.trainers import even, gradients, recorded, relative, shift, trainer_of
from vlmr1.config import GRPOConfig
from vlmr1.distributed.balance import parts_of
from vlmr1.errors import SettingError
from vlmr1.grpo.buffer import Buffer, BufferSampler, Minibatch
from vlmr1.grpo.reference import REFERENCE, SyncReference
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


SCALED = [("group", None), ("batch", None), ("none", None), ("none", [1.0, 0.0]), ("none", [0.0, 0.5])]


@pytest.mark.parametrize(("scale", "weights"), SCALED)
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
        given = {"rollout_engine": engine, "temperature": 3.0, "prompts_per_device": 1} | settings
        trainer = trainer_of(model, processor, tmp_path, **given)
        trainer.train()
        row = trainer.state.log_history[0]
        assert row["ratio_max"] == pytest.approx(1, abs=1e-4)  # the engine's log-probs are the policy's
        (group,) = trainer.last_groups
        assert len({tuple(c.token_ids.tolist()) for c in group.completions}) == kinds
        assert all(bool((c.sampling_logp.abs() < 1e-5).all()) == (kinds == 1) for c in group.completions)


def test_a_reward_that_overruns_scores_0_and_is_recorded(model, processor, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import time\ndef slow(prompts, completions, **_):\n    time.sleep(60)\nslow.isolated = True\n")
    settings = {"prompts_per_device": 1, "num_generations": 2, "reward_workers": 1, "reward_timeout": 0.3}
    trainer = trainer_of(model, processor, tmp_path, **settings)
    trainer.rewards = [get_reward(f"{path}:slow"), trainer.rewards[0]]
    rows = recorded(trainer, tmp_path)
    assert trainer.state.log_history[0]["reward_timeouts"] == 2
    (group,) = trainer.last_groups
    assert group.rewards.tolist() == [[0, 0], [0, 1]]
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
    message = next(message for message in caplog.messages if "rows are left out" in message)
    assert message.startswith(f"{len(every) - len(kept)} of {len(every)} rows are left out")
    for sample in every.samples:  # at most NAMED rows
        assert (f"{sample.source} (" in message) == (sample.index not in kept)
    trainer.train()


def test_reward_weights_must_fit_the_rewards(model, processor, tmp_path):
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, reward_weights=[1.0, 2.0])
    with pytest.raises(SettingError, match="reward_weights has 2 values for 1 rewards"):
        GRPOTrainer(model, config, [], processor, reward_funcs=[even])


# Several updates on a generation


SAMPLES = {
    "plain": (4, {"prompts": 2, "parts": 1, "iterations": 1}, [[0, 1], [2, 3]]),
    "iterations": (3, {"prompts": 2, "parts": 1, "iterations": 3}, [[0, 1], [], [], [2], [], []]),
    "parts": (7, {"prompts": 2, "parts": 2, "iterations": 1}, [[0, 1, 2, 3], [], [4, 5, 6], []]),
    "both": (4, {"prompts": 2, "parts": 2, "iterations": 2}, [[0, 1, 2, 3], [], [], []]),
    "too few for every update": (5, {"prompts": 2, "parts": 2, "iterations": 1}, [[0, 1, 2, 3], []]),
    "drop_last": (7, {"prompts": 2, "parts": 2, "iterations": 1, "drop_last": True}, [[0, 1, 2, 3], []]),
}


@pytest.mark.parametrize(("rows", "settings", "expected"), SAMPLES.values(), ids=SAMPLES.keys())
def test_sampler(rows, settings, expected):
    sampler = BufferSampler(SequentialSampler(range(rows)), **{"drop_last": False} | settings)
    assert list(sampler) == expected and len(sampler) == len(expected)


def test_minibatches_are_taken_once_an_iteration():
    minibatches = [Minibatch([], {"number": float(i)}) for i in range(3)]
    buffer = Buffer(iterations=2)
    assert buffer.spent
    buffer.fill(minibatches)
    assert [buffer.take().metrics["number"] for _ in range(5)] == [0, 1, 2, 0, 1] and not buffer.spent
    assert buffer.take().metrics["number"] == 2 and buffer.spent


def test_parts_of():
    assert parts_of(list("abcde"), 2) == [["a", "b", "c"], ["d", "e"]]  # type: ignore[arg-type]
    assert parts_of(list("abc"), 3) == [["a"], ["b"], ["c"]]  # type: ignore[arg-type]


def logged(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def test_one_generation_serves_its_updates(model, processor, tmp_path, monkeypatch):
    """Two prompts an update, two updates an iteration, two iterations: one generation of four prompts."""
    settings = {"steps_per_generation": 2, "max_steps": 5, "temperature": 3.0, "learning_rate": 1e-4}
    trainer = trainer_of(model, processor, tmp_path, num_iterations=2, **settings)
    drawn, trained = [], []
    generate, backward = trainer.engine.generate, trainer.backward
    monkeypatch.setattr(trainer.engine, "generate", lambda p, *a, **k: drawn.append(p) or generate(p, *a, **k))
    monkeypatch.setattr(trainer, "backward", lambda m, groups: trained.append(groups) or backward(m, groups))
    rows = logged(trainer)
    assert [len(prompts) for prompts in drawn] == [4, 4]
    assert [[g.prompt for g in groups] for groups in trained[:2]] == [drawn[0][:2], drawn[0][2:]]
    assert trained[2] is trained[0] and trained[3] is trained[1] and trained[4][0].prompt is drawn[1][0]
    assert rows[0]["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert all(row["ratio_max"] > 1 + 1e-3 for row in rows[1:4])  # the policy has moved, what it is compared to has not
    assert rows[4]["ratio_max"] == pytest.approx(1, abs=1e-4)
    for name in ("rollout/tokens_per_second", "rollout/logp_difference", "seconds/rollout"):
        assert [name in row for row in rows] == [True, False, False, False, True], name


def test_recomputed_old_logprobs_are_of_the_policy_before_the_first_update(model, processor, tmp_path):
    """For both parts, although the second is trained on after the first; the engine's are wrong here."""
    settings = {"steps_per_generation": 2, "max_steps": 2, "learning_rate": 1e-4, "temperature": 3.0}
    trainer = trainer_of(model, processor, tmp_path, old_logprobs="recompute", **settings)
    shift(trainer, 1.0)
    first, second = logged(trainer)
    assert first["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert 1 + 1e-3 < second["ratio_max"] < 1.5
    assert first["seconds/old"] > 0 and "seconds/old" not in second


# The reference model


def moved(trainer: Any) -> dict[str, torch.Tensor]:
    """The reference before the policy moved away from it, which it then does."""
    before = {name: p.clone() for name, p in trainer.reference.model.named_parameters()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return before


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_sync_mixes_what_is_trained_and_leaves_what_is_shared(alpha, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, freeze_vision=True)
    before, policy = moved(trainer), dict(trainer.model.named_parameters())
    trainer.reference.sync(alpha)
    kinds = {"shared": 0, "own": 0}
    for name, parameter in trainer.reference.model.named_parameters():
        shared = parameter is policy[name]
        kinds["shared" if shared else "own"] += 1
        assert shared == ("visual" in name)
        expected = alpha * policy[name].double() + (1 - alpha) * before[name].double()
        assert float((parameter - (before[name] if shared else expected)).abs().max()) < 1e-6, name
        assert not parameter.requires_grad and torch.equal(policy[name], before[name] + 0.1 * (not shared))
    assert min(kinds.values()) > 0


def test_checkpoint_holds_what_the_reference_owns(model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, freeze_vision=True, sync_ref_model=True)
    moved(trainer)
    trainer.reference.sync(0.3)
    trainer.reference.save(tmp_path)
    again = trainer_of(model, processor, tmp_path, freeze_vision=True, sync_ref_model=True)
    again.reference.load(tmp_path)
    found = dict(again.reference.model.named_parameters())
    start = dict(model.named_parameters())
    for name, parameter in trainer.reference.model.named_parameters():
        assert torch.equal(parameter, found[name])
        assert torch.equal(parameter, start[name]) == ("visual" in name), name
        assert torch.equal(again.model.get_parameter(name), start[name])
    assert (tmp_path / REFERENCE).stat().st_size < sum(p.nbytes for p in found.values())


@pytest.mark.parametrize("settings", [{"sync_ref_model": True}, {"dynamic_sampling": True}], ids=str)
def test_a_checkpoint_without_its_state_is_refused(settings, model, processor, tmp_path):
    trainer_of(model, processor, tmp_path, save_strategy="steps", save_steps=1, prompts_per_device=1).train()
    again = trainer_of(model, processor, tmp_path, max_steps=2, prompts_per_device=1, **settings)
    with pytest.raises(SettingError, match="checkpoint-1 was written without dynamic_sampling or sync_ref_model"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_sync_follows_the_number_of_updates(model, processor, tmp_path, monkeypatch):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25, "max_steps": 5}
    trainer = trainer_of(model, processor, tmp_path, **settings)
    calls = []
    monkeypatch.setattr(trainer.reference, "sync", lambda alpha: calls.append((trainer.state.global_step, alpha)))
    trainer.train()
    assert calls == [(2, 0.25), (4, 0.25)]


@pytest.mark.parametrize("on", [True, False])
def test_only_a_synced_reference_moves(on, model, processor, tmp_path):
    """alpha 1 after every update: the reference is the policy before the update, and its KL 0."""
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0} if on else {}
    settings = {"max_steps": 3, "max_completion_length": 24, "temperature": 3.0, "save_strategy": "steps"}
    trainer = trainer_of(model, processor, tmp_path, save_steps=3, **settings, **sync)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "kl" in row]
    assert all((row["kl"] > 1e-5) == (not on) for row in rows[1:])
    start, policy = dict(model.named_parameters()), dict(trainer.model.named_parameters())
    for name, parameter in trainer.reference.model.named_parameters():
        assert torch.equal(parameter, policy[name] if on else start[name])
    assert any(isinstance(each, SyncReference) for each in trainer.callback_handler.callbacks) == on
    assert (Path(trainer.args.output_dir) / "checkpoint-3" / REFERENCE).exists() == on
