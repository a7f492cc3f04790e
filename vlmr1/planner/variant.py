"""The model of a job without data: dtype, what is frozen, adapters, 4-bit weights, checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AutoModelForImageTextToText

from vlmr1.errors import SettingError
from vlmr1.models import family_for
from vlmr1.planner.dry_run import DryRun, without_data
from vlmr1.planner.inputs import PlanInputs
from vlmr1.planner.models import merger_parameters

# nf4 with double quantization: 4 bits a weight, 8 a block of 64, 32 a block of 256 of those.
BITS = 4 + 8 / 64 + 32 / (64 * 256)


def variant(inputs: PlanInputs, dry: DryRun) -> Any:
    """The model that this job trains; only what it trains requires gradients."""
    model = without_data(lambda: _made(inputs), dry.fake)
    dry.leave_out([*model.parameters(), *model.buffers()])
    if inputs.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def _made(inputs: PlanInputs) -> Any:
    model = AutoModelForImageTextToText.from_config(inputs.model, dtype=inputs.dtype)
    family = family_for(inputs.model)
    merger = {id(p) for p in merger_parameters(model)}
    for parameter in family.vision_parameters(model):
        if inputs.merger_frozen if id(parameter) in merger else inputs.freeze_vision:
            parameter.requires_grad_(False)
    decoder = attrgetter(family.decoder_path)(model)
    if inputs.load_in_4bit:
        _quantize(decoder, torch.bfloat16 if inputs.bf16 else inputs.dtype)
    if inputs.use_peft:
        _add_adapters(inputs, model, decoder)
    return model


def _add_adapters(inputs: PlanInputs, model: Any, decoder: nn.Module) -> None:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise SettingError("use_peft needs peft: pip install 'vlmr1[quant]'") from error
    towers = [attrgetter(path)(model) for path in family_for(inputs.model).vision_paths] if inputs.lora_vision else []
    names = _linear_names(model, [decoder, *towers], inputs.lora_target_modules)
    if not names:
        raise SettingError(f"lora_target_modules: {', '.join(inputs.lora_target_modules)} names no linear layer")
    get_peft_model(model, LoraConfig(r=inputs.lora_r, lora_alpha=inputs.lora_alpha, target_modules=names))


def _linear_names(model: nn.Module, within: Sequence[nn.Module], wanted: Sequence[str]) -> list[str]:
    """Full names of the linear layers within these modules, or of those that end in one of the wanted names."""
    inside = {id(module) for outer in within for module in outer.modules()}
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside]
    if not wanted or "all-linear" in wanted:
        return linear
    return [name for name in linear if name.split(".")[-1] in wanted or name in wanted]


class Linear4bit(nn.Linear):
    """A linear layer whose weight is held in BITS bits a number, and is as wide as `compute` while it is used."""

    def __init__(self, of: nn.Linear, compute: torch.dtype):
        super().__init__(of.in_features, of.out_features, bias=of.bias is not None, device="meta")
        packed = torch.empty(round(of.weight.numel() * BITS / 8), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = of.bias
        self.shape, self.compute = tuple(of.weight.shape), compute

    def forward(self, input: Tensor) -> Tensor:
        out = _Unpacked.apply(input.to(self.compute), self.weight, self.shape)
        assert isinstance(out, Tensor)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return x @ packed.new_empty(shape, dtype=x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        return d_out @ packed.new_empty(ctx.shape, dtype=d_out.dtype), None, None


def _quantize(decoder: nn.Module, compute: torch.dtype) -> None:
    for module in list(decoder.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Linear4bit(child, compute))
