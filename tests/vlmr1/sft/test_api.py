"""`from vlmr1 import SFTConfig, SFTTrainer`: TRL's fields and defaults, its run on the same rows, what is refused."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainingArguments

import vlmr1
from tests.helpers.api import rows, tiny
from vlmr1.api.sft_config import REASONS
from vlmr1.api.sft_trainer import ARGUMENTS
from vlmr1.errors import SettingError, UserError
from vlmr1.models import load_model, load_processor
from vlmr1_kernels.testing import relative_error

__all__ = ["tiny"]
SAID = {"completion": lambda i: [{"role": "assistant", "content": f"At place {i}."}]}


def settings(output: Path, **given: Any) -> dict[str, Any]:
    known: dict[str, Any] = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
    known |= dict(output_dir=str(output), per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2)
    return known | dict(logging_steps=1, gradient_checkpointing=False, max_length=None) | given


def trainer_of(tiny: Path, output: Path, given: dict[str, Any] | None = None, **more: Any) -> vlmr1.SFTTrainer:
    arguments: dict[str, Any] = dict(model=str(tiny), train_dataset=rows(**SAID), processing_class=load_processor(tiny))
    return vlmr1.SFTTrainer(args=vlmr1.SFTConfig(**settings(output, **more)), **arguments | (given or {}))


def test_every_field_and_argument_of_trl_is_there_with_its_default():
    trl = pytest.importorskip("trl")
    own = {each.name: each.default for each in fields(vlmr1.SFTConfig) if each.init}
    theirs = {each.name: each.default for each in fields(trl.SFTConfig)}
    assert {name for name in theirs if name not in own} == set()
    assert {name for name in theirs if own[name] != theirs[name]} == {"output_dir"}  # which TRL fills in
    names = [set(each.__init__.__code__.co_varnames) for each in (trl.SFTTrainer, vlmr1.SFTTrainer)]
    assert {"formatting_func", "peft_config", "optimizers"} | ARGUMENTS.keys() <= names[0] & names[1]


@pytest.mark.parametrize("name", sorted(REASONS))
def test_what_cannot_be_honoured_is_refused_by_name(name, tmp_path):
    default = vlmr1.SFTConfig.__dataclass_fields__[name].default
    other = {"completion_only_loss": False, "eval_packing": True, "router_aux_loss_coef": 0.1}.get(name)
    other = (not default if isinstance(default, bool) else "other") if other is None else other
    with pytest.raises(SettingError) as error:
        vlmr1.SFTConfig(**settings(tmp_path, **{name: other}, label_smoothing_factor=0.1))
    assert [line.split()[0] for line in str(error.value).splitlines()] == [name, "label_smoothing_factor"]


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_arguments_that_are_refused(name, tiny, tmp_path):
    with pytest.raises(SettingError, match=f"^{name}: "):
        trainer_of(tiny, tmp_path, {name: object()})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": None}, "^model is a NoneType: give"),
    "args": ({"args": TrainingArguments("out", use_cpu=True)}, "TrainingArguments: import SFTConfig from vlmr1 too$"),
    "callbacks": ({"callbacks": TrainerCallback()}, "^callbacks is a TrainerCallback: give a list$"),
    "optimizers": ({"optimizers": None}, "^optimizers must be a pair"),
}


@pytest.mark.parametrize(("given", "words"), WRONG.values(), ids=WRONG.keys())
def test_arguments_of_another_type(given, words, tiny, tmp_path):
    with pytest.raises(SettingError, match=words):
        vlmr1.SFTTrainer(**{"model": str(tiny), "args": vlmr1.SFTConfig(**settings(tmp_path))} | given)


CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str | None]] = {
    "messages": ([{"messages": CHAT}], {"assistant_only_loss": True}, None),
    "all tokens": ([{"messages": CHAT}], {}, "train_dataset:1: .*assistant_only_loss=True"),
    "turns": ([{"messages": CHAT * 2}], {"assistant_only_loss": True}, "train_dataset:1: assistant_only_loss"),
    "text": ([{"text": "Where? Here."}], {}, "train_dataset:1: no conversations"),
    "text prompt": ([{"prompt": "Where?", "completion": "Here."}], {}, "train_dataset:1: the prompt is text"),
    "no answer": ([{"prompt": CHAT[:1]}], {}, "train_dataset:1: no answer"),
    "none": ([], {}, "train_dataset has no rows"),
}


@pytest.mark.parametrize(("given", "more", "words"), ROWS.values(), ids=ROWS.keys())
def test_rows(given, more, words, tiny, tmp_path):
    if words is not None:
        with pytest.raises(UserError, match=words):
            trainer_of(tiny, tmp_path, {"train_dataset": given}, **more)
        return
    trainer = trainer_of(tiny, tmp_path, {"train_dataset": given}, **more)
    assert trainer.train_dataset[0].completions[0].text == "Here."
    assert trainer.processing_class is trainer.processor


@pytest.mark.slow
def test_a_script_of_trl_gives_the_same_run(tiny, tmp_path):
    """The losses, metrics and weights of three updates on all rows, and an evaluation, as TRL's trainer has them."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    logs, weights, evaluations = [], [], []
    for kind in (trl, vlmr1):
        table = Dataset.from_list(rows(**SAID))
        args = kind.SFTConfig(
            **settings(tmp_path, max_steps=3, per_device_train_batch_size=8, per_device_eval_batch_size=8, optim="sgd")
        )
        arguments: dict[str, Any] = dict(train_dataset=table, eval_dataset=table, processing_class=load_processor(tiny))
        model = load_model(tiny)
        trainer = kind.SFTTrainer(model=model, args=args, **arguments)
        evaluations.append(trainer.evaluate())
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "loss" in log])
        weights.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    assert len(logs[0]) == len(logs[1]) == 3
    for theirs, ours in zip(*logs, strict=True):
        assert theirs.keys() <= ours.keys()
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-5)
    names = [f"eval_{name}" for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens")]
    theirs, ours = ({name: found[name] for name in names} for found in evaluations)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert max(relative_error(weights[1][name], weights[0][name]) for name in weights[0]) < 1e-5
