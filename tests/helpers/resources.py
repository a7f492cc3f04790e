"""Registers, memory and vector widths of the compiled kernels: python -m tests.helpers.resources 90 (or variants)

Needs no GPU: the ops run on meta tensors of training size, and launches are compiled but not run.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vlmr1_kernels.flash.merge import merge_rows
from vlmr1_kernels.inputs import DecodeTables, HeadInputs, LossInputs, SamplingOptions
from vlmr1_kernels.settings import GRPOSettings
from vlmr1_kernels.triton import (
    group_advantages,
    grpo_loss,
    head,
    linear_grpo_loss,
    linear_logprob,
    rope_kv_write,
    sample_tokens,
    shared_prefix_decode,
)

# Bytes of shared memory that a program may have, by compute capability.
SHARED_MEMORY: dict[int | str, int] = {
    80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip
TARGETS: dict[Any, GPUTarget] = {"gfx942": GPUTarget("hip", "gfx942", 64)}


@contextmanager
def compiling(capability: int | str) -> Iterator[list[tuple[str, tuple[int, ...], Any]]]:
    """Compile launches for a compute capability and run none: name, grid and compiled code of each."""
    launches: list[tuple[str, tuple[int, ...], Any]] = []
    run: Callable[..., Any] = JITFunction.run
    properties = {"max_shared_mem": SHARED_MEMORY[capability], "multiprocessor_count": 132}
    driver = SimpleNamespace(
        get_current_target=lambda: TARGETS.get(capability) or GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,  # compiled kernels are cached by device
        get_current_stream=lambda device: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )

    def compile_only(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        launches.append((kernel.__name__, grid, run(kernel, *args, grid=grid, warmup=True, **options)))

    with (
        patch.object(triton.runtime.driver, "_active", driver),
        patch.object(JITFunction, "run", compile_only),
        patch.object(head, "gemm_operand", lambda matrix: matrix),
    ):
        yield launches


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CHUNKS = (1024, 4096)  # rows to project and to consume at once


def loss_call(
    settings: GRPOSettings, *, rows=8192, dim=2048, vocabulary=151_936, sequences=64, dtype=torch.bfloat16,
    off_policy=True, needs=(True, True, False), bias=False, softcap=None, rewards=False, weight_dtype=None,
    chunks=CHUNKS,
) -> Callable[[], Any]:  # fmt: skip
    """Return the forward of linear_grpo_loss on meta tensors."""
    ids = meta(rows, dtype=torch.int64)
    old, ref, sampling = (meta(rows) if given else None for given in (off_policy, settings.beta, settings.tis_cap))
    scores = (None, meta(sequences), 8) if rewards else (meta(sequences), None, 8)
    inputs = LossInputs(ids, *scores, old, ref, sampling, None)
    hidden, weight = meta(rows, dim, dtype=dtype), meta(vocabulary, dim, dtype=weight_dtype or dtype)
    bias_values = meta(vocabulary, dtype=dtype) if bias else None
    head = HeadInputs(hidden, weight, bias_values, ids, settings.temperature, softcap)
    return partial(linear_grpo_loss._forward, head, None, inputs, chunks, 1.0, needs, settings)


def loss_step(settings: GRPOSettings, **options: Any) -> None:
    """Run the forward of linear_grpo_loss on meta tensors."""
    loss_call(settings, **options)()


def logprob_step(*, rows: int = 8192, dim: int = 2048, vocabulary: int = 151_936, entropy: bool = True) -> None:
    """Run forward and backward of linear_logprob on meta tensors."""
    hidden, weight = meta(rows, dim, dtype=torch.bfloat16), meta(vocabulary, dim, dtype=torch.bfloat16)
    targets = meta(rows, dtype=torch.int64)
    head = HeadInputs(hidden, weight, None, targets, 1.0, None)
    logp, token_entropy, lse = linear_logprob._forward(head, entropy, CHUNKS)
    linear_logprob._backward(head, lse, token_entropy, logp, token_entropy, (True, True, False), CHUNKS)


def decode_step(
    dtype, head_dim, heads, kv_heads, max_group, *, groups=8, max_prefix=1024, blocks=32, rows=70_000
) -> None:
    """Run shared_prefix_decode on meta tensors."""
    batch, pool = max_group * groups, meta(kv_heads, rows, head_dim, dtype=dtype)
    shapes = ((groups + 1,), (groups,), (groups,), (batch, blocks), (batch,))
    tables = DecodeTables(*(meta(*shape, dtype=torch.int32) for shape in shapes))
    bounds = {"max_group": max_group, "max_prefix": max_prefix}
    q = meta(batch, heads, head_dim, dtype=dtype)
    shared_prefix_decode._forward(q, pool, pool, tables, block=16, scale=0.1, **bounds)


def merge_step(rows: int, heads: int, head_dim: int, dtype=torch.bfloat16) -> None:
    """Run the merge of two flash calls on meta tensors."""
    out, more = (meta(count, heads, head_dim, dtype=dtype) for count in (rows + 6000, rows))
    merge_rows(out, meta(heads, rows + 6000), more, meta(heads, rows))


def sampling_step(
    *options: Any, rows: int = 64, vocabulary: int = 151_936, suppressed: int = 9, dtype=torch.float32
) -> None:
    """Run sample_tokens on meta tensors; `options` as in SamplingOptions, the penalty on or off with its tensor."""
    chosen = SamplingOptions(*options)
    seen = meta(rows, vocabulary, dtype=torch.bool) if chosen.repetition_penalty != 1 else None
    ids = meta(suppressed, dtype=torch.int64) if suppressed else None
    logits, draws = meta(rows, vocabulary, dtype=dtype), meta(rows, dtype=torch.float64)
    sample_tokens._forward(logits, draws, ids, seen, chosen)


def rope_step(
    dtype, *, heads=16, kv_heads=2, head_dim=128, rotary=128, norms=False, interleaved=False, tokens=64, rows=70_000
) -> None:
    """Run rope_kv_write on meta tensors, with angles and norms in float32."""
    shares = (heads, kv_heads, kv_heads)
    q, k, v = meta(tokens, sum(shares), head_dim, dtype=dtype).split(shares, 1)
    angles, cache, place = (
        meta(tokens, rotary),
        meta(kv_heads, rows, head_dim, dtype=dtype),
        meta(tokens, dtype=torch.int64),
    )
    norm = meta(head_dim) if norms else None
    rope_kv_write._forward(q, k, v, angles, angles, cache, cache, place, norm, norm, 1e-6, interleaved)


EVERYTHING = GRPOSettings(beta=0.1, tis_cap=2.0, delta=4.0, entropy_coef=0.01, temperature=0.9)
CASES: dict[str, Callable[[], Any]] = {
    "on-policy": lambda: loss_step(GRPOSettings(), off_policy=False),
    "everything": lambda: loss_step(EVERYTHING, bias=True, softcap=30.0, rewards=True),
    "float32": lambda: loss_step(GRPOSettings(beta=0.1), dtype=torch.float32),
    "cispo": lambda: loss_step(GRPOSettings(loss_type="cispo", epsilon_high=5.0, temperature=0.9)),
    "gspo": lambda: loss_step(GRPOSettings(loss_type="gspo", beta=0.1, entropy_coef=0.01)),
    "gspo, frozen head": lambda: loss_step(GRPOSettings(loss_type="gspo"), needs=(True, False, False)),
    "log-probs": lambda: logprob_step(entropy=False),
    "log-probs and entropy": logprob_step,
    "advantages": lambda: [group_advantages.group_advantages(meta(64), 8, scale=s) for s in ("group", "batch", "none")],
    "given log-probs": lambda: grpo_loss._forward(
        meta(8192),
        LossInputs(meta(8192, dtype=torch.int32), meta(64), None, 1, meta(8192), None, None, meta()),
        GRPOSettings(),
    ),
    "merge": lambda: merge_step(10_200, 16, 128),
    "merge, 80 columns": lambda: merge_step(10_200, 16, 80, torch.float16),
    "merge, 256 columns": lambda: merge_step(10_200, 8, 256),
    "decode, tile of 64": lambda: decode_step(torch.bfloat16, 128, 16, 2, 8),
    "decode, tile of 16": lambda: decode_step(torch.bfloat16, 64, 16, 16, 8),
    "decode, tile of 32, padded": lambda: decode_step(torch.float16, 80, 16, 4, 8),
    "decode, wide": lambda: decode_step(torch.bfloat16, 256, 16, 4, 16),
    "decode, float32": lambda: decode_step(torch.float32, 128, 16, 2, 8),
    "decode, float32, wide": lambda: decode_step(torch.float32, 256, 16, 2, 8),
    "sampling": sampling_step,
    "sampling, greedy, bfloat16": lambda: sampling_step(1.0, True, suppressed=0, dtype=torch.bfloat16),
    "sampling, everything": lambda: sampling_step(0.8, False, 0, 1.0, 0.1, 1.3, vocabulary=152_001),
    "rope": lambda: rope_step(torch.bfloat16),
    "rope, norms": lambda: rope_step(torch.bfloat16, norms=True),
    "rope, float32, norms": lambda: rope_step(torch.float32, norms=True),
    "rope, adjacent pairs of a part": lambda: rope_step(torch.bfloat16, rotary=64, interleaved=True),
    "rope, odd width": lambda: rope_step(torch.float16, head_dim=80, rotary=80, norms=True),
}


def names(target: str) -> list[str]:
    """Return the names of the kernels that compile for a target which is not NVIDIA's."""
    found = set()
    for step in (
        CASES["everything"],
        CASES["log-probs and entropy"],
        CASES["advantages"],
        CASES["merge"],
        CASES["decode, tile of 64"],
        CASES["sampling, everything"],
        CASES["rope"],
    ):
        with compiling(target) as launches:
            step()
        assert all(each.metadata.shared <= SHARED_MEMORY[target] for _, _, each in launches)
        found |= {name for name, _, _ in launches}
    return sorted(found)


def sizes() -> None:
    """Run the ops on meta tensors of many sizes; what would have to wait for a value raises."""
    shapes = [
        (8192, 151_936, 64, 2048),
        (1, 1, 1, 8),
        (70_000, 8193, 16, 64),
        (4097, 151_937, 4096, 16),
        (1025, 16, 8, 1),
    ]
    for count, vocabulary, groups, dim in shapes:
        for loss_type in ("dapo", "gspo"):
            settings = GRPOSettings(loss_type, beta=0.1)
            loss_step(settings, sequences=groups, rows=count, vocabulary=vocabulary, dim=dim)
        logprob_step(rows=count, vocabulary=vocabulary, dim=dim)
        group_advantages.group_advantages(meta(groups * count), count, scale="group")
    for rows, heads in ((10_200, 16), (1, 28), (33, 1), (70_001, 64)):
        merge_step(rows, heads, 128)
    for max_group, shape in (
        (8, {}),
        (7, {"groups": 1, "rows": 16}),
        (70, {"groups": 1, "max_prefix": 1}),
        (5, {"groups": 300, "blocks": 1, "max_prefix": 16}),
        (9, {"groups": 17, "blocks": 0}),
        (6, {"groups": 2, "max_prefix": 100_000, "blocks": 3000, "rows": 999_999}),
    ):
        decode_step(torch.bfloat16, 128, 16, 2, max_group, **shape)
    for rows, vocabulary, suppressed in ((64, 151_936, 1), (1, 16, 16), (3, 152_001, 5), (1, 2**21 + 1, 64)):
        sampling_step(0.9, False, 0, 1.0, 0.1, 1.3, rows=rows, vocabulary=vocabulary, suppressed=suppressed)
    for tokens, rows in ((64, 70_000), (1, 16), (7, 17), (512, 999_999)):
        rope_step(torch.bfloat16, tokens=tokens, rows=rows)


def variants(capability: int) -> dict[str, Any]:
    """Return how often each kernel is compiled for calls of many sizes, the most dimensions of a grid, and the kernels
    and operators that sampling launches."""
    with compiling(capability) as launches:
        sizes()
    counts = Counter(name for name, _ in {(name, compiled.hash) for name, _, compiled in launches})
    launched = {}
    for name in ("sampling", "sampling, everything"):
        with compiling(capability) as each, Operators() as operators:
            CASES[name]()
        launched[name] = [kernel for kernel, _, _ in each] + operators.names
    dimensions = max(len(grid) for _, grid, _ in launches)
    return {"compiled": counts, "dimensions": dimensions, "launched": launched}


class Operators(TorchDispatchMode):
    """The operators of torch that launch a kernel: those that neither allocate nor view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func.name().startswith("aten::empty"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def measure(capability: int) -> list[dict[str, Any]]:
    """Return the resources of all kernels; a kernel of several cases is listed with the first."""
    found: dict[str, dict[str, Any]] = {}
    for case, step in CASES.items():
        with compiling(capability) as launches:
            step()
        for name, _, compiled in launches:
            if compiled.hash not in found:
                about = {"case": case, "name": name, "capability": capability}
                found[compiled.hash] = about | _resources(compiled)
    return list(found.values())


def _resources(compiled: Any) -> dict[str, Any]:
    """Return the bytes per program of a kernel, and the instructions in its code by width in bits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    used = {name: int(value) for name, value in re.findall(r"\b(\w+):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return {
        "warps": compiled.metadata.num_warps,
        "registers": used["REG"],
        "stack": used["STACK"],
        "local": used["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared": compiled.metadata.shared,
        "loads": _widths("LDG", code),
        "stores": _widths("STG", code),
        "barriers": len(re.findall(r"\bBAR\.SYNC", code)),
        # of layouts, which move elements between lanes
        "conversions": compiled.asm["ttgir"].count("ttg.convert_layout"),
        # instructions of tensor cores, and those of half-precision operands
        "products": len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", ptx)),
        "half_products": len(re.findall(r"mma\S*\.(?:b?f16)\.b?f16|tcgen05\.mma\S*kind::f16", ptx)),
        # bytes of each asynchronous copy to shared memory
        "copies": [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\S+ [^;]*, (0x\w+),", ptx)],
    }


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def _widths(instruction: str, code: str) -> dict[str, int]:
    """Return the count of an instruction by width in bits."""
    widths = (re.search(r"\.[US]?(8|16|64|128)\b", each) for each in re.findall(rf"\b{instruction}((?:\.\w+)*)", code))
    return Counter(width.group(1) if width else "32" for width in widths)


if __name__ == "__main__":
    what = sys.argv[1]
    print(json.dumps(variants(90) if what == "variants" else names(what) if what in TARGETS else measure(int(what))))
