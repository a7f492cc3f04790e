"""The ops of a decode step and their contracts, as in `ops.py`.

Dimensions: B sequences, P prompts, V vocabulary, H query heads, Hkv key and value heads, Dh head dimension, R rows of a
KV cache, M blocks of a suffix, S tokens of a decode step, Dr rotated columns of a head.
"""

from torch import Tensor

from vlmr1_kernels import checks
from vlmr1_kernels.inputs import DecodeTables, SamplingOptions
from vlmr1_kernels.registry import implementation_for


def shared_prefix_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    group_offsets: Tensor,
    prefix_starts: Tensor,
    prefix_lengths: Tensor,
    suffix_blocks: Tensor,
    suffix_lengths: Tensor,
    *,
    block: int,
    max_group: int | None = None,
    max_prefix: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the attention of one decode step over each branch's prefix and suffix.

    The queries of a group read its prefix together (Hydragen, arXiv:2402.05099). Keys and values of a layer are rows
    of one KV cache: a prefix is a run of adjacent rows; token t of a suffix is row
    suffix_blocks[b, t // block] * block + t % block. Rows beyond a length and entries of suffix_blocks beyond the
    last used block are not read and may be uninitialized. On CUDA nothing waits for the device, and launches depend
    on shapes, `max_group` and `max_prefix` alone: a CUDA graph can be replayed with other offsets, lengths and blocks.

    Args:
        q: [B, H, Dh] new token of each branch; the branches of a group are adjacent.
        keys, values: [Hkv, R, Dh] KV cache, any strides with a contiguous last dimension, which already holds the
            new tokens; query head h reads key and value head h // (H / Hkv).
        group_offsets: [P + 1] non-decreasing from 0: group p has the branches
            group_offsets[p]..group_offsets[p + 1] - 1, possibly none. Branches from group_offsets[P] on are padding:
            their output is 0.
        prefix_starts, prefix_lengths: [P] first row and number of rows, at least 1, of each prefix.
        suffix_blocks: [B, M] block ids.
        suffix_lengths: [B] tokens of each suffix, 0..M * block.
        block: rows of a block.
        max_group: upper bound of the branches of a group; default B.
        max_prefix: upper bound of prefix_lengths; default R.
        scale: default Dh ** -0.5.

        Offsets, starts, lengths and blocks are int32 on the device of q. Their values are not checked.

    Returns:
        [B, H, Dh] in the dtype of q, without gradient.

    Raises:
        ValueError: inconsistent shapes, strides, dtypes or devices, or an argument that requires a gradient.
        ImplementationError: the implementation does not exist or does not support the call.
    """
    tables = DecodeTables(group_offsets, prefix_starts, prefix_lengths, suffix_blocks, suffix_lengths)
    checks.decode(q, keys, values, tables, block, max_group, max_prefix)
    batch, heads, head_dim = q.shape
    kv_heads, rows, _ = keys.shape
    shape = (batch, len(prefix_starts), heads, kv_heads, head_dim)
    run = implementation_for("shared_prefix_decode", impl, q, *shape)
    bounds = {"max_group": batch if max_group is None else max_group, "max_prefix": max_prefix or rows}
    scale = head_dim**-0.5 if scale is None else scale
    return run(q, keys, values, tables, block=block, **bounds, scale=scale)


def sample_tokens(
    logits: Tensor,
    draws: Tensor,
    suppressed_ids: Tensor | None = None,
    seen: Tensor | None = None,
    *,
    options: SamplingOptions = SamplingOptions(),  # noqa: B008 - immutable
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens drawn from softmax(logits / temperature), by inverting its cumulative distribution at `draws`.

    The penalty, the temperature, suppressed ids, top_k, top_p and min_p change the distribution in this order.
    Implementations agree but where a draw lies within rounding of the boundary of two tokens. A token of probability 0
    is never drawn. A row with NaN has NaN log-probs and any token.

    Args:
        logits: [S, V], any strides.
        draws: [S] float64 in [0, 1).
        suppressed_ids: [n] int64 ids in 0..V-1 that are never drawn; not checked on a GPU.
        seen: [S, V] bool, True at the tokens that the repetition penalty applies to; required with a penalty.
        options: `temperature` divides the logits. `greedy` takes the most probable token, the first of equal ones.
            `top_k` (0: all), `top_p` (1: all) and `min_p` (0: all) keep the k most probable tokens and those equal to
            the last of these, the most probable tokens that together have this probability, and the tokens with at
            least this share of the greatest probability. `repetition_penalty` divides positive logits of seen tokens
            and multiplies negative ones.

    Returns:
        tokens [S] int64; logp [S] of softmax(logits / temperature); sampling_logp [S] of the distribution drawn from.
        Log-probs are float32, float64 for float64 logits, without gradient.

    Raises:
        ValueError: a wrong argument, or logits that require a gradient.
        ImplementationError: the implementation does not exist or does not support the call, e.g. top_k or top_p.
    """
    checks.sampling(logits, draws, suppressed_ids, seen, options)
    given = {"top_k": 0 < options.top_k < logits.shape[1], "top_p": options.top_p < 1}
    truncations = frozenset(name for name, active in given.items() if active)
    run = implementation_for("sample_tokens", impl, logits, *logits.shape, options=truncations)
    return run(logits, draws, suppressed_ids, seen, options=options)


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Return the rotated queries of one decode step; write its rotated keys and its values to the KV cache.

    x becomes x * cos + rotate(x) * sin in its first Dr columns. rotate pairs column d with d + Dr / 2, or with
    `interleaved` column 2d with 2d + 1, and turns a pair (a, b) into (-b, a). With a norm, x is first divided by its
    root mean square over Dh and multiplied by the weight. The arithmetic is float32, rounded once.

    Args:
        q: [S, H, Dh] queries of the new tokens, any strides with a contiguous last dimension.
        k, v: [S, Hkv, Dh] their keys and values, likewise.
        cos, sin: [S, Dr] in float32 or the dtype of q, Dr even and at most Dh.
        keys, values: [Hkv, R, Dh] KV cache of a layer, any strides with a contiguous last dimension, written in place.
        rows: [S] int64 row of each token. Their values are not checked; of equal rows any one is written.
        q_norm, k_norm: [Dh] weights of RMS norms of queries and keys in float32 or the dtype of q, both or neither.
        eps: of the norms.
        interleaved: whether the columns of a pair are adjacent.

    Returns:
        [S, H, Dh] contiguous in the dtype of q, without gradient.

    Raises:
        ValueError: inconsistent shapes, strides, dtypes or devices, or an argument that requires a gradient.
        ImplementationError: the implementation does not exist or does not support the call.
    """
    checks.rope(q, k, v, cos, sin, keys, values, rows, q_norm, k_norm)
    run = implementation_for("rope_kv_write", impl, q, len(q), q.shape[1], k.shape[1], q.shape[2])
    return run(q, k, v, cos, sin, keys, values, rows, q_norm, k_norm, eps, interleaved)
