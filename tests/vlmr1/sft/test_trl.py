"""TRL's own SFTTrainer on the same rows: losses, metrics and weights of accumulated updates; and a script of TRL that
runs with another import."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlmr1
from tests.helpers.answers import assert_moved_alike
from tests.helpers.api import tiny
from vlmr1.errors import SettingError
from vlmr1.models import load_model, load_processor

__all__ = ["tiny"]
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
SIZES = ((84, 56), (56, 56), (112, 84))


def rows(count: int) -> list[dict[str, Any]]:
    """Prompts with one image, two or none, some with a message of the system; answers of 1 to 34 words."""
    random = np.random.default_rng(0)
    found = []
    for place in range(count):
        pixels = [random.integers(0, 255, (*SIZES[(place + i) % 3], 3), dtype=np.uint8) for i in range(place % 3)]
        prompt = [{"role": "user", "content": f"Where is {place}?"}]
        if place % 4 == 1:
            prompt.insert(0, {"role": "system", "content": "Answer briefly."})
        answer = " ".join(f"{place}, {word}" for word in range(1 + place * 11 % 34))
        completion = [{"role": "assistant", "content": answer}]
        found.append({"prompt": prompt, "completion": completion, "images": list(map(Image.fromarray, pixels))})
    return found


def trained(kind: Any, tiny: Path, output: Path, **given: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Logs and weights of three updates of four rows each by the trainer of a library."""
    known: dict[str, Any] = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
    known |= dict(num_train_epochs=1, logging_steps=1, gradient_checkpointing=False, max_length=150)
    known |= dict(optim="sgd", learning_rate=0.1)
    model = load_model(tiny)
    trainer = kind.SFTTrainer(
        model=model,
        args=kind.SFTConfig(str(output), **known | given),
        train_dataset=datasets.Dataset.from_list(rows(12)),
        processing_class=load_processor(tiny),
    )
    # Qwen2.5-VL's class says that it takes no count of tokens: TRL would take the mean of the means of the passes.
    trainer.model_accepts_loss_kwargs = True
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log], dict(model.named_parameters())


@pytest.mark.parametrize(("size", "passes"), [(4, 1), (2, 2)], ids=["one pass", "two passes"])
def test_updates_are_those_of_trl(size, passes, tiny, tmp_path):
    """Rows in the same order, unequal lengths, one answer cut at max_length; two passes count their tokens together."""
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
    (theirs, expected), (ours, found) = (trained(kind, tiny, tmp_path, **sizes) for kind in (trl, vlmr1))
    assert len(theirs) == len(ours) == 3 and sum(log["truncated"] for log in ours) > 0
    means = {"entropy", "mean_token_accuracy"} if passes > 1 else set()  # TRL's are means over passes
    for one, other in zip(ours, theirs, strict=True):
        names = other.keys() - means
        assert {name: one[name] for name in names} == pytest.approx({name: other[name] for name in names}, rel=1e-5)
    assert_moved_alike(found, expected, dict(load_model(tiny).named_parameters()))


SCRIPT = """
from datasets import Dataset
from peft import LoraConfig
from LIBRARY import SFTConfig, SFTTrainer

def trainer_of(epochs):
    args = SFTConfig(
        output_dir=output,
        learning_rate=1e-3,
        max_length=512,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=epochs,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="epoch",
        dataset_num_proc=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows[:8]),
        eval_dataset=Dataset.from_list(rows[8:]),
        processing_class=processor,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )

trainer = trainer_of(epochs=1)
first = trainer.train()
trainer = trainer_of(epochs=2)
second = trainer.train(resume_from_checkpoint=True)
trainer.save_model(output)
metrics = trainer.evaluate()
"""


@pytest.mark.slow
def test_a_script_of_trl_with_another_import(tiny, tmp_path):
    """Steps, keys of logs, files and the values of an evaluation behind an adapter's two epochs, resumed between."""
    found = {}
    for library in ("trl", "vlmr1"):
        output = tmp_path / library
        names: dict[str, Any] = {"model": str(tiny), "output": str(output), "rows": rows(12)}
        names["processor"] = load_processor(tiny)
        exec(SCRIPT.replace("LIBRARY", library), names)
        assert (names["first"].global_step, names["second"].global_step) == (2, 4)
        assert names["second"].training_loss > 0
        found[library] = names, output
    (theirs, there), (ours, here) = found["trl"], found["vlmr1"]
    logs = [each["trainer"].state.log_history for each in (theirs, ours)]
    for one, other in zip(*[[log for log in own if "loss" in log] for own in logs], strict=True):
        assert one.keys() <= other.keys() and one["step"] == other["step"]
        assert {"loss", "grad_norm", "learning_rate", "mean_token_accuracy", "num_tokens", "entropy"} <= other.keys()
    assert theirs["metrics"].keys() <= ours["metrics"].keys()
    for each in ("adapter_model.safetensors", "adapter_config.json", "checkpoint-2", "checkpoint-4/trainer_state.json"):
        assert (there / each).exists() and (here / each).exists(), each


USAGES: dict[str, tuple[dict[str, Any], str]] = {  # what of TRL's documentation, and what it is refused by
    "packing": ({"packing": True}, "packing"),
    "eos_token": ({"eos_token": "<|im_end|>"}, "eos_token"),
    "template": ({"chat_template_path": "template.jinja"}, "chat_template_path"),
    "side": ({"truncation_mode": "keep_end"}, "truncation_mode"),
    "dft": ({"loss_type": "dft"}, "loss_type"),
    "offloading": ({"activation_offloading": True}, "activation_offloading"),
    "all tokens": ({"completion_only_loss": False}, "completion_only_loss"),
    "preparation": ({"dataset_kwargs": {"skip_prepare_dataset": True}, "dataset_num_proc": 2}, ""),
    "no padding": ({"padding_free": True}, ""),
}


@pytest.mark.parametrize(("given", "name"), USAGES.values(), ids=USAGES.keys())
def test_usages_are_honoured_or_refused_by_name(given, name, tiny, tmp_path):
    """Also a stream of rows, which needs max_steps as in TRL."""
    known: dict[str, Any] = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=1)
    if name:
        with pytest.raises(SettingError, match=f"^{name} is "):
            vlmr1.SFTConfig(str(tmp_path), **known | given)
        return
    stream = datasets.Dataset.from_list(rows(8)).to_iterable_dataset()
    args = vlmr1.SFTConfig(str(tmp_path), save_strategy="no", logging_steps=1, **known | given)
    trainer = vlmr1.SFTTrainer(str(tiny), args, train_dataset=stream, processing_class=load_processor(tiny))
    assert trainer.train().global_step == 1
    args.max_steps = -1
    with pytest.raises(SettingError, match="set max_steps"):
        vlmr1.SFTTrainer(str(tiny), args, train_dataset=stream, processing_class=load_processor(tiny))
