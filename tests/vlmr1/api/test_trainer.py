"""The exported GRPOTrainer where the conformance suite does not look: rows, streams, resume, evaluation, refusals."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, TrainerCallback, set_seed

from tests.helpers.api import rows, sums, trainer_of
from tests.helpers.slow import mostly_slow
from vlmr1.api import metrics
from vlmr1.api.rows import samples_of
from vlmr1.errors import DataError, SettingError
from vlmr1.models.processor import load_processor
from vlmr1.report.progress import read_metrics
from vlmr1.rollout.stop_tokens import decode

LORA = dict(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, task_type="CAUSAL_LM")


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def lines(trainer: Any) -> list[dict[str, float]]:
    """The logs of updates, without what is measured."""
    measured = ("seconds", "memory", "tokens_per_second", "step_time", "rollout/")
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return [{n: v for n, v in line.items() if not any(each in n for each in measured)} for line in logged]


class Killed(Exception):
    """In place of a signal."""


class Kill(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise Killed


@pytest.mark.parametrize("kind", mostly_slow(["whole", "lora", "stream"], "lora"))
@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(kind: str, tiny: Path, tmp_path: Path) -> None:
    """Two updates a generation, of which the checkpoint is in the middle."""
    given: dict[str, Any] = {}
    if kind == "lora":
        given = dict(peft_config=pytest.importorskip("peft").LoraConfig(**LORA))
    if kind == "stream":
        given = dict(train_dataset=iter_of(rows(6)))
    settings: dict[str, Any] = dict(max_steps=6, num_iterations=2, save_strategy="steps", save_steps=3, beta=0.1)
    whole = trainer_of(tiny, tmp_path / "whole", given, **settings)
    whole.train()
    with pytest.raises(Killed):
        trainer_of(tiny, tmp_path / "killed", given | dict(callbacks=[Kill()]), **settings).train()
    again = trainer_of(tiny, tmp_path / "killed", given, **settings)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(again), weights(whole))
    assert lines(again) == lines(whole) and again.state.global_step == 6


def iter_of(every: list[dict[str, Any]]) -> Any:
    class Stream:
        def __iter__(self) -> Any:
            return iter(every)

    return Stream()


def test_a_stream_is_read_in_its_order_and_again(tiny: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def reward(place: list[int], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(place[::2])
        return sums(completion_ids)

    trainer_of(tiny, tmp_path, dict(train_dataset=iter_of(rows(3)), reward_funcs=reward)).train()
    assert seen == [0, 1, 2, 0]


def noisy(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(ids) % 7 + random.random() for ids in completion_ids]


def test_an_evaluation_changes_no_training(tiny: Path, tmp_path: Path) -> None:
    given = dict(eval_dataset=rows(3), reward_funcs=noisy)
    settings: dict[str, Any] = dict(eval_steps=1, beta=0.1)
    plain, evaluated = (
        trainer_of(tiny, tmp_path / how, given, eval_strategy=how, **settings) for how in ("no", "steps")
    )
    for trainer in (plain, evaluated):
        set_seed(0)
        trainer.train()
    assert_equal(weights(plain), weights(evaluated))
    assert lines(plain) == lines(evaluated)
    assert sum("eval_reward" in line for line in evaluated.state.log_history) == 2


def test_an_evaluation_draws_its_own_completions(tiny: Path, tmp_path: Path) -> None:
    """Each evaluation draws the same ones, and none of those that training draws for the same rows and weights."""
    drawn: list[list[list[int]]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        drawn.append(completion_ids)
        return sums(completion_ids)

    given = dict(train_dataset=rows(2), eval_dataset=rows(2), reward_funcs=reward)
    trainer = trainer_of(tiny, tmp_path, given, max_steps=1, per_device_eval_batch_size=4, shuffle_dataset=False)
    for _ in range(2):
        trainer.evaluate()
    trainer.train()
    first, second, trained = drawn
    assert first == second and not any(ids in trained for ids in first)


def test_the_best_model_is_loaded_at_the_end(tiny: Path, tmp_path: Path) -> None:
    settings = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=3)
    settings |= dict(load_best_model_at_end=True, metric_for_best_model="reward")
    trainer = trainer_of(tiny, tmp_path, dict(eval_dataset=rows(4)), **settings)
    trainer.train()
    rewards = {line["step"]: line["eval_reward"] for line in trainer.state.log_history if "eval_reward" in line}
    best = max(rewards, key=lambda step: (rewards[step], -step))
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / f"checkpoint-{best}").state_dict()
    own = trainer.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in saved.items())


def test_the_loss_of_an_evaluation_is_that_of_its_advantages_and_kl(tiny: Path, tmp_path: Path) -> None:
    """With ratios of 1 and equal lengths the advantages cancel, and beta times the KL is left."""
    trainer = trainer_of(tiny, tmp_path, dict(eval_dataset=rows(4)), beta=0.5, use_bias_correction_kl=False)
    trainer.train()
    phases = trainer.phases
    found = trainer.evaluate()
    assert trainer.phases is phases
    assert found["eval_completions/clipped_ratio"] == 1 and found["eval_kl"] > 1e-3
    assert found["eval_loss"] == pytest.approx(0.5 * found["eval_kl"], rel=1e-4)


def test_a_marker_in_a_text_is_text(tiny: Path, tmp_path: Path) -> None:
    """As in TRL; in data files `<image>` stands for an image."""
    row = {"prompt": [{"role": "user", "content": "What does <image> mean?"}]}
    sample = samples_of([row], "train_dataset")[0]
    assert sample.images == () and sample.messages[0]["content"][0]["text"] == "What does <image> mean?"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "tools": (dict(tools=[len], rollout_func=len), r"(?s)tools: .*rollout_func: "),
    "no_rewards": (dict(reward_funcs=None), "reward_funcs"),
    "unknown_reward": (dict(reward_funcs="acuracy"), "did you mean 'accuracy'"),
    "tokenizers": (dict(reward_processing_classes=[None, None]), "reward_processing_classes has 2"),
    "no_rows": (dict(train_dataset=[]), "train_dataset has no rows"),
    "missing": (dict(train_dataset=None), "train_dataset is missing"),
    "no_data": (dict(train_dataset=3), "train_dataset is neither"),
    "no_prompt": (dict(train_dataset=[{"image": None}]), "train_dataset:1: the column prompt"),
    "text": (dict(train_dataset=[{"prompt": "Where?"}]), "train_dataset:1: the prompt is text"),
    "answered": (
        dict(train_dataset=[{"prompt": [{"role": "assistant", "content": "Yes"}]}]),
        "of assistant, not of user",
    ),
    "both": (dict(train_dataset=[rows(1)[0] | {"images": rows(1)[0]["image"]}]), "both a column image and"),
    "parts": (dict(train_dataset={"train": rows(1)}), "train_dataset is a dict with train: give one"),
    "types": (
        dict(model=3, args={"output_dir": "x"}, callbacks=TrainerCallback(), optimizers=None),
        r"(?s)model is a int.*args is a builtins dict.*callbacks is a TrainerCallback.*optimizers must be a pair",
    ),
    "no_model": (dict(model="no/such-model", processing_class=None), "model_name_or_path"),
}


@pytest.mark.parametrize(("given", "words"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.slow
def test_arguments_that_cannot_be_used(given: dict[str, Any], words: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises((SettingError, DataError), match=words):
        trainer_of(tiny, tmp_path, given)


def test_models_that_cannot_be_trained(tiny: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    with pytest.raises(SettingError, match=r"processing_class is a .*: a processor of text and images"):
        trainer_of(tiny, tmp_path, dict(processing_class=load_processor(tiny).tokenizer))  # type: ignore[attr-defined]
    with pytest.raises(SettingError, match="bfloat16"):
        trainer_of(tiny, tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(SettingError, match="max_steps"):
        trainer_of(tiny, tmp_path, dict(train_dataset=iter_of(rows())), max_steps=-1)
    with pytest.raises(SettingError, match="no complete checkpoint"):
        trainer_of(tiny, tmp_path).train(resume_from_checkpoint=True)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    with pytest.raises(SettingError, match="peft_config"):
        trainer_of(tiny, tmp_path, dict(model=adapted, peft_config=peft.LoraConfig(**LORA)))
    with pytest.raises(SettingError, match=r"peft_config: .*nope"):
        trainer_of(tiny, tmp_path, dict(peft_config=peft.LoraConfig(target_modules=["nope"])))
    head = peft.get_peft_model(
        AutoModelForImageTextToText.from_pretrained(tiny), peft.LoraConfig(target_modules=["lm_head"])
    )
    with pytest.raises(SettingError, match="the adapter has weights at lm_head"):
        trainer_of(tiny, tmp_path, dict(model=head))
    with pytest.raises(TypeError, match="tokenizer"):
        trainer_of(tiny, tmp_path, dict(tokenizer=load_processor(tiny)))


def test_a_partial_is_named_after_its_function(tiny: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny, tmp_path, dict(reward_funcs=partial(sums, unused=1)), max_steps=1)
    trainer.train()
    assert "rewards/sums/mean" in lines(trainer)[0]


def test_settings_of_a_script_that_come_later_are_read(tiny: Path, tmp_path: Path) -> None:
    """TRL's own scripts fill in model_init_kwargs after the settings are made."""
    from tests.helpers.api import settings_of

    args = settings_of(tmp_path)
    args.model_init_kwargs = {
        "attn_implementation": "eager",
        "dtype": torch.float32,
        "revision": "main",
        "device_map": None,
    }
    trainer = trainer_of(tiny, tmp_path, dict(args=args))
    assert trainer.model.config._attn_implementation == "eager"


def test_a_report_is_written(tiny: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny, tmp_path, log_completions=True)
    trainer.train()
    path = trainer.report()
    assert path == tmp_path / "training.html" and "rewards" in path.read_text()


def test_registered_rewards_read_the_solution_as_text(tiny: Path, tmp_path: Path) -> None:
    got: list[Any] = []

    def own(solution: list[Any], completions: list[Any], **_: Any) -> list[float]:
        got.extend(solution)
        return [0.0] * len(completions)

    data = rows(solution=lambda i: f"<answer>{i}</answer>", accu_reward_method=lambda _: "all_match")
    trainer = trainer_of(tiny, tmp_path, dict(reward_funcs=["accuracy", own], train_dataset=data), max_steps=1)
    trainer.train()
    assert "rewards/accuracy/mean" in lines(trainer)[0] and got[0] in {row["solution"] for row in data}

    with pytest.raises(DataError, match="train_dataset:1"):
        trainer_of(tiny, tmp_path, dict(reward_funcs="accuracy", train_dataset=rows(solution=lambda _: "no box")))


def test_dropout_of_model_and_adapter_can_be_switched_off(tiny: Path, tmp_path: Path) -> None:
    """A model with dropout is refused with shared prompts, but not where its dropout is off."""
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(tiny)
    model.config.get_text_config().attention_dropout = 0.1
    with pytest.raises(SettingError, match="attention_dropout"):
        trainer_of(tiny, tmp_path, dict(model=model))
    given = dict(model=model, peft_config=peft.LoraConfig(**LORA))
    trainer = trainer_of(tiny, tmp_path, given, disable_dropout=True)
    dropouts = [module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts and set(dropouts) == {0.0}


def test_an_adapter_of_peft_config_is_merged_for_rollouts(tiny: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(SettingError, match=r"^lora_merge_rollout needs use_peft .in Python peft_config"):
        trainer_of(tiny, tmp_path, lora_merge_rollout=True)
    given = dict(peft_config=peft.LoraConfig(**LORA | {"lora_dropout": 0.0}))
    assert trainer_of(tiny, tmp_path, given, lora_merge_rollout=True).args.lora_merge_rollout


def test_the_reference_of_a_given_adapter_is_the_adapter_as_given(tiny: Path, tmp_path: Path) -> None:
    """So that the KL begins at 0, although the adapter has changed the model."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(AutoModelForImageTextToText.from_pretrained(tiny), peft.LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainer = trainer_of(tiny, tmp_path, dict(model=model), beta=0.1, disable_dropout=True)
    trainer.train()
    first, second = lines(trainer)
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-4


def test_an_evaluation_does_not_keep_the_images_of_all_rows(tiny: Path, tmp_path: Path) -> None:
    settings = dict(freeze_vision=True, beta=0.1, per_device_eval_batch_size=4, tokens_per_pack=64)
    trainer = trainer_of(tiny, tmp_path, dict(eval_dataset=rows(6)), **settings)
    kept, score, loss = [], trainer.score, trainer.policy.loss

    def watched(made: Any) -> Any:
        def call(*given: Any) -> Any:
            found = made(*given)
            kept.append(len(trainer.features.kept))
            return found

        return call

    trainer.score, trainer.policy.loss = watched(score), watched(loss)
    assert "eval_loss" in trainer.evaluate()
    assert len(kept) > 3 and 0 < max(kept) <= 2


def test_a_step_is_shown_once(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By our line, and not by the library's."""
    trainer_of(tiny, tmp_path, disable_tqdm=False).train()
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["step 1", "step 2"]


def test_a_run_of_fewer_updates_than_logging_steps_has_a_report(tiny: Path, tmp_path: Path) -> None:
    """The report has the metrics that are logged at the end."""
    trainer = trainer_of(tiny, tmp_path, logging_steps=10)
    trainer.train()
    assert [row["step"] for row in read_metrics(tmp_path)] == [2] and trainer.report() == tmp_path / "training.html"


def test_a_finished_run_is_not_trained_again(tiny: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(save_strategy="steps", save_steps=1)
    first = trainer_of(tiny, tmp_path, **settings)
    first.train()
    again = trainer_of(tiny, tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert_equal(weights(again), weights(first))


def test_tokens_of_a_generation_are_counted_once(tiny: Path, tmp_path: Path) -> None:
    """Two updates on its halves, each made twice."""
    settings: dict[str, Any] = dict(steps_per_generation=2, num_iterations=2, max_steps=4)
    trainer = trainer_of(tiny, tmp_path, dict(train_dataset=rows(7)), **settings)
    trainer.train()
    prompts = {i: len(trainer.train_dataset[i].input_ids) for i in range(7)}
    assert len(set(prompts.values())) == 1
    counts = [line["num_tokens"] for line in lines(trainer)]
    half = [4 * prompts[0] + 4 * line["completions/mean_length"] for line in lines(trainer)]
    assert counts == [half[0], half[0] + half[1], half[0] + half[1], half[0] + half[1]]


def test_special_tokens_are_no_part_of_a_completion(tiny: Path, tmp_path: Path) -> None:
    """As in TRL. The command line keeps those that end no completion."""
    tokens: Any = load_processor(tiny).tokenizer  # type: ignore[attr-defined]
    ids = [*tokens("Where").input_ids, tokens.convert_tokens_to_ids("<|im_start|>")]
    texts = [decode(tokens, ids, frozenset(), skip_special=skip) for skip in (True, False)]
    assert texts == ["Where", "Where<|im_start|>"]
    assert trainer_of(tiny, tmp_path).engine.skip_special_tokens


def test_the_deviation_of_rewards_is_that_of_the_known_ones():
    assert metrics._std(torch.tensor([2.0, torch.nan])) == 0
    assert metrics._std(torch.tensor([1.0, torch.nan, 3.0])) == pytest.approx(2**0.5)
