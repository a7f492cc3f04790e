"""ctypes bindings of kernels/csrc/library.cpp; the structures mirror those in the C++ headers."""

import ctypes
import math
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmr1_kernels.inputs import HeadInputs
from vlmr1_kernels.settings import KL_ESTIMATORS, LOSS_TYPES, GRPOSettings

PATH = Path(__file__).with_name("libvlmr1_kernels.so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INTERFACE = 2
_LEAST_ROWS = 96
_LARGEST_CHUNK_MIB = 512.0


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Head(Structure):
    _fields_ = [
        *_fields(c_void_p, "weight bias"),
        *_fields(c_int64, "weight_stride vocab dim"),
        *_fields(c_int32, "dtype"),
        *_fields(c_float, "temperature softcap"),
    ]


class HiddenRows(Structure):
    _fields_ = [*_fields(c_void_p, "hidden targets"), *_fields(c_int64, "hidden_stride rows")]


class Settings(Structure):
    _fields_ = [
        *_fields(c_int32, "loss_type kl sequence_level has_delta has_tis_cap use_bias_correction_kl"),
        *_fields(c_double, "epsilon_low epsilon_high delta beta tis_cap entropy_coef max_completion_length"),
    ]


class ObjectiveRows(Structure):
    _fields_ = [
        *_fields(c_int64, "total count sequences num_generations"),
        *_fields(c_void_p, "seq_ids selected advantages rewards old ref sampling"),
        *_fields(c_double, "normalizer"),
    ]


class Summary(Structure):
    _fields_ = _fields(c_double, "loss kl entropy clip_low clip_high ratio_max")


_HEAD_ROWS = (POINTER(Head), POINTER(HiddenRows))
_OBJECTIVE = (POINTER(ObjectiveRows), POINTER(Settings))
_SIGNATURES = {
    "vlmr1_backend": (c_char_p, ()),
    "vlmr1_use_backend": (c_int, (c_char_p,)),
    "vlmr1_logit_bytes": (c_int64, (POINTER(Head),)),
    "vlmr1_group_advantages": (None, (c_void_p, c_int64, c_int64, c_int, c_void_p)),
    "vlmr1_linear_logprob": (c_int, (*_HEAD_ROWS, c_int, *(c_void_p,) * 3)),
    "vlmr1_linear_logprob_backward": (
        c_int,
        (*_HEAD_ROWS, c_int64, c_int, c_void_p, c_void_p, c_int, *(c_void_p,) * 3),
    ),
    "vlmr1_grpo_loss": (c_int, (*_OBJECTIVE, c_void_p, c_void_p, POINTER(Summary))),
    "vlmr1_linear_grpo_loss": (
        c_int,
        (*_HEAD_ROWS, *_OBJECTIVE, c_int64, c_double, c_int, c_int, *(c_void_p,) * 4, POINTER(Summary)),
    ),
}


@torch.compiler.assume_constant_result
def unavailable_reason() -> str | None:
    """Return why the library cannot be used, or None."""
    return _unavailable_reason()


@cache
def _unavailable_reason() -> str | None:
    if not PATH.is_file():
        return "the native library is not built; it needs a C++ compiler: cmake -S . -B build && cmake --build build"
    try:
        library()
    except OSError as error:
        return f"the native library does not load: {error}"
    return None


@cache
def library() -> ctypes.CDLL:
    """Load the library; torch is imported first, so that both share one OpenMP runtime."""
    loaded = ctypes.CDLL(str(PATH))
    loaded.vlmr1_interface.restype = c_int
    if loaded.vlmr1_interface() != _INTERFACE:
        raise OSError(f"{PATH.name} was built from another version of the sources: rebuild it")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def backend() -> str:
    """Return the instruction set in use: avx512bf16, avx512, avx2 or baseline."""
    return library().vlmr1_backend().decode()


def call(name: str, *arguments: object) -> None:
    """Call a function of the library; MemoryError or ValueError according to its status."""
    status = getattr(library(), name)(*arguments)
    if status == 1:
        raise MemoryError(f"{name}: not enough memory for its workspace; a smaller chunk_mib needs less")
    if status == 2:
        raise ValueError("seq_ids must be in 0..B-1 (the number of sequences)")


def head(of: HeadInputs) -> Head:
    """Return the structure of an output head; its tensors must outlive it."""
    sizes = of.weight.stride(0), *of.weight.shape, DTYPES[of.weight.dtype]
    return Head(of.weight.data_ptr(), pointer(of.bias), *sizes, of.temperature, of.softcap or 0.0)


def hidden_rows(of: HeadInputs) -> HiddenRows:
    """Return the structure of the rows to project; its tensors must outlive it."""
    return HiddenRows(of.hidden.data_ptr(), of.targets.data_ptr(), of.hidden.stride(0), of.hidden.shape[0])


def settings(of: GRPOSettings) -> Settings:
    """Return the settings as a structure."""
    loss_type, kl = LOSS_TYPES.index(of.loss_type), 1 + KL_ESTIMATORS.index(of.kl)
    flags = of.sequence_level, of.delta is not None, of.tis_cap is not None, of.use_bias_correction_kl
    numbers = of.delta or 0.0, of.beta, of.tis_cap or 0.0, of.entropy_coef, of.max_completion_length or 0
    return Settings(loss_type, kl, *flags, of.epsilon_low, of.epsilon_high, *numbers)


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's data, None for no tensor or an empty one."""
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def prepare_inputs(of: HeadInputs) -> HeadInputs:
    """Return tensors as the library reads them: matrices of one dtype with contiguous rows, contiguous bias, int64
    targets."""
    matrices = of.hidden, of.weight.to(of.hidden.dtype)
    hidden, weight = (m if m.stride(1) == 1 and m.stride(0) >= m.shape[1] else m.contiguous() for m in matrices)
    bias = None if of.bias is None else of.bias.contiguous()
    return of._replace(hidden=hidden, weight=weight, bias=bias, targets=to_int64(of.targets))


def to_double(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return detached, contiguous float64 tensors."""
    return [None if tensor is None else tensor.detach().to(torch.float64).contiguous() for tensor in tensors]


def to_int64(tensor: Tensor) -> Tensor:
    """Return a contiguous int64 tensor."""
    return tensor.to(torch.int64).contiguous()


@torch.compiler.assume_constant_result
def logit_bytes(dtype: torch.dtype) -> int:
    """Return the bytes that the library stores per logit between forward and backward."""
    return library().vlmr1_logit_bytes(byref(Head(dtype=DTYPES[dtype])))


def chunk_rows(hidden: Tensor, weight: Tensor, chunk_mib: float | None) -> tuple[int, int]:
    """Return how many rows to project at once, and as many to consume at once: `chunk_mib` MiB of stored logits.

    By default all rows if their logits fit into the memory of the weight's gradient, or take 16 bits each: a single
    chunk needs no float32 [V, D] accumulator. Otherwise an eighth of the rows, three eighths with a frozen head, but
    at least `_LEAST_ROWS`, which amortize packing the weight. Never more than `_LARGEST_CHUNK_MIB`.
    """
    rows, size = hidden.shape[0], logit_bytes(hidden.dtype)
    row_bytes = weight.shape[0] * size
    trained = weight.requires_grad and torch.is_grad_enabled()
    wanted = rows if trained and size == 2 else max(_LEAST_ROWS, math.ceil(rows / 8 if trained else 3 * rows / 8))
    chunk = min(wanted, int(_LARGEST_CHUNK_MIB * 2**20 / row_bytes))
    if chunk_mib is not None:
        chunk = int(chunk_mib * 2**20 / row_bytes)
    elif trained and rows * size <= weight.shape[1] * weight.dtype.itemsize:
        chunk = rows
    return max(chunk, 1), max(chunk, 1)
