"""Small usages of TRL's scripts and documentation that both trainers understand: `TRAINER=trl pytest` runs TRL."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import ModelCard
from transformers import EarlyStoppingCallback

from tests.vlmr1.api.suite import OURS, Kit, constant, kit, logged, named, picture, recorder, refused, rows_of, trained

pytestmark = pytest.mark.slow

__all__ = ["kit"]
EVALUATED: dict[str, Any] = dict(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
BEST = EVALUATED | dict(metric_for_best_model="eval_reward", load_best_model_at_end=True, save_strategy="steps")


def alternating(completions: list[Any], **_: Any) -> list[float]:
    return [float(i % 2) for i, _ in enumerate(completions)]


class Scorer:
    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        return alternating(completions)

    def method(self, completions: list[Any], **_: Any) -> list[float]:
        return alternating(completions)


class Async:
    async def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        return alternating(completions)


def exact(prompts, completions, completion_ids, place, image, trainer_state, log_extra, log_metric):
    """No further columns: what a row does not have is not given."""
    return alternating(completions)


def emptying(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    for each in (*prompts, *completions):
        each.clear()
    return [0.0] * len(completions)


REWARDS: dict[str, tuple[Any, set[str]]] = {
    "object": (Scorer(), {"Scorer"}),
    "async_object": (Async(), {"Async"}),
    "method": (Scorer().method, {"method"}),
    "partial": (partial(lambda a, completions, **_: [a] * len(completions), 1.0), {"<lambda>"}),
    "one_name": ([alternating, named("alternating", partial(alternating))], {"alternating"}),
    "exact": (exact, {"exact"}),
    "emptying": ([emptying, alternating], {"emptying", "alternating"}),
}


@pytest.mark.parametrize(("reward", "names"), REWARDS.values(), ids=REWARDS.keys())
def test_rewards(reward: Any, names: set[str], kit: Kit) -> None:
    trainer = kit.trainer(reward, max_steps=1)
    trainer.train()
    found = {name.split("/")[1] for name in logged(trainer)[0] if name.startswith("rewards/")}
    assert found == names and logged(trainer)[0]["reward"] >= 0.5


def encoded(i: int) -> bytes:
    file = io.BytesIO()
    picture(i).save(file, "PNG")
    return file.getvalue()


def of_images(value: Callable[[int], Any], folder: Path) -> Any:
    rows = [{"prompt": [{"role": "user", "content": "Where?"}], "image": value(i)} for i in range(4)]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


IMAGES: dict[str, Callable[[int], Any]] = {
    "bytes": lambda i: {"bytes": encoded(i), "path": None},
    **{mode: partial(lambda mode, i: picture(i).convert(mode), mode) for mode in ("L", "RGBA", "P", "CMYK")},
}


@pytest.mark.parametrize("value", IMAGES.values(), ids=IMAGES.keys())
def test_columns_of_images(value: Callable[[int], Any], kit: Kit, tmp_path: Path) -> None:
    seen: list[Any] = []
    reward = named("seen", lambda completions, image, **_: seen.extend(image) or alternating(completions))
    kit.trainer(reward, of_images(value, tmp_path), max_steps=1).train()
    assert {each.size for each in seen} == {(84, 56)}


def test_rows_that_are_made_when_they_are_read(kit: Kit) -> None:
    rows = datasets.Dataset.from_list([{"problem": f"Where is {i}?", "image": picture(i)} for i in range(4)])

    def chat(batch: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": [[{"role": "user", "content": p}] for p in batch["problem"]], "image": batch["image"]}

    reward = recorder()
    kit.trainer(reward, rows.with_transform(chat), max_steps=1).train()
    assert {each[-1]["content"][-1]["text"][:8] for each in reward.calls[0].prompts} == {"Where is"}


def test_several_sets_for_evaluation_and_a_stream(kit: Kit) -> None:
    sets = {"one": rows_of(count=2), "two": rows_of(count=4)}
    trainer = kit.trainer(given=dict(eval_dataset=sets), **EVALUATED)
    trainer.train()
    names = {name for line in trainer.state.log_history for name in line}
    assert {"eval_one_loss", "eval_two_loss"} <= names
    assert (
        {"eval_one_reward", "eval_two_reward"} if OURS else {"eval_reward"}
    ) <= names  # TRL does not tell them apart
    assert [line["step"] for line in trainer.state.log_history if "eval_two_loss" in line] == [1, 2]
    streamed = kit.trainer(given=dict(eval_dataset=rows_of(count=4).to_iterable_dataset()), **EVALUATED)
    assert {"eval_reward", "eval_entropy", "eval_num_tokens"} <= streamed.evaluate().keys()
    assert "own_loss" in streamed.evaluate(rows_of(count=4), metric_key_prefix="own")
    found = streamed.predict(rows_of(count=4).to_iterable_dataset()).metrics
    assert "test_loss" in found and not any("test_loss" in line for line in streamed.state.log_history)


def test_training_stops_early(kit: Kit) -> None:
    given = dict(eval_dataset=rows_of(count=2), callbacks=[EarlyStoppingCallback(1)])
    trainer = kit.trainer(constant(1.0, "one"), given=given, save_steps=1, max_steps=4, **BEST)
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.state.best_model_checkpoint.endswith("checkpoint-1")


LOGS: dict[str, tuple[dict[str, Any], list[tuple[int, bool]]]] = {  # steps of the lines, and whether they have a loss
    "never": (dict(logging_strategy="no"), [(4, False)]),
    "epochs": (dict(logging_strategy="epoch"), [(2, True), (4, True), (4, False)]),
    "shares": (dict(logging_steps=0.5), [(2, True), (4, True), (4, False)]),
    "beyond_the_end": (dict(logging_steps=10), [(4, False)]),
    "between": (dict(logging_steps=3), [(3, True), (4, False)]),
}


@pytest.mark.parametrize(("settings", "lines"), LOGS.values(), ids=LOGS.keys())
def test_what_was_not_logged_is_logged_at_the_end(
    settings: dict[str, Any], lines: list[tuple[int, bool]], kit: Kit
) -> None:
    trainer = kit.trainer(data=rows_of(count=4), max_steps=-1, num_train_epochs=2, **settings)
    result = trainer.train()
    history = trainer.state.log_history
    assert [(line["step"], "loss" in line) for line in history] == lines
    left = lines[-2:-1] != [(4, True)]
    assert ("reward" in history[-1]) == left and ("completions/mean_length" in result.metrics) == left


def test_checkpoints_have_a_card_and_the_processor(kit: Kit) -> None:
    trainer = kit.trainer(save_strategy="steps", save_steps=1)
    trainer.train()
    card = ModelCard.load(kit.output / "README.md")
    assert "grpo" in card.data.tags and (kit.output / "checkpoint-1" / "chat_template.jinja").exists()
    assert hasattr(trainer.processing_class, "image_processor")
    trainer.processing_class.save_pretrained(kit.output / "processor")
    assert list((kit.output / "processor").glob("*processor_config.json"))


ENTROPY: dict[str, Any] = dict(entropy_coef=0.01)


@pytest.mark.parametrize(
    ("settings", "names"),
    [(ENTROPY, {"entropy_coef", "policy_loss"}), (dict(loss_type="cispo", epsilon_high=5.0), {"cispo_clip_ratio"})],
    ids=["entropy", "cispo"],
)
def test_metrics_of_some_losses(settings: dict[str, Any], names: set[str], kit: Kit) -> None:
    trainer = kit.trainer(**settings, max_steps=1)
    trainer.train()
    line = logged(trainer)[0]
    assert names <= line.keys() and ("clip_ratio/low_mean" in line) == ("cispo_clip_ratio" not in names)
    if settings is ENTROPY:
        assert line["policy_loss"] == pytest.approx(line["loss"] + 0.01 * line["entropy"], abs=2e-4)


def test_none_is_no_limit(kit: Kit) -> None:
    assert trained(kit.trainer(top_k=None, generation_kwargs={"do_sample": True}))
    with refused("do_sample"):
        kit.trainer(generation_kwargs={"do_sample": False}, max_steps=1).train()


def test_settings_of_trl_are_no_settings_of_ours(kit: Kit) -> None:
    """A script of which one import was forgotten is refused."""
    trl = pytest.importorskip("trl")
    args = trl.GRPOConfig(str(kit.output), use_cpu=True, bf16=False)
    with refused("args is a trl GRPOConfig: import GRPOConfig from vlmr1 too"):
        assert kit.trainer(given=dict(args=args)) and not OURS
