"""What the planner has to know of a job, and where it finds it in the settings of `vlmr1 train`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from vlmr1.errors import SettingError

Reference = Literal["none", "copy", "adapter", "offload"]


@dataclass(frozen=True)
class PlanInputs:
    """One job. Lengths are the longest that may occur; numbers are those of one device."""

    model: Any = field(compare=False)  # configuration
    device: Literal["cuda", "cpu"] = "cuda"
    gpus: int = 1
    zero: int = 0  # stage; 3 also stands for FSDP

    # Prompts and completions
    image_tokens: int = 1024  # of a prompt, one image
    text_tokens: int = 128
    prompts_per_device: int = 8
    steps_per_generation: int = 1
    num_generations: int = 8
    max_completion_length: int = 256
    tokens_per_pack: int = 16384
    share_vision: bool = True
    share_prompt: bool = True
    pack: bool = True
    rollout_engine: str = "native"
    rollout_kv_mib: float | None = None
    repetition_penalty: float = 1.0

    # Parameters, precision, optimizer
    model_dtype: str = "float32"
    bf16: bool = False
    optim: str = "adamw_torch_fused"
    reference: Reference = "copy"
    freeze_vision: bool = False
    freeze_merger: bool | None = None  # None: as freeze_vision
    use_peft: bool = False
    lora_r: int = 64
    lora_alpha: int = 128
    lora_target_modules: tuple[str, ...] = ()  # none: every linear layer of the decoder
    lora_vision: bool = False
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False
    activation_offload: bool = False
    use_liger_kernel: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return getattr(torch, self.model_dtype)

    @property
    def prompt_tokens(self) -> int:
        return self.image_tokens + self.text_tokens

    @property
    def merger_frozen(self) -> bool:
        return self.freeze_vision if self.freeze_merger is None else self.freeze_merger

    @property
    def vision_frozen(self) -> bool:
        """Tower and merger, so that features serve every phase."""
        return (self.freeze_vision and self.merger_frozen) or (self.use_peft and not self.lora_vision)


def inputs_of(config: Any, model: Any, **job: Any) -> PlanInputs:
    """The inputs that a GRPOConfig and a model configuration ask for; `job` is what no setting says (device, gpus,
    zero, image_tokens, text_tokens). Settings that this version of GRPOConfig lacks have their default here.

    SettingError: settings that exclude one another."""
    names = set(PlanInputs.__dataclass_fields__) - {"model", "device", "gpus", "zero", "reference"}
    known = {name: getattr(config, name) for name in names - job.keys() if hasattr(config, name)}
    known["optim"] = str(getattr(config.optim, "value", config.optim))
    targets = known.get("lora_target_modules") or ()
    known["lora_target_modules"] = (targets,) if isinstance(targets, str) else tuple(targets)
    given = PlanInputs(model, **(known | job))
    kind = "none" if config.beta == 0 else reference_kind(getattr(config, "reference", "auto"), given.use_peft)
    return checked(given, kind)


def reference_kind(setting: str, use_peft: bool) -> Reference:
    """What `reference` means: auto is the adapter switched off where there is one, else a copy."""
    if setting == "auto":
        return "adapter" if use_peft else "copy"
    if setting == "adapter" and not use_peft:
        raise SettingError("reference=adapter needs use_peft: there is no adapter to switch off")
    return setting  # type: ignore[return-value]


def checked(inputs: PlanInputs, reference: Reference) -> PlanInputs:
    """The inputs with this reference; SettingError where something cannot be."""
    if inputs.load_in_4bit and not inputs.use_peft:
        raise SettingError("load_in_4bit needs use_peft: 4-bit weights are not trained")
    if inputs.activation_offload and not inputs.gradient_checkpointing:
        raise SettingError("activation_offload needs gradient_checkpointing: it moves what that keeps")
    if inputs.model_dtype not in ("float32", "bfloat16"):
        raise SettingError(f"model_dtype is {inputs.model_dtype}: float32 or bfloat16")
    for name in ("gpus", "text_tokens"):
        if getattr(inputs, name) < 1:
            raise SettingError(f"{name} is {getattr(inputs, name)}: it must be at least 1")
    if inputs.image_tokens < 0:
        raise SettingError(f"image_tokens is {inputs.image_tokens}: it must not be negative")
    if inputs.zero not in (0, 1, 2, 3):
        raise SettingError(f"zero is {inputs.zero}: a stage from 0 to 3")
    return replace(inputs, reference=reference)
