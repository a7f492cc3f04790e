"""TRL's SFTTrainer: its arguments, methods and metrics on `vlmr1.sft.trainer.SFTTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from transformers import set_seed

from vlmr1.api import parts
from vlmr1.api.refused import refuse_arguments
from vlmr1.api.script_trainer import ScriptTrainer, progress_of
from vlmr1.api.sft_config import SFTConfig
from vlmr1.api.sft_rows import samples_of
from vlmr1.sft.evaluation import evaluate_loss
from vlmr1.sft.trainer import SFTTrainer as CoreTrainer
from vlmr1.types import Sample

# Arguments of the trainer that are refused.
ARGUMENTS = {
    "data_collator": "rows are tokenized and packed here: convert them before",
    "compute_loss_func": "the loss is computed with the output head, chunk by chunk: there are no logits",
    "compute_metrics": "an evaluation has loss, entropy and mean_token_accuracy: there are no logits",
    "preprocess_logits_for_metrics": "there are no logits",
    "optimizer_cls_and_kwargs": "use optim and optim_args, or optimizers",
    "formatting_func": "convert the rows to prompt and completion before",
}


class SFTTrainer(ScriptTrainer, CoreTrainer):
    """Supervised fine-tuning of a vision-language model, with the arguments of TRL."""

    args: SFTConfig
    tag = "sft"

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Any = None,
    ):
        refuse_arguments(locals(), SFTConfig, ARGUMENTS)
        args = SFTConfig(f"{Path(parts.name_of(model)).name}-SFT") if args is None else args
        set_seed(args.seed)  # before an adapter's first weights
        model = parts.load(model, peft_config, quantization_config, args)
        samples = samples_of(train_dataset, "train_dataset", args, parts.needed_rows(args))
        self.progress = progress_of(args)
        super().__init__(
            model,
            args,
            samples,
            parts.processor_of(processing_class, model, args),
            callbacks=[*(callbacks or []), self.progress],
            optimizers=optimizers,
            eval_dataset=eval_dataset,
        )
        self.progress.trainer = self

    def eval_samples(self, rows: Any, name: str = "eval_dataset") -> Sequence[Sample]:
        return samples_of(rows, name, self.args)

    def measure(self, samples: Sequence[Sample], prefix: str) -> dict[str, float]:
        """Compute the loss of the answers."""
        clock = perf_counter()
        values = evaluate_loss(self, samples, batch=self.args.per_device_eval_batch_size)
        assert values is not None  # nothing stops it
        seconds = perf_counter() - clock
        batches = -(-len(samples) // (self.args.per_device_eval_batch_size * self.ranks.world_size))
        found = {name.removeprefix("eval/"): value for name, value in values.items()}
        found |= {"num_tokens": float(self.state.num_input_tokens_seen), "runtime": seconds}
        found |= {"samples_per_second": len(samples) / seconds, "steps_per_second": batches / seconds}
        return {f"{prefix}_{name}": value for name, value in found.items()}
