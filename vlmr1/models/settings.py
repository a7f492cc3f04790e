"""Settings of the model: which one, what of it is trained, with which precision and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from vlmr1.errors import SettingError, faults_of, missing_package
from vlmr1.models.adapters import start_from_adapter
from vlmr1.models.precision import check_optimizer, optimizer_name
from vlmr1.types import Settings, setting

FLASH = {  # modules of attn_implementation, and what to install
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
LIMITS = ("min_pixels", "max_pixels", "max_anyres_num")  # of images


@dataclass
class ModelSettings(Settings):
    """The model that a run loads."""

    group = "Model"

    model_name_or_path: str | None = setting(None, "local directory or hub id")
    model_revision: str = setting("main", "revision of a hub model")
    trust_remote_code: bool = setting(False, "run code that a hub model ships")
    attn_implementation: str = setting("sdpa", "attention of the vision tower and of unpacked passes")
    model_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of the weights; with bf16, float32 weights are masters"
    )
    load_in_4bit: bool = setting(False, "the decoder's linear layers in 4 bits (nf4), with use_peft")
    min_pixels: int | None = setting(None, "area to which smaller images are enlarged; models with patch grids")
    max_pixels: int | None = setting(None, "area to which larger images are reduced; models with patch grids")
    max_anyres_num: int | None = setting(None, "tiles of an image, at most; InternVL")

    def check(self) -> Iterator[str]:
        if self.model_dtype not in ("float32", "bfloat16"):
            yield f"model_dtype is {self.model_dtype!r}: float32 or bfloat16"
        yield from self.at_least(1, *LIMITS)
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            yield f"min_pixels is {self.min_pixels}: it is above max_pixels, {self.max_pixels}"
        if self.load_in_4bit:
            yield from missing_package("load_in_4bit", "bitsandbytes", "vlmr1[quant]")

    def check_device(self, device: str) -> Iterator[str]:
        name = self.attn_implementation
        if name.startswith("flash_attention"):
            missing = list(missing_package(f"attn_implementation={name}", *FLASH.get(name, FLASH["flash_attention_2"])))
            yield from missing
            if not missing and device != "cuda":
                yield f"attn_implementation={name} needs a GPU: on {device} use sdpa"

    @property
    def source(self) -> dict[str, Any]:
        """Options of every read of the model."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}

    @property
    def image_limits(self) -> dict[str, int | None]:
        return {name: getattr(self, name) for name in LIMITS}


@dataclass
class LoraSettings(Settings):
    """A LoRA adapter in place of the weights."""

    group = "LoRA"

    use_peft: bool = setting(False, "train a LoRA adapter; everything else is frozen")
    adapter: str | None = setting(
        None, "directory of a PEFT adapter to go on training; its base: model_name_or_path, or the one that it names"
    )
    lora_r: int = setting(64, "rank")
    lora_alpha: int = setting(128, "scale of the adapter is alpha / r")
    lora_dropout: float = setting(0.0, "dropout of the adapter's inputs; a shared prompt has one mask a pass")
    lora_target_modules: list[str] = setting([], "names of linear layers; default and all-linear: all of the decoder")
    lora_vision: bool = setting(False, "adapters in the vision tower and projector too")
    lora_modules_to_save: list[str] = setting([], "modules that are trained whole beside the adapter")
    use_rslora: bool = setting(False, "scale by alpha / sqrt(r), not alpha / r")
    use_dora: bool = setting(False, "adapters of the direction, and a trained magnitude")
    lora_merge_final: bool = setting(False, "leave the merged model in output_dir when the run has finished")

    def check(self) -> Iterator[str]:
        try:
            yield from start_from_adapter(self)
        except SettingError as error:
            yield str(error)
        if not self.use_peft:
            for name in LoraSettings.__annotations__:
                if name not in ("use_peft", "adapter") and not self.is_default(name):
                    yield f"{name} needs use_peft: there is no adapter without it"
            return
        yield from self.at_least(1, "lora_r", "lora_alpha")
        if not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout is {self.lora_dropout}: it must be at least 0 and below 1"
        yield from missing_package("use_peft", "peft", "vlmr1[quant]")
        if "all-linear" in self.lora_target_modules and len(self.lora_target_modules) > 1:
            yield "lora_target_modules: all-linear stands for all names: give it alone"


class _Shared(Settings):
    shared = ("seed", "bf16", "optim", "optim_args", "gradient_checkpointing", "activation_checkpointing")
    shared += ("activation_checkpointing_kwargs", "use_liger_kernel", "deepspeed_plugin")
    if TYPE_CHECKING:
        seed: int
        bf16: bool
        optim: Any
        optim_args: str | None
        gradient_checkpointing: bool
        activation_checkpointing: bool
        activation_checkpointing_kwargs: Any
        use_liger_kernel: bool

        @property
        def deepspeed_plugin(self) -> Any: ...


@dataclass
class ParameterSettings(LoraSettings, ModelSettings, _Shared):
    """Trained parameters of the model, their precision and memory."""

    group = "Trained parameters, precision and memory"

    freeze_vision: bool = setting(False, "train the decoder only")
    freeze_merger: bool | None = setting(
        None, "freeze the projector behind the vision tower; default: as freeze_vision"
    )
    stochastic_rounding: bool = setting(
        False, "round bfloat16 weights stochastically after an update, with optim adamw_torch_8bit"
    )
    activation_offload: bool = setting(False, "hold in host memory what gradient_checkpointing keeps")
    fused_layers: Literal["auto", "liger", "torch"] = setting(
        "auto",
        "norms, RoPE and SwiGLU by Liger's kernels; auto: on a GPU with liger-kernel; use_liger_kernel: liger; "
        "torch: the stock forward, in decode steps too",
    )

    @property
    def optimizer(self) -> str:
        """The optimizer's name in OPTIMIZERS."""
        return optimizer_name(self.optim)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which layers with 4-bit weights compute."""
        return torch.bfloat16 if self.bf16 else getattr(torch, self.model_dtype)

    def check(self) -> Iterator[str]:
        yield from faults_of(partial(check_optimizer, self))
        if self.use_peft:
            yield from self._check_lora()
        elif self.load_in_4bit:
            yield "load_in_4bit needs use_peft: 4-bit weights cannot be trained"
        if self.fused_layers not in ("auto", "liger", "torch"):
            yield f"fused_layers is {self.fused_layers!r}: auto, liger or torch"
        if self.use_liger_kernel:
            if self.fused_layers == "torch":
                yield "use_liger_kernel and fused_layers=torch contradict each other: it means fused_layers=liger"
            self.fused_layers = "liger"
            self.use_liger_kernel = False  # Trainer would change the library's modules
        if self.activation_offload:
            if not (self.activation_checkpointing or self.gradient_checkpointing):
                yield "activation_offload needs gradient_checkpointing: it moves what that keeps"
            kwargs = self.activation_checkpointing_kwargs
            if not isinstance(kwargs, str):  # a text where TrainingArguments has refused another setting
                self.activation_checkpointing_kwargs = {**(kwargs or {}), "offload": True}

    def _check_lora(self) -> Iterator[str]:
        if self.freeze_vision and self.lora_vision:
            yield "lora_vision and freeze_vision contradict each other: adapters in the tower train it"
        if self.freeze_merger is not None:
            yield (
                "freeze_merger has no effect with use_peft, which freezes all but the adapter; to train the projector "
                "name it in lora_modules_to_save"
            )

    def check_device(self, device: str) -> Iterator[str]:
        optim = self.optimizer
        if optim.startswith("paged") and device != "cuda":
            yield f"optim={optim}: paged optimizers need a GPU, this is {device}"
        if self.activation_offload and device != "cuda":
            yield f"activation_offload needs a GPU: on {device} it has nothing to move"
        if self.fused_layers == "liger" and device != "cuda":
            yield f"fused_layers=liger (use_liger_kernel) needs a GPU: its kernels do not run on {device}"
        elif self.fused_layers == "liger":
            yield from missing_package("fused_layers=liger", "liger_kernel", "vlmr1[gpu]")
