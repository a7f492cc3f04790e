"""A frozen tower encodes an image once a step, for rollout, reference and policy; a trained one does not share."""

from typing import Any

import pytest

from tests.helpers.trainers import gradients, relative, trainer_of


def count_encodings(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each call of a tower."""
    calls: list[int] = []
    original = trainer.family.encode_images

    def counted(model: Any, images: Any) -> Any:
        calls.append(len(images))
        return original(model, images)

    monkeypatch.setattr(trainer.family, "encode_images", counted)
    return calls


def test_next_step_encodes_again(model, processor, tmp_path, monkeypatch):
    trainer = trainer_of(model, processor, tmp_path, freeze_vision=True, max_steps=2)
    calls = count_encodings(trainer, monkeypatch)
    trainer.train()
    assert [count for count in calls if count] == [2, 2]
    assert trainer.features is not None and trainer.features.kept == {}  # freed after each step


def test_without_share_vision_nothing_is_kept(model, processor, tmp_path, monkeypatch):
    switches = {"share_vision": False, "share_prompt": False}
    trainer = trainer_of(model, processor, tmp_path, freeze_vision=True, **switches)
    calls = count_encodings(trainer, monkeypatch)
    trainer.train()
    assert sum(calls) == 2 + 2 * 3 * 2  # rollout; two prompts x three branches in reference and policy


def test_kept_features_change_nothing(model, processor, make, tmp_path):
    """Loss and gradients with the cache, filled and empty, against a tower that is called each time."""
    cached = trainer_of(model, processor, tmp_path, freeze_vision=True)
    assert cached.features is not None
    loss, one = gradients(cached, make)
    assert len(cached.features.kept) == 2
    plain = trainer_of(model, processor, tmp_path, freeze_vision=True)
    plain.features = plain.policy.features = None
    assert plain.reference is not None
    plain.reference.forward.features = None
    make.random.manual_seed(0)
    loss_, other = gradients(plain, make)
    assert loss == pytest.approx(loss_, rel=1e-6) and relative(one, other) < 1e-6
