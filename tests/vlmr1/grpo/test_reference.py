"""The reference model: what it owns, how it follows the policy, and what a checkpoint holds of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.trainers import trainer_of
from vlmr1.errors import SettingError
from vlmr1.grpo.reference import REFERENCE, SyncReference


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
