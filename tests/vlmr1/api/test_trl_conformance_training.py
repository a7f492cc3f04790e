"""The second part of `test_trl_conformance.py`: adapters, objectives, batches, sampling, metrics, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import HfApi
from transformers import AutoModelForImageTextToText

from tests.vlmr1.api.suite import (
    CLEAR,
    ENDS,
    OURS,
    Kit,
    config,
    constant,
    is_vision,
    kit,
    logged,
    recorder,
    refused,
    rows_of,
    table,
    trained,
)
from vlmr1.models.processor import load_processor

pytestmark = pytest.mark.slow

__all__ = ["kit"]


@pytest.mark.parametrize("how", ["float32", "bfloat16", "there_already", "dropout"])
def test_adapters(how: str, kit: Kit) -> None:
    """Only the adapter moves, and it alone is saved; the reference is the model without it."""
    peft = pytest.importorskip("peft")
    settings = dict(target_modules=["q_proj", "v_proj"], lora_dropout=0.05 if how == "dropout" else 0.0)
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    given = dict(model=peft.get_peft_model(kit.model(), lora)) if how == "there_already" else dict(peft_config=lora)
    settings = dict(bf16=True, model_init_kwargs={"dtype": "bfloat16"}) if how == "bfloat16" else {}
    trainer = kit.trainer(given=given, beta=0.1, **settings)
    names = trained(trainer)
    assert {name.split(".self_attn.")[1].split(".")[0] for name in names} == {"q_proj", "v_proj"}
    assert all("lora_" in name for name in names) and logged(trainer)[1]["kl"] > 0
    trainer.save_model(str(kit.output / "saved"))
    assert not (kit.output / "saved" / "model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(kit.model(), kit.output / "saved")
    here = {name: value.float() for name, value in trainer.model.named_parameters()}
    saved = {name: value for name, value in again.named_parameters() if name in names}
    assert saved.keys() == names and all(torch.allclose(v, here[name], atol=1e-2) for name, v in saved.items())


def test_beta_brings_a_reference(kit: Kit) -> None:
    trainer = kit.trainer(beta=0.1, max_steps=3, max_completion_length=12)
    assert trained(trainer)
    kl = [line["kl"] for line in logged(trainer)]
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[2] > 1e-4
    settings = dict(beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    followed = kit.trainer(max_steps=3, **settings)
    assert trained(followed) and [line["kl"] for line in logged(followed)] == pytest.approx([0, 0, 0], abs=1e-5)


OBJECTIVES = {name: ([dict(loss_type=name)], None) for name in ("grpo", "bnpo", "dr_grpo", "dapo")} | {
    "cispo": ([dict(loss_type="cispo", epsilon_high=2.0)], None),
    "soft": ([dict(loss_type="sapo"), dict(loss_type="luspo"), dict(loss_type="vespo")], "loss_type"),
    "sequence": ([dict(importance_sampling_level="sequence", loss_type="grpo")], None),
    "two_sided": ([dict(delta=2.0, epsilon_high=0.28, entropy_coef=0.01)], None),
    "top_entropy": ([dict(top_entropy_quantile=0.2)], "top_entropy_quantile"),
    "normalized": ([dict(multi_objective_aggregation="normalize_then_sum")], None),
}


@pytest.mark.parametrize(("every", "name"), OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_objectives(every: list[dict[str, Any]], name: str | None, kit: Kit) -> None:
    """Two passes over a generation, so that ratios are not 1."""
    for settings in every:
        with refused(name):
            assert trained(kit.trainer([recorder(), constant(1.0, "length")], num_iterations=2, beta=0.01, **settings))


def test_advantages(kit: Kit) -> None:
    for scale in (True, False, "batch"):
        reward, kit.output = recorder(), kit.output / str(scale)
        kit.trainer(reward, scale_rewards=scale, log_completions=True, max_steps=1).train()
        rewards = torch.tensor(reward.calls[0].values).view(2, 2)
        deviation = {True: rewards.std(1, keepdim=True) + 1e-4, False: 1.0, "batch": rewards.std() + 1e-4}[scale]
        expected = ((rewards - rewards.mean(1, keepdim=True)) / deviation).flatten().tolist()
        assert sorted(row["advantage"] for row in table(kit.output)) == pytest.approx(sorted(expected), abs=1e-4)


ARITHMETIC = {  # settings, completions a call, updates a call, updates an epoch of 9 rows
    "plain": ({}, 4, 1, 4),
    "halves": (dict(per_device_train_batch_size=2, num_generations=4, gradient_accumulation_steps=2), 4, 1, 9),
    "accumulation": (dict(gradient_accumulation_steps=2), 8, 1, 2),
    "several_steps": (dict(generation_batch_size=8), 8, 2, 4),
    "iterations": (dict(num_iterations=2), 4, 2, 8),
}


@pytest.mark.parametrize(("settings", "size", "updates", "epoch"), ARITHMETIC.values(), ids=ARITHMETIC.keys())
def test_arithmetic_of_batches(settings: dict[str, Any], size: int, updates: int, epoch: int, kit: Kit) -> None:
    reward = recorder()
    trainer = kit.trainer(reward, rows_of(count=9), max_steps=-1, num_train_epochs=1, **settings)
    assert trained(trainer) and trainer.state.global_step == epoch
    assert [len(call.values) for call in reward.calls] == [size] * (epoch // updates)


def test_truncated_completions_may_be_left_out(kit: Kit) -> None:
    settings = dict(mask_truncated_completions=True, max_completion_length=3, per_device_train_batch_size=8)
    reward = recorder()
    trainer = kit.trainer(reward, given=dict(model=kit.ending()), max_steps=1, **settings)
    assert trained(trainer)
    ended = np.mean([ids[-1] in ENDS for ids in reward.calls[0].ids])
    assert 0 < ended < 1 and logged(trainer)[0]["completions/clipped_ratio"] == pytest.approx(1 - ended)
    endless, reward = kit.model(), recorder()
    endless.generation_config.eos_token_id = [kit.processor().tokenizer.eos_token_id]
    trainer = kit.trainer(reward, given=dict(model=endless), **settings)
    names, cut = trained(trainer), all(ids[-1] > 1 for call in reward.calls for ids in call.ids)  # 0 and 1 end them
    assert not cut or (names == set() and logged(trainer)[0]["loss"] == 0)


def test_how_completions_are_drawn(kit: Kit) -> None:
    """Settings, and `generation_kwargs`, which go before them; with one token to draw from, a group is one text."""
    penalized = dict(top_p=1e-6, repetition_penalty=1.1)
    for settings in (dict(temperature=3.0), dict(top_k=1), penalized, dict(generation_kwargs={"top_k": 1})):
        reward = recorder()
        kit.trainer(reward, max_steps=1, **settings).train()
        ids = reward.calls[0].ids
        assert (ids[0] == ids[1] and ids[2] == ids[3]) == ("temperature" not in settings)


def test_completions_end(kit: Kit) -> None:
    """At any of the tokens that the model says, or the tokenizer; the others at the limit."""
    reward, seen, last = recorder(), recorder(), recorder()
    kit.trainer(reward, given=dict(model=kit.ending()), max_completion_length=5).train()
    for ids in [ids for call in reward.calls for ids in call.ids]:
        stops = [i for i, each in enumerate(ids) if each in ENDS]
        assert stops == [len(ids) - 1] or (stops == [] and len(ids) == 5)
    model, processor, greedy = kit.model(), kit.processor(), dict(top_k=1, max_steps=1, shuffle_dataset=False)
    kit.trainer(seen, given=dict(model=copy.deepcopy(model)), **greedy).train()
    ids = seen.calls[0].ids[0]
    model.generation_config.eos_token_id = None
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(ids[2])
    kit.trainer(last, given=dict(model=model, processing_class=processor), **greedy).train()
    assert last.calls[0].ids[0] == ids[: ids.index(ids[2]) + 1]


def test_the_chat_template_gets_its_arguments(kit: Kit) -> None:
    processor = kit.processor()
    guard = "{% if not asked %}{{ raise_exception('asked is not set') }}{% endif %}"
    processor.chat_template = guard + processor.chat_template
    assert trained(kit.trainer(given=dict(processing_class=processor), chat_template_kwargs={"asked": True}))


def test_callbacks_and_optimizers(kit: Kit) -> None:
    logs = []

    class Watching(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3 and kwargs["model"] is not None

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs.append(dict(kwargs["logs"]))

    model = kit.model()
    given = dict(model=model, callbacks=[Watching()], optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None))
    trainer = kit.trainer(given=given, max_steps=5)
    trainer.train()
    assert trainer.state.global_step == 3 and len(logs) == 4  # the last one is of the run
    assert {"reward", "rewards/score/mean", "completions/mean_length"} <= logs[0].keys()
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), torch.optim.SGD)


def test_metrics(kit: Kit) -> None:
    """All that the documentation names, and what they say."""
    reward = recorder()
    trainer = kit.trainer(reward, given=dict(model=kit.ending()), beta=0.1, per_device_train_batch_size=8)
    trainer.train()
    ends, clipped = ("mean", "min", "max"), ("region_mean", "low_mean", "low_min", "high_mean", "high_max")
    names = {f"completions/{end}{kind}_length" for end in ends for kind in ("", "_terminated")}
    names |= {f"clip_ratio/{each}" for each in clipped} | {"completions/clipped_ratio", "entropy", "kl", "num_tokens"}
    names |= {"step_time", "loss", "grad_norm", "learning_rate", "epoch", "step"}
    for line, call in zip(logged(trainer), reward.calls, strict=True):
        assert names <= line.keys(), sorted(names - line.keys())
        values, lengths = torch.tensor(call.values), torch.tensor([float(len(ids)) for ids in call.ids])
        ended, pairs = torch.tensor([ids[-1] in ENDS for ids in call.ids]), values.view(-1, 2)
        expected = dict(reward=values.mean(), reward_std=values.std())
        expected |= {"rewards/score/mean": values.mean(), "rewards/score/std": values.std()}
        expected |= {f"completions/{end}_length": getattr(lengths, end)() for end in ends}
        expected |= {f"completions/{end}_terminated_length": getattr(lengths[ended], end)() for end in ends}
        expected |= {"frac_reward_zero_std": (pairs[:, 0] == pairs[:, 1]).float().mean()}
        assert {name: line[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()})
    assert 0 < logged(trainer)[0]["num_tokens"] < logged(trainer)[1]["num_tokens"]


def test_a_frozen_tower_stays_and_what_is_saved_is_an_ordinary_model(kit: Kit) -> None:
    model, saved = kit.model(), kit.output / "saved"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_vision(name))
    trainer = kit.trainer(given=dict(model=model))
    assert {is_vision(name) for name in trained(trainer)} == {False}
    trainer.save_model(str(saved))
    again, here = AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.float32), trainer.model.state_dict()
    assert all(torch.equal(value, here[name]) for name, value in again.state_dict().items())
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]
    texts = [each.apply_chat_template(chat, tokenize=False) for each in (load_processor(saved), kit.processor())]
    assert texts[0] == texts[1]


def test_a_run_goes_on_from_its_checkpoint(kit: Kit) -> None:
    settings = dict(save_strategy="steps", save_steps=1, save_total_limit=2)
    kit.trainer(max_steps=3, **settings).train()
    assert {path.name for path in kit.output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    reward = recorder()
    again = kit.trainer(reward, max_steps=5, **settings)
    again.train(resume_from_checkpoint=True)
    assert [line["step"] for line in logged(again)] == [1, 2, 3, 4, 5] and len(reward.calls) == 2


def test_push_to_hub(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[dict[str, Any]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: pushed.append(given))
    trainer = kit.trainer(hub_model_id="me/mine", max_steps=1)
    trainer.train()
    trainer.push_to_hub(dataset_name="me/rows")
    assert pushed[0]["repo_id"] == "me/mine" and Path(pushed[0]["folder_path"]) == kit.output
    assert (kit.output / "model.safetensors").exists() and (kit.output / "README.md").exists()


def test_what_cannot_be_is_refused_by_name(kit: Kit) -> None:
    """Of TRL vLLM, where it is not installed, and tools that a chat template has no words for; of the drop-in all."""
    twice = dict(generation_batch_size=8, steps_per_generation=2)
    for settings in (dict(per_device_train_batch_size=3), dict(num_generations=1), twice):
        with pytest.raises(CLEAR, match="generation"):
            config(kit.output, **settings)
    with pytest.raises((ImportError, *CLEAR), match="vllm"):
        kit.trainer(use_vllm=True)
    with pytest.raises(TypeError, match="no_such_setting"):
        config(kit.output, no_such_setting=1)
    for name in ("tools", "rollout_func", "environment_factory") if OURS else ("tools",):
        with pytest.raises(CLEAR, match="tool" if name == "tools" else name):
            kit.trainer(given={name: [len] if name == "tools" else len})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels, and bfloat16 by default, need a GPU")
def test_on_a_gpu(kit: Kit) -> None:
    assert trained(kit.trainer(use_liger_kernel=True, use_cpu=False))
    assert kit.trainer(given=dict(args=None)).args.output_dir.endswith("-GRPO")
