"""The contents page: every op, its contract, and nothing else. Implementations are found by `registry.py`.

N completion rows, B sequences, G generations a prompt, P prompts, L packed rows, D hidden, V vocabulary,
H query heads, Hkv key and value heads, Dh head dimension, R rows of a pool of keys and values, M blocks of
a suffix, S sequences of an attention.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmr1_kernels import checks
from vlmr1_kernels.layout import PrefixLayout
from vlmr1_kernels.registry import Request, resolve
from vlmr1_kernels.settings import GRPOSettings


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    impl: str = "auto",
    chunk_mib: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """logp_t = z_t[target_t] - logsumexp(z_t), z = softcap(hidden @ weight^T + bias) / temperature.

    softcap(x) = softcap * tanh(x / softcap), or x without one. The entropy is -sum(p * log p). Differentiable
    in hidden, weight and bias through both outputs; backward projects again, so no [N, V] tensor ever exists.

    Args:
        hidden: [N, D] rows that predict the targets; float64, float32, bfloat16 or float16.
        weight: [V, D] output head, same dtype.
        targets: [N] token ids.
        bias: [V].
        entropy: return it too.
        chunk_mib: bound on the logits held at once, in MiB.

    Returns:
        logp [N], or (logp [N], entropy [N]); float32, float64 for float64 inputs.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        ImplementationError: the named implementation does not exist or refuses.
    """
    checks.head(hidden, weight, targets, bias, temperature, softcap, chunk_mib)
    run = _implementation("linear_logprob", impl, hidden, hidden.shape[0], *reversed(weight.shape))
    options = {"temperature": temperature, "softcap": softcap, "entropy": entropy, "chunk_mib": chunk_mib}
    logp, token_entropy = run(hidden, weight, targets, bias=bias, **options)
    return (logp, token_entropy) if entropy else logp


def group_advantages(rewards: Tensor, num_generations: int, *, scale: str = "group", impl: str = "auto") -> Tensor:
    """A = (r - mean of the group) / (std + 1e-4), std unbiased; equal rewards give exactly 0, never NaN.

    The sequences of a group are adjacent. arXiv:2402.03300; scale is TRL's scale_rewards.

    Args:
        rewards: [B] floating point, B a multiple of num_generations.
        scale: group (std of the group) | batch (std of all rewards) | none (no division, arXiv:2503.20783).

    Returns:
        advantages [B] in the dtype of the rewards.

    Raises:
        ValueError: a bad shape, dtype or scale.
    """
    checks.rewards(rewards, num_generations, scale)
    run = _implementation("group_advantages", impl, rewards, rewards.numel(), num_generations)
    return run(rewards, num_generations, scale=scale)


def grpo_loss(
    logp: Tensor,
    seq_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampling_logp: Tensor | None = None,
    settings: GRPOSettings = GRPOSettings(),  # noqa: B008 - frozen
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
    rewards: Tensor | None = None,
    num_generations: int | None = None,
    check: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO objective on given log-probs; formulas and sources: `GRPOSettings`.

    Args:
        logp: [N] log-probs of the completion tokens, sorted by sequence; the loss is differentiable in them.
        seq_ids: [N] integer sequence of each row, 0..B-1.
        advantages: [B]; or give `rewards` [B] with `num_generations` and `group_advantages` makes them.
        old_logp: [N] log-probs of the policy that sampled; None: on-policy, ratio 1 with logp's gradient.
        ref_logp: [N] of the reference model, needed with beta; without beta it is only measured.
        sampling_logp: [N] as the rollout engine reports them, read with `settings.tis_cap`.
        normalizer: sequences (grpo, gspo, dr_grpo) or tokens (bnpo, dapo, cispo) of the whole batch, so that
            the losses of packs add up; None: this call's B or N.
        check: also validate values; synchronizes.

    Returns:
        (loss [], metrics). Metrics are detached: `kl` (0 without ref_logp), `clip_low`, `clip_high` (share of
        rows; for cispo the share above its cap) are means over this call's N rows: weighted by `tokens` those
        of packs combine exactly. `ratio_max`, `logp` [N], `tokens` (N), `dropped_rows` (0 here).

    Raises:
        ValueError: a bad argument, or a setting that log-probs alone cannot serve (entropy_coef).
    """
    if settings.entropy_coef != 0:
        raise ValueError("entropy_coef needs the logits: use linear_grpo_loss")
    checks.row_vector("logp", logp, None, None)
    scores = checks.advantages_or_rewards(advantages, rewards, num_generations)
    checks.objective(logp, seq_ids, scores, old_logp, ref_logp, sampling_logp, settings, normalizer)
    if check:
        checks.objective_values(seq_ids, scores, old_logp, ref_logp, sampling_logp)
    run = _implementation("grpo_loss", impl, logp, logp.numel(), scores[1].numel())
    return run(
        logp,
        seq_ids,
        advantages,
        rewards=rewards,
        num_generations=num_generations,
        old_logp=old_logp,
        ref_logp=ref_logp,
        sampling_logp=sampling_logp,
        settings=settings,
        normalizer=normalizer,
    )


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    seq_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampling_logp: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    settings: GRPOSettings = GRPOSettings(),  # noqa: B008 - frozen
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
    chunk_mib: float | None = None,
    active_rows: Tensor | None = None,
    check: bool = False,
    rewards: Tensor | None = None,
    num_generations: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`grpo_loss(linear_logprob(hidden, weight, targets), ...)` with the gradient made in forward.

    A chunk of rows is projected, turned into log-probs, loss and gradient, consumed by two GEMMs and
    forgotten: three GEMMs, two when the weight is frozen, one without gradient, and never an [N, V] tensor.
    Backward only scales. At importance level sequence a chunk's coefficients need the whole sequence: the
    rows are projected twice (four GEMMs) unless one chunk holds them all; `kernels/README.md` says where
    an implementation can avoid it.

    Args:
        hidden, weight, targets, bias, softcap, chunk_mib: as in `linear_logprob`; the temperature is
            `settings.temperature`.
        seq_ids, advantages, old_logp, ref_logp, sampling_logp, normalizer, rewards, num_generations: as in
            `grpo_loss`.
        active_rows: rows to project: a bool [N], or their indices in increasing order. The caller promises
            that all other rows have advantage 0; then dropping them is exact, since normalizers and sequence
            lengths count them still. A bool tensor on the GPU synchronizes. Refused with beta, entropy_coef.
        check: also validate values (ranges, NaN, that promise); synchronizes.

    Returns:
        (loss [], metrics) as `grpo_loss`, and `entropy`. With `active_rows` the means are over the
        `tokens - dropped_rows` rows that were projected, and `logp` is NaN at the dropped ones.

    Raises:
        ValueError: a bad argument, by name.
        ImplementationError: the named implementation does not exist or refuses.
    """
    checks.head(hidden, weight, targets, bias, settings.temperature, softcap, chunk_mib)
    scores = checks.advantages_or_rewards(advantages, rewards, num_generations)
    checks.objective(targets, seq_ids, scores, old_logp, ref_logp, sampling_logp, settings, normalizer)
    if active_rows is not None:
        active_rows = checks.active_rows(active_rows, hidden, settings)
    if check:
        checks.token_ids(targets, weight.shape[0])
        checks.objective_values(seq_ids, scores, old_logp, ref_logp, sampling_logp, active_rows, num_generations)
    run = _implementation("linear_grpo_loss", impl, hidden, hidden.shape[0], *reversed(weight.shape))
    return run(
        hidden,
        weight,
        targets,
        seq_ids,
        advantages,
        rewards=rewards,
        num_generations=num_generations,
        old_logp=old_logp,
        ref_logp=ref_logp,
        sampling_logp=sampling_logp,
        bias=bias,
        softcap=softcap,
        settings=settings,
        normalizer=normalizer,
        chunk_mib=chunk_mib,
        active_rows=active_rows,
    )


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(softcap(scale * q k^T), masked) v: a prompt row sees its prompt's past, a branch row its own past
    and the whole prompt of its group.

    Equal to attention over each branch's own sequence prompt + branch, gradient included. Query head h reads
    key and value head h // (H / Hkv). softcap(x) = softcap * tanh(x / softcap), or x without one.

    Args:
        q: [1, H, L, Dh], any strides with a contiguous last dimension.
        k, v: [1, Hkv, L, Dh], H a multiple of Hkv.
        layout: which rows are whose prefix; `layout.total_length` is L.
        scale: default Dh ** -0.5.
        window: a row sees the last `window` rows of its own sequence prompt + branch, itself included.

    Returns:
        [1, H, L, Dh] in the dtype of q, differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together or the layout.
        ImplementationError: the named implementation does not exist or refuses; softcap and window not all serve.
    """
    checks.attention(q, k, v, layout, softcap, window)
    _, heads, length, head_dim = q.shape
    options = {"softcap": softcap, "window": window}
    given = {name: value for name, value in options.items() if value is not None}
    shape = (heads, k.shape[1], length, head_dim)
    run = _implementation("shared_prefix_attention", impl, q, *shape, options=frozenset(given))
    return run(q, k, v, layout, scale=head_dim**-0.5 if scale is None else scale, **given)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T) v within each of S sequences that lie behind one another; every row sees its whole
    sequence. What vision towers do over images and windows.

    Args:
        q: [1, H, L, Dh], any strides with a contiguous last dimension.
        k, v: [1, Hkv, L, Dh], H a multiple of Hkv.
        cu_seqlens: [S + 1] int32 on the device of q, 0 = first <= ... <= last = L: sequence s has the rows
            cu_seqlens[s]..cu_seqlens[s + 1] - 1.
        max_length: no sequence has more rows.
        scale: default Dh ** -0.5.

    Returns:
        [1, H, L, Dh] in the dtype of q, differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; on a CPU also values of cu_seqlens and
            max_length, which on a GPU are not looked at, since that would synchronize.
        ImplementationError: the named implementation does not exist or refuses.
    """
    checks.varlen(q, k, v, cu_seqlens, max_length)
    _, heads, length, head_dim = q.shape
    run = _implementation("varlen_attention", impl, q, heads, k.shape[1], length, head_dim)
    return run(q, k, v, cu_seqlens, max_length, scale=head_dim**-0.5 if scale is None else scale)


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
    """One decode step: softmax(scale * q [prefix, suffix]^T) [prefix, suffix]; the queries of a group share one
    read of its prefix (the idea of Hydragen, arXiv:2402.05099).

    All keys and values of a layer are rows of one pool. The prefix of a group is a run of rows; token t of a
    branch's suffix is row suffix_blocks[b, t // block] * block + t % block. Rows that no length reaches are not
    read, nor are the entries of suffix_blocks past the last used block: they may hold anything. On CUDA nothing
    waits for the device and the launches depend on shapes, `max_group` and `max_prefix` alone, so that a CUDA
    graph of a call serves any offsets, lengths and blocks within them.

    Args:
        q: [B, H, Dh] the new token of each branch; the branches of a group are adjacent.
        keys, values: [Hkv, R, Dh] the pool, any strides with a contiguous last dimension, the keys and values of
            the new tokens included; query head h reads key and value head h // (H / Hkv).
        group_offsets: [P + 1] rising from 0: group p has the branches group_offsets[p]..group_offsets[p + 1] - 1,
            or none, then its prefix is not read. Branches from group_offsets[P] to B - 1 are padding: their
            output is 0, whatever their q, blocks and lengths are.
        prefix_starts, prefix_lengths: [P] first row and number of rows, at least 1, of each group's prefix.
        suffix_blocks: [B, M].
        suffix_lengths: [B] tokens of each suffix, 0..M * block.
        block: rows of a block.
        max_group: no group has more branches; default B.
        max_prefix: no prefix has more rows; default R.
        scale: default Dh ** -0.5.

        Offsets, starts, lengths and blocks are int32 on the device of q. Their values are trusted: on a GPU
        looking at them would synchronize.

    Returns:
        [B, H, Dh] in the dtype of q, without gradient.

    Raises:
        ValueError: shapes, strides, dtypes or devices do not fit together, or a gradient is asked for.
        ImplementationError: the named implementation does not exist or refuses.
    """
    tables = (group_offsets, prefix_starts, prefix_lengths, suffix_blocks, suffix_lengths)
    checks.decode(q, keys, values, *tables, block, max_group, max_prefix)
    batch, heads, head_dim = q.shape
    kv_heads, rows, _ = keys.shape
    shape = (batch, len(prefix_starts), heads, kv_heads, head_dim)
    run = _implementation("shared_prefix_decode", impl, q, *shape)
    bounds = {"max_group": batch if max_group is None else max_group, "max_prefix": max_prefix or rows}
    scale = head_dim**-0.5 if scale is None else scale
    return run(q, keys, values, *tables, block=block, **bounds, scale=scale)


def _implementation(
    op: str, impl: str, tensor: Tensor, *shape: int, options: frozenset[str] = frozenset()
) -> Callable[..., Any]:
    run = resolve(op, impl, Request(tensor.device, tensor.dtype, shape, options))
    if not torch.is_autocast_enabled(tensor.device.type):
        return run

    def without_autocast(*args: Any, **options: Any) -> Any:
        # An op computes in the dtype of its tensors; autocast would narrow its GEMMs.
        with torch.autocast(tensor.device.type, enabled=False):
            return run(*args, **options)

    return without_autocast
