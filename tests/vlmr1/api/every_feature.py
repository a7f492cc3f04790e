# ruff: noqa: I001
"""A script of TRL that uses many features at once; `test_every_feature.py` runs it with both trainers."""

import asyncio
from dataclasses import dataclass
from typing import ClassVar

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from vlmr1.models.processor import load_processor  # which needs no torchvision


@dataclass
class Arguments(ScriptArguments):
    reward_model: str = ""


def accuracy(completions, solution, **kwargs):
    found = [float(answer in c[0]["content"]) for c, answer in zip(completions, solution, strict=True)]
    return [None if answer == "3" else value for answer, value in zip(solution, found, strict=True)]


async def length(completion_ids, trainer_state, log_metric, log_extra, **kwargs):
    await asyncio.sleep(0)
    log_metric("longest", max(map(len, completion_ids)))
    log_extra("step_seen", [trainer_state.global_step] * len(completion_ids))
    return [sum(ids) % 11 / 11 for ids in completion_ids]


class Steps(TrainerCallback):
    seen: ClassVar[list[int]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(state.global_step)


parser = TrlParser((Arguments, GRPOConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
dtype = model_args.dtype if model_args.dtype in ["auto", None] else getattr(torch, model_args.dtype)
loading = dict(revision=model_args.model_revision, attn_implementation=model_args.attn_implementation, dtype=dtype)
rows = load_dataset("parquet", data_files=script_args.dataset_name, split="train", streaming=True)
held_out = load_dataset("parquet", data_files=script_args.dataset_name, split="train[:4]")
processor = load_processor(model_args.model_name_or_path)
processor.chat_template = "{% if not short %}{{ raise_exception('short') }}{% endif %}" + processor.chat_template


def make_trainer() -> GRPOTrainer:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(model_args.model_name_or_path, **loading)
    model.generation_config.eos_token_id = list(range(7, 107))  # a quarter of the vocabulary: many completions end
    model = get_peft_model(model, get_peft_config(model_args))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    judge = AutoModelForSequenceClassification.from_pretrained(script_args.reward_model, num_labels=1)
    return GRPOTrainer(
        model=model,
        args=training_args,
        reward_funcs=[accuracy, length, judge, script_args.reward_model],
        reward_processing_classes=[None, None, AutoTokenizer.from_pretrained(script_args.reward_model), None],
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=processor,
        callbacks=[Steps()],
        optimizers=(optimizer, None),
    )


make_trainer().train()
training_args.max_steps = 6
trainer = make_trainer()
result = trainer.train(resume_from_checkpoint=True)
evaluated = trainer.evaluate()
trainer.save_model(training_args.output_dir)
if training_args.push_to_hub:
    trainer.push_to_hub(dataset_name=script_args.dataset_name)
history = trainer.state.log_history
