"""Cases of the attention ops, against SDPA on sequences that repeat their prompt, a loop of SDPA calls, and SDPA over a
cache in which every branch repeats its prefix."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.op_calls import FLOOR, Call, Outputs, Problem, copy_of, ours, product_of
from vlmr1_kernels import (
    PrefixLayout,
    rope_kv_write,
    shared_prefix_attention,
    shared_prefix_decode,
    varlen_attention,
)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
BLOCK = 16  # rows of a block of the KV cache
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Projections:
    """q [1, H, L, Dh], k and v [1, Hkv, L, Dh] and the gradient of the output, as a model's projections leave them."""

    def __init__(self, rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str):
        generator = torch.Generator(device).manual_seed(3)

        def normal(count: int) -> Tensor:
            drawn = torch.randn(1, rows, count, head_dim, device=device, generator=generator)
            return drawn.to(dtype).transpose(1, 2)

        self.q, self.d_out = normal(heads), normal(heads)
        self.k, self.v = normal(kv_heads), normal(kv_heads)
        self.dtype, self.device = dtype, device
        self.moved = 4 * (heads + kv_heads) * rows * head_dim * dtype.itemsize  # q, k, v, the output, all gradients
        self.flops_a_pair = 7 * 2 * heads * head_dim  # two products forward, five backward

    def run(self, attention: Attention, dtype: torch.dtype | None = None) -> Outputs:
        """Return the output and the gradients of q, k, v."""
        leaves = [each.detach().to(dtype or each.dtype).requires_grad_() for each in (self.q, self.k, self.v)]
        out = attention(*leaves)
        gradients = torch.autograd.grad(out, leaves, self.d_out.to(out.dtype))
        return {"out": out.detach(), **dict(zip(("d_q", "d_k", "d_v"), gradients, strict=True))}

    def problem(self, op: str, pairs: int, make: Callable[[str], Attention], eager: Attention, note: str) -> Problem:
        """The case whose visible pairs of rows are so many."""
        tolerance, flops = TOLERANCE[self.dtype], self.flops_a_pair * pairs
        arms = {
            FLOOR: product_of(flops, self.dtype, self.device),
            **ours(op, lambda impl: Call(lambda: self.run(make(impl)), tolerance)),
            "eager": lambda: Call(lambda: self.run(eager), tolerance, note),
        }
        return Problem(flops, self.moved, lambda: self.run(eager, torch.float64), arms)


def shared_prefix(*sizes: int, dtype: torch.dtype, device: str) -> Problem:
    groups, prompt, branches, length, heads, kv_heads, head_dim = sizes
    layout = PrefixLayout((prompt,) * groups, ((length,) * branches,) * groups)
    tensors = Projections(layout.total_length, heads, kv_heads, head_dim, dtype, device)
    rows, back = (each.to(device) for each in repetition(groups, prompt, branches, length))

    def make(impl: str) -> Attention:
        return lambda q, k, v: shared_prefix_attention(q, k, v, layout, impl=impl)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (
            x[0].index_select(1, rows).unflatten(1, (-1, prompt + length)).transpose(0, 1) for x in (q, k, v)
        )  # [B, H, prompt + branch, Dh]
        out = sdpa(queries, keys, values, is_causal=True, enable_gqa=True)
        return out.transpose(0, 1).flatten(1, 2).index_select(1, back)[None]

    pairs = prompt * (prompt + 1) // 2 + branches * (length * prompt + length * (length + 1) // 2)
    note = "SDPA, causal, on prompt + branch; making the copies and summing their gradients included"
    return tensors.problem("shared_prefix_attention", groups * pairs, make, repeated, note)


def repetition(groups: int, prompt: int, branches: int, length: int) -> tuple[Tensor, Tensor]:
    """Return the packed row of each row of the repeated sequences, and where each packed row is among those."""
    prompts = torch.arange(groups * prompt).view(groups, 1, prompt).expand(-1, branches, -1)
    own = groups * prompt + torch.arange(groups * branches * length).view(groups, branches, length)
    rows = torch.cat([prompts, own], dim=2).flatten()
    places = torch.arange(len(rows)).view(groups, branches, prompt + length)
    return rows, torch.cat([places[:, 0, :prompt].flatten(), places[:, :, prompt:].flatten()])


def varlen(*sizes: int, dtype: torch.dtype, device: str) -> Problem:
    sequences, length, heads, kv_heads, head_dim = sizes
    lengths = [length] * sequences
    tensors = Projections(sum(lengths), heads, kv_heads, head_dim, dtype, device)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    def make(impl: str) -> Attention:
        return lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, length, impl=impl)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        outs = [sdpa(*part, enable_gqa=True).transpose(1, 2) for part in parts]
        return torch.cat(outs, dim=1).transpose(1, 2)

    pairs = sequences * length * length
    return tensors.problem("varlen_attention", pairs, make, loop, "a loop of SDPA calls, as vision towers have it")


def decode(*sizes: int, dtype: torch.dtype, device: str) -> Problem:
    """One step of one layer; prefixes behind one another in the pool, blocks of suffixes shuffled."""
    groups, branches, prefix, suffix, heads, kv_heads, head_dim = sizes
    batch, blocks, first = groups * branches, -(-suffix // BLOCK), -(-groups * prefix // BLOCK)
    generator = torch.Generator(device).manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator).to(dtype)

    def int32(values: range | list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    q = normal(batch, heads, head_dim)
    keys, values = normal(2, kv_heads, BLOCK * (first + batch * blocks), head_dim)
    order = first + torch.randperm(batch * blocks, device=device, generator=generator).view(batch, blocks)
    starts = int32(range(0, groups * prefix, prefix))
    tables = (int32(range(0, batch + 1, branches)), starts, int32([prefix] * groups), order.int())

    def step(impl: str) -> Outputs:
        bounds = {"block": BLOCK, "max_group": branches, "max_prefix": prefix}
        return {"out": shared_prefix_decode(q, keys, values, *tables, int32_suffix, **bounds, impl=impl)}

    def own(pool: Tensor) -> Tensor:
        """[Hkv, R, Dh] -> [B, Hkv, prefix + suffix, Dh], every branch's own rows."""
        time = torch.arange(max(prefix, suffix), device=device)
        prompts = (starts[:, None] + time[:prefix]).repeat_interleave(branches, 0)
        suffixes = order[:, time[:suffix] // BLOCK] * BLOCK + time[:suffix] % BLOCK
        return pool[:, torch.cat([prompts, suffixes], dim=1)].transpose(0, 1).contiguous()

    def attend(query: Tensor, own_keys: Tensor, own_values: Tensor) -> Outputs:
        return {"out": sdpa(query[:, :, None], own_keys, own_values, enable_gqa=True)[:, :, 0]}

    def eager() -> Call:
        cache = own(keys), own(values)
        return Call(lambda: attend(q, *cache), tolerance, "SDPA; its cache of repeated prefixes is there already")

    int32_suffix, tolerance = int32([suffix] * batch), TOLERANCE[dtype]
    row = head_dim * dtype.itemsize
    moved = row * (2 * kv_heads * (groups * prefix + batch * suffix) + 2 * heads * batch)
    arms = {
        FLOOR: copy_of(moved, device),
        **ours("shared_prefix_decode", lambda impl: Call(lambda: step(impl), tolerance)),
        "eager": eager,
    }
    flops = 2 * 2 * heads * head_dim * batch * (prefix + suffix)
    return Problem(flops, moved, lambda: attend(q.double(), own(keys.double()), own(values.double())), arms)


def rope(tokens: int, heads: int, kv_heads: int, head_dim: int, *, dtype: torch.dtype, device: str) -> Problem:
    """One step of one layer with norms of heads; each token has a row of a cache of 16 rows a token."""
    generator = torch.Generator(device).manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    shares = (heads, kv_heads, kv_heads)
    q, k, v = normal(tokens, sum(shares), head_dim).to(dtype).split(shares, 1)
    angles = normal(tokens, head_dim // 2).repeat(1, 2)
    cache, rows = normal(2, kv_heads, 16 * tokens, head_dim).to(dtype), 16 * torch.arange(tokens, device=device)
    weights = normal(2, head_dim)

    def call(*given: Tensor, impl: str) -> Outputs:
        q, k, v, cos, sin, q_norm, k_norm, keys, values = given
        out = rope_kv_write(q, k, v, cos, sin, keys, values, rows, q_norm=q_norm, k_norm=k_norm, impl=impl)
        return {"out": out, "keys": keys[:, rows], "values": values[:, rows]}

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        x = torch.nn.functional.rms_norm(x.float(), (head_dim,), weight, 1e-6)
        first, second = x.chunk(2, -1)
        return (x * angles.cos()[:, None] + torch.cat((-second, first), -1) * angles.sin()[:, None]).to(dtype)

    def eager() -> Outputs:
        cache[0].index_copy_(1, rows, turned(k, weights[1]).transpose(0, 1))
        cache[1].index_copy_(1, rows, v.transpose(0, 1))
        return {"out": turned(q, weights[0]), "keys": cache[0][:, rows], "values": cache[1][:, rows]}

    given = (q, k, v, angles.cos(), angles.sin(), *weights, *cache)
    exact = [each.double() for each in given]
    size, tolerance = dtype.itemsize, TOLERANCE[dtype]
    moved = tokens * head_dim * (2 * sum(shares) * size + 2 * 4)  # angles are float32
    arms = {
        FLOOR: copy_of(moved, device),
        **ours("rope_kv_write", lambda impl: Call(lambda: call(*given, impl=impl), tolerance)),
        "eager": lambda: Call(eager, tolerance),
    }
    return Problem(0, moved, lambda: call(*exact, impl="reference"), arms)
