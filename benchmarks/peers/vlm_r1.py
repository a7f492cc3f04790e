"""VLM-R1's training step, written anew: the same work in the same order, on the model and groups of this benchmark.

What is done here and why, by the published source (github.com/om-ai-lab/VLM-R1 at commit 0ae0aea,
src/open-r1-multimodal/src/open_r1/trainer/grpo_trainer.py, class `VLMGRPOTrainer`, line numbers of that file):

- A group is G rows of one micro-batch; each row opens its image, and the processor sees prompt and image G times
  (`_generate_and_score_completions`, 525-560). All of that is inside the step, and so it is here, in the rollout.
- One `generate` a micro-batch, on the G rows (579-583), in training mode. It samples with `GenerationConfig(
  max_new_tokens, do_sample, temperature=1, pad_token_id)` (371-376): top_k stays at that class's default, 50.
- Log-probs: logits of every position of prompt and completion, then row by row a log-softmax in the dtype of the
  model and a gather (`_get_per_token_logps`, 495-505); what belongs to the prompt is cut off afterwards (631, 742).
- A reference pass like it (619-631) on a frozen copy (293-306); none where beta is 0.
- `num_iterations` 1 makes no pass for old log-probs (611-617) and takes the policy's own, detached (749); above 1 it
  takes those that were stored (611-615, 749), which are the given ones of an update here.
- Advantages: rewards less their group's mean, over its standard deviation + 1e-4 (676-682).
- Loss: clipped ratio, the k3 estimate of the KL times beta, mean over a sequence's tokens, mean over sequences
  (749-769); the base trainer divides it by the number of micro-batches (437-440).
- Gradient checkpointing, reentrant, where the script asks for it (289-291, 453-483).

The run scripts are not part of the source that was read. Copies of `run_scripts/run_grpo_rec.sh` in forks (LiPengze97
and oguz-kolukisa) have gradient_checkpointing true, flash_attention_2, beta 0.04, bfloat16 and ZeRO stage 3; commands
in its threads of February and March 2025 (77, 164) have gradient_checkpointing false. It is on in the published form
here.

The rollout has a KV cache in both forms. The source sets `use_cache` of the model's config to False where it
checkpoints (248-251, 456), but hands `generate` a configuration of its own, whose `use_cache` is True; in transformers
4.49.0, which its setup asks for (a fork's copy of it, and thread 300), the decoder drops the flag and not the cache
(models/qwen2_5_vl/modeling_qwen2_5_vl.py, 1151-1156 and 1196-1206), so that each step computes one position. Run there
on a small random model in training mode with checkpoints, `generate` computed one position a step and drew the greedy
tokens that it drew without them. transformers 5.23 takes the cache from a layer that checkpoints while it trains, and
feeds one position all the same: what it draws is wrong. Here `generate` runs in evaluation mode, which draws what
4.49.0 draws: the model has no dropout.

Left out, each in its favour: ZeRO's sharding and float32 masters (AdamW works on the weights as they are), its
metrics, the search for a stop token (there is none here), the KV cache that transformers makes in a training pass
unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import model as bench_model
from benchmarks.peers.clock import Clock, untimed
from vlmr1.data.prompts import PromptBuilder
from vlmr1.models import family_of
from vlmr1.models.family import joined
from vlmr1.types import Group

EPSILON = 0.2  # its GRPOConfig's default
ADVANTAGE_EPSILON = 1e-4
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Form:
    """As published, or repaired: `checkpointing` as in the arms beside it, `top_k` off, so that what is drawn follows
    the distribution whose log-probs enter the loss."""

    checkpointing: bool = True
    top_k: int = 50


@dataclass(frozen=True)
class Rows:
    """A micro-batch: the rows of one group, prompts first."""

    input_ids: Tensor  # [G, P + C]
    prompt_length: int
    images: dict[str, Tensor]  # of all G rows: the image G times

    def completion_ids(self) -> Tensor:
        return self.input_ids[:, self.prompt_length :]  # [G, C]


class VLMR1:
    """Policy, reference, and the passes over them."""

    def __init__(self, model: Any, beta: float, form: Form):
        self.model, self.beta, self.form = model, beta, form
        self.reference = deepcopy(model).eval().requires_grad_(False) if beta else None
        if form.checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()

    def logps(self, model: Any, rows: Rows) -> Tensor:
        """log p of each completion token, through the logits of every position: [G, C]."""
        ids = rows.input_ids
        types = self.token_types(ids)
        passed = {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": types, "use_cache": False}
        logits = model(input_ids=ids, **passed, **rows.images).logits  # [G, P + C, V]
        of_rows = []
        for row, targets in zip(logits[:, :-1], ids[:, 1:], strict=True):
            of_rows.append(row.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0])
        return torch.stack(of_rows)[:, rows.prompt_length - 1 :]

    def reference_logps(self, rows: Rows) -> Tensor | None:
        if self.reference is None:
            return None
        with torch.no_grad():
            return self.logps(self.reference, rows)

    def loss(self, rows: Rows, advantages: Tensor, old: Tensor | None, reference: Tensor | None) -> Tensor:
        """Mean over sequences of the mean over tokens of -min(r A, clip(r) A) + beta k3; all completions full."""
        logp = self.logps(self.model, rows)
        ratio = (logp - (logp.detach() if old is None else old)).exp()
        gain = advantages[:, None]
        per_token = -torch.minimum(ratio * gain, ratio.clamp(1 - EPSILON, 1 + EPSILON) * gain)
        if reference is not None:
            distance = reference - logp
            per_token = per_token + self.beta * (distance.exp() - distance - 1)
        return per_token.mean(dim=1).mean()

    def token_types(self, ids: Tensor) -> Tensor:
        """1 at image tokens: transformers 5 needs it to place them, 4.49 found them itself."""
        return (ids == self.model.config.image_token_id).long()


class VLMR1Update:
    """Gradients of one update from given groups: reference pass, policy pass and backward of each micro-batch."""

    def __init__(self, model: Any, groups: Sequence[Group], beta: float, form: Form):
        self.trainer, self.model = VLMR1(model, beta, form), model
        if self.trainer.reference is not None:
            bench_model.perturb(self.trainer.reference)
        self.batches = [given(group, model.device) for group in groups]

    def update(self, clock: Clock = untimed) -> Tensor:
        """The mean loss of the micro-batches, its gradient added to the parameters'."""
        self.model.train()
        total = torch.zeros((), device=self.model.device)
        for rows, advantages, old in self.batches:
            with clock("reference"):
                reference = self.trainer.reference_logps(rows)
            with clock("forward"):
                loss = self.trainer.loss(rows, advantages, old, reference) / len(self.batches)
            with clock("backward"):
                loss.backward()
            total += loss.detach()
        return total


def given(group: Group, device: torch.device) -> tuple[Rows, Tensor, Tensor]:
    """(rows, advantages [G], old log-probs [G, C]) of a group; completions of one length."""
    assert group.advantages is not None
    size = len(group.completions)
    completions = torch.stack([each.token_ids for each in group.completions])  # [G, C]
    old = torch.stack([each.logp for each in group.completions if each.logp is not None])
    prompt = group.prompt.input_ids
    images = {name: torch.cat([value] * size).to(device) for name, value in joined(group.prompt.images).items()}
    ids = torch.cat([prompt.repeat(size, 1), completions], dim=1).to(device)
    return Rows(ids, len(prompt), images), group.advantages.to(device), old.to(device)


class VLMR1Step:
    """Whole steps: images and prompts, rollout, reference pass, rewards, loss, backward, optimizer."""

    def __init__(
        self,
        folder: Path,
        model: Any,
        processor: Any,
        prompts: int,
        beta: float,
        reward: Callable[..., list[float]],
        form: Form,
        shape: bench_model.Shape,
    ):
        from transformers import GenerationConfig

        self.trainer, self.model, self.processor, self.reward = VLMR1(model, beta, form), model, processor, reward
        model.generation_config.eos_token_id = None  # every completion meets the limit
        self.generation = GenerationConfig(
            max_new_tokens=shape.completion_length,
            do_sample=True,
            temperature=1.0,
            top_k=form.top_k,
            pad_token_id=processor.tokenizer.pad_token_id,
            suppress_tokens=bench_model.placeholders(model),
        )
        self.size, self.length = shape.num_generations, shape.completion_length
        builder = PromptBuilder(model, family_of(model), processor)
        self.samples = [bench_model.prompt_of(folder, builder, shape, index).sample for index in range(prompts)]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def run(self, clock: Clock = untimed) -> None:
        """One step."""
        for sample in self.samples:
            with clock("rollout"):
                rows = self.rollout(self.inputs(sample))
            with clock("reference"):
                reference = self.trainer.reference_logps(rows)
            with clock("reward"):
                advantages = self.advantages(rows)
            with clock("forward"):
                loss = self.trainer.loss(rows, advantages, None, reference) / len(self.samples)
            with clock("backward"):
                loss.backward()
        with clock("update"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def inputs(self, sample: Any) -> dict[str, Tensor]:
        """What the processor makes of the prompt and its image, G times each."""
        text = self.processor.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
        images = [Image.open(path) for _ in range(self.size) for path in sample.images]
        options = {"return_tensors": "pt", "padding": True, "padding_side": "left", "add_special_tokens": False}
        made = self.processor(text=[text] * self.size, images=images, **options).to(self.model.device)
        made["mm_token_type_ids"] = self.trainer.token_types(made["input_ids"])
        return dict(made)

    def rollout(self, inputs: dict[str, Tensor]) -> Rows:
        """Completions of all G rows."""
        self.model.eval()
        ids = self.model.generate(**inputs, generation_config=self.generation)  # [G, P + C]
        self.model.train()
        width = inputs["input_ids"].shape[1]
        if ids.shape[1] - width != self.length:
            raise RuntimeError(f"completions of {ids.shape[1] - width} tokens were drawn, not of {self.length}")
        return Rows(ids, width, {name: inputs[name] for name in ("pixel_values", "image_grid_thw")})

    def advantages(self, rows: Rows) -> Tensor:
        """[G]"""
        texts = self.processor.batch_decode(rows.completion_ids(), skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        rewards = torch.tensor(self.reward(completions=completions), device=self.model.device)
        return (rewards - rewards.mean()) / (rewards.std() + ADVANTAGE_EPSILON)
