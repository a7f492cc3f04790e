"""TRL's own GRPOTrainer at the benchmark's shapes: one update from given groups, and whole steps.

The trainer is TRL's, whole, made by its constructor; nothing of it is replaced. Of an update only the rollout is not
run: completions and advantages are given, and the tensors that it would make of them are made here, old log-probs
among them, as they are given to the other arms. A step is TRL's `training_step` for each micro-batch, which draws all
its prompts' completions in one `generate` at the first of them, and the optimizer.

Settings that are not TRL's defaults: the loss is the mean over sequences of the mean over tokens (`loss_type="grpo"`),
as in the other arms; the bias correction of the KL is off, which is another loss; gradient checkpointing is as in the
other arms (its default is on); micro-batches are of one group. Float32 runs without `bf16`, which is on by default and
is on with bfloat16 weights. What `Trainer.train` does to the model before its first step, Liger's kernels and gradient
checkpointing, is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks import model as bench_model
from benchmarks.peers.clock import Clock, charged, untimed
from vlmr1.models.family import joined
from vlmr1.types import Group

QUESTION = "Locate the digit 7"


class TRLArm:
    """One update of TRL's trainer, from given groups."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        groups: Sequence[Group],
        beta: float,
        output: Path,
        *,
        checkpointing: bool = False,
        liger: bool = False,
    ):
        length, size = len(groups[0].completions[0].token_ids), len(groups[0].completions)
        options = {"num_generations": size, "max_completion_length": length, "beta": beta, "liger": liger}
        prompt = [{"role": "user", "content": "never read"}]
        self.trainer: Any = trainer_of(
            model, processor, output, len(groups), zeros, prompt, checkpointing=checkpointing, **options
        )
        self.model = self.trainer.model
        if self.trainer.ref_model is not None:
            bench_model.perturb(self.trainer.ref_model)
        self.inputs = [placed(batch(group, model.config.image_token_id), self.model.device) for group in groups]

    def update(self, clock: Clock = untimed) -> Tensor:
        """Reference forward, policy forward, loss and backward of every micro-batch; the loss."""
        self.model.train()
        batches = []
        for inputs in self.inputs:
            with clock("reference"):
                batches.append(inputs | {"ref_per_token_logps": self._reference(inputs)})
        total = torch.zeros((), device=self.model.device)
        for inputs in batches:
            with clock("forward"), self.trainer.compute_loss_context_manager():
                loss = self.trainer.compute_loss(self.model, inputs)
            with clock("backward"):
                self.trainer.accelerator.backward(loss)
            total += loss.detach()
        return total

    @torch.no_grad()
    def _reference(self, inputs: dict[str, Any]) -> Tensor | None:
        if self.trainer.ref_model is None:
            return None
        names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        logp, _, _ = self.trainer._get_per_token_logps_and_entropies(
            self.trainer.ref_model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            batch_size=len(inputs["prompt_ids"]),
            **{name: inputs[name] for name in names},
        )
        return logp


class TRLStep:
    """Whole steps of TRL's trainer: its own generation, rewards, reference pass, loss, backward, optimizer."""

    def __init__(
        self,
        folder: Path,
        prompts: int,
        beta: float,
        reward: Callable[..., list[float]],
        *,
        shape: bench_model.Shape = bench_model.BENCH,
        weights: tuple[Any, Any] | None = None,
        checkpointing: bool = False,
        liger: bool = False,
    ):
        """`weights`: model and processor, where they are not those that `folder` holds in float32."""
        from PIL import Image

        model, processor = weights or bench_model.read(folder)
        question = QUESTION + "\n" * lines(folder, model, processor, shape)
        prompt = [{"role": "user", "content": question}]
        size, self.length, self.prompts = shape.num_generations, shape.completion_length, prompts
        self.trainer: Any = trainer_of(
            model,
            processor,
            folder / "output" / "trl",
            prompts,
            reward,
            prompt,
            num_generations=size,
            max_completion_length=self.length,
            beta=beta,
            checkpointing=checkpointing,
            liger=liger,
            generation_kwargs={
                "min_new_tokens": self.length,
                "suppress_tokens": bench_model.placeholders(model),
            },
        )
        self.model = self.trainer.model
        self.optimizer = self.trainer.create_optimizer()
        paths = [bench_model.image_of(folder, shape, index) for index in range(prompts)]
        images = [Image.open(path).convert("RGB") for path in paths]
        self.rows = [{"prompt": prompt, "image": image} for image in images for _ in range(size)]

    def run(self, clock: Clock = untimed) -> None:
        """One step."""
        with phases_charged(self.trainer, clock):
            for _ in range(self.prompts):
                self.trainer.training_step(self.model, self.rows, None)
        width = self.trainer._buffered_inputs[0]["completion_ids"].shape[1]
        if width != self.length:
            raise RuntimeError(f"TRL drew {width} tokens")
        with clock("update"):
            self.optimizer.step()
            self.model.zero_grad(set_to_none=True)


def trainer_of(
    model: Any,
    processor: Any,
    output: Path,
    prompts: int,
    reward: Callable[..., list[float]],
    prompt: list[dict[str, str]],
    *,
    checkpointing: bool,
    liger: bool,
    **settings: Any,
) -> Any:
    """TRL's trainer, its model as `train` makes it before the first step."""
    import datasets
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    config = GRPOConfig(
        output_dir=str(output),
        use_cpu=not torch.cuda.is_available(),
        bf16=model.dtype == torch.bfloat16,
        gradient_checkpointing=checkpointing,
        use_liger_kernel=liger,
        per_device_train_batch_size=settings["num_generations"],
        gradient_accumulation_steps=prompts,
        loss_type="grpo",
        use_bias_correction_kl=False,
        report_to="none",
        **settings,
    )
    trainer: Any = GRPOTrainer(
        model=model,
        reward_funcs=reward,  # type: ignore[arg-type]
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt}]),
        processing_class=processor,
    )
    trainer.current_gradient_accumulation_steps = prompts  # the training loop sets it
    if liger:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(trainer.model, config.liger_kernel_config)
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)  # autocast, with bfloat16
    return trainer


def zeros(completions: list[Any], **_: Any) -> list[float]:
    """Rewards that are never read."""
    return [0.0] * len(completions)


def lines(folder: Path, model: Any, processor: Any, shape: bench_model.Shape) -> int:
    """How many line ends after the question make the prompt as long as the shape says."""
    if shape.prompt_length is None:
        return 0
    from vlmr1.data.prompts import PromptBuilder
    from vlmr1.models import family_of

    prompt = bench_model.prompt_of(folder, PromptBuilder(model, family_of(model), processor), shape, 0)
    return prompt.sample.messages[0]["content"][-1]["text"].count("\n")


@contextmanager
def phases_charged(trainer: Any, clock: Clock) -> Iterator[None]:
    """Within it, the trainer's methods charge the clock; rewards and reference pass are taken from the rollout's."""
    if clock is untimed:
        yield
        return

    def pass_of(model: Any, *_: Any) -> str:
        return "reference" if model is trainer.ref_model else "forward"

    wrapped = {
        "_generate_and_score_completions": "rollout",
        "_calculate_rewards": "reward",
        "_get_per_token_logps_and_entropies": pass_of,
        "_compute_loss": "forward",
    }
    for name, phase in wrapped.items():
        setattr(trainer, name, charged(getattr(trainer, name), clock, phase))
    trainer.accelerator.backward = charged(trainer.accelerator.backward, clock, "backward")
    try:
        yield
    finally:
        for name in wrapped:
            delattr(trainer, name)  # the class's own is seen again
        del trainer.accelerator.backward


def batch(group: Group, image_token_id: int) -> dict[str, Any]:
    """A micro-batch as TRL makes it of one group: the prompt and its image G times, completions padded."""
    assert group.advantages is not None
    size, prompt = len(group.completions), group.prompt
    prompt_ids = prompt.input_ids.repeat(size, 1)  # [G, L_p]
    ids = [completion.token_ids for completion in group.completions]
    completion_ids = pad_sequence(ids, batch_first=True)  # [G, C]
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    images = {name: torch.cat([value] * size) for name, value in joined(prompt.images).items()}
    types = torch.cat([(prompt_ids == image_token_id).long(), torch.zeros_like(completion_ids)], dim=1)
    old = [completion.logp for completion in group.completions if completion.logp is not None]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": mask,
        "advantages": group.advantages,
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": pad_sequence(old, batch_first=True),
        "num_images": [len(prompt.images)] * size,
        "mm_token_type_ids": types,
    } | images


def placed(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """`inputs`, its tensors on the device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
