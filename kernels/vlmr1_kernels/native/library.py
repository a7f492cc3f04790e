"""The C interface of kernels/csrc/library.cpp: its structures, and how tensors become pointers."""

import ctypes
import math
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vlmr1_kernels.settings import KL_ESTIMATORS, LOSS_TYPES, GRPOSettings

PATH = Path(__file__).with_name("libvlmr1_kernels.so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INTERFACE = 1
_LEAST_ROWS = 96
_LARGEST_CHUNK_MIB = 512.0


class Head(Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("weight_stride", c_int64),
        ("vocab", c_int64),
        ("dim", c_int64),
        ("dtype", c_int32),
        ("temperature", c_float),
        ("softcap", c_float),
    ]


class HiddenRows(Structure):
    _fields_ = [("hidden", c_void_p), ("targets", c_void_p), ("hidden_stride", c_int64), ("rows", c_int64)]


class Settings(Structure):
    _fields_ = [
        ("loss_type", c_int32),
        ("kl", c_int32),
        ("sequence_level", c_int32),
        ("has_delta", c_int32),
        ("has_tis_cap", c_int32),
        ("reserved", c_int32),
        ("epsilon_low", c_double),
        ("epsilon_high", c_double),
        ("delta", c_double),
        ("beta", c_double),
        ("tis_cap", c_double),
        ("entropy_coef", c_double),
        ("max_completion_length", c_double),
    ]


class ObjectiveRows(Structure):
    _fields_ = [
        ("total", c_int64),
        ("count", c_int64),
        ("sequences", c_int64),
        ("num_generations", c_int64),
        ("seq_ids", c_void_p),
        ("selected", c_void_p),
        ("advantages", c_void_p),
        ("rewards", c_void_p),
        ("old", c_void_p),
        ("ref", c_void_p),
        ("sampling", c_void_p),
        ("normalizer", c_double),
    ]


class Summary(Structure):
    _fields_ = [(name, c_double) for name in ("loss", "kl", "entropy", "clip_low", "clip_high", "ratio_max")]


_HEAD_ROWS = (POINTER(Head), POINTER(HiddenRows))
_OBJECTIVE = (POINTER(ObjectiveRows), POINTER(Settings))
_SIGNATURES = {
    "vlmr1_backend": (c_char_p, ()),
    "vlmr1_use_backend": (c_int, (c_char_p,)),
    "vlmr1_logit_bytes": (c_int64, (POINTER(Head),)),
    "vlmr1_group_advantages": (None, (c_void_p, c_int64, c_int64, c_int, c_void_p)),
    "vlmr1_linear_logprob": (c_int, (*_HEAD_ROWS, c_int, *(c_void_p,) * 3)),
    "vlmr1_linear_logprob_backward": (c_int, (*_HEAD_ROWS, c_int64, c_int, *(c_void_p,) * 5)),
    "vlmr1_grpo_loss": (c_int, (*_OBJECTIVE, c_void_p, c_void_p, POINTER(Summary))),
    "vlmr1_linear_grpo_loss": (
        c_int,
        (*_HEAD_ROWS, *_OBJECTIVE, c_int64, c_double, c_int, *(c_void_p,) * 4, POINTER(Summary)),
    ),
}


@torch.compiler.assume_constant_result
def problem() -> str | None:
    """Why the library cannot be used, or None."""
    return _problem()


@cache
def _problem() -> str | None:
    if not PATH.is_file():
        return "the native library is not built; it needs a C++ compiler: cmake -S . -B build && cmake --build build"
    try:
        library()
    except OSError as error:
        return f"the native library does not load: {error}"
    return None


@cache
def library() -> ctypes.CDLL:
    """The loaded library; torch is imported before, so both share one OpenMP runtime."""
    loaded = ctypes.CDLL(str(PATH))
    loaded.vlmr1_interface.restype = c_int
    if loaded.vlmr1_interface() != _INTERFACE:
        raise OSError(f"{PATH.name} was built from other sources; build it again")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def backend() -> str:
    """The instruction set that the library uses: avx512bf16, avx512, avx2 or baseline."""
    return library().vlmr1_backend().decode()


def call(name: str, *arguments: object) -> None:
    """Run a function of the library. MemoryError or ValueError where it says so."""
    status = getattr(library(), name)(*arguments)
    if status == 1:
        raise MemoryError(f"{name}: not enough memory for its workspace; a smaller chunk_mib needs less")
    if status == 2:
        raise ValueError("seq_ids must be in 0..B-1 (the number of sequences)")


def head(weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> Head:
    vocab, dim = weight.shape
    return Head(
        weight.data_ptr(),
        pointer(bias),
        weight.stride(0),
        vocab,
        dim,
        DTYPES[weight.dtype],
        temperature,
        softcap or 0.0,
    )


def hidden_rows(hidden: Tensor, targets: Tensor) -> HiddenRows:
    return HiddenRows(hidden.data_ptr(), targets.data_ptr(), hidden.stride(0), hidden.shape[0])


def settings(of: GRPOSettings) -> Settings:
    return Settings(
        LOSS_TYPES.index(of.loss_type),
        1 + KL_ESTIMATORS.index(of.kl),
        of.sequence_level,
        of.delta is not None,
        of.tis_cap is not None,
        0,
        of.epsilon_low,
        of.epsilon_high,
        of.delta or 0.0,
        of.beta,
        of.tis_cap or 0.0,
        of.entropy_coef,
        of.max_completion_length or 0,
    )


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def prepared(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """As the library reads them: matrices whose rows are in one piece each, the rest contiguous, int64 targets."""
    hidden, weight = (m if m.stride(1) == 1 and m.stride(0) >= m.shape[1] else m.contiguous() for m in (hidden, weight))
    return hidden, weight, None if bias is None else bias.contiguous(), integers(targets)


def doubles(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach().to(torch.float64).contiguous() for tensor in tensors]


def integers(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int64).contiguous()


@torch.compiler.assume_constant_result
def logit_bytes(dtype: torch.dtype) -> int:
    """Bytes that a kept logit takes."""
    return library().vlmr1_logit_bytes(byref(Head(dtype=DTYPES[dtype])))


def chunk_rows(rows: int, weight: Tensor, chunk_mib: float | None) -> int:
    """How many rows to project at once: `chunk_mib` MiB of kept logits.

    By default all rows, where the gradient of the weight has room for their logits until it is written; and in 16
    bits a logit, because one chunk needs no float32 [V, D] sums over chunks. Else an eighth of the rows in float32,
    three eighths with a frozen head, but enough that packing the weight for them costs little. All bounded.
    """
    each = logit_bytes(weight.dtype)
    row_bytes = weight.shape[0] * each
    if chunk_mib is not None:
        return max(1, int(chunk_mib * 2**20 / row_bytes))
    trained = weight.requires_grad and torch.is_grad_enabled()
    if trained and rows * each <= weight.shape[1] * weight.itemsize:
        return max(rows, 1)
    wanted = rows if trained and each == 2 else max(_LEAST_ROWS, math.ceil(rows / 8 if trained else 3 * rows / 8))
    return max(1, min(wanted, int(_LARGEST_CHUNK_MIB * 2**20 / row_bytes)))
