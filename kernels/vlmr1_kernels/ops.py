"""The ops and their contracts; those of a decode step are in `decode_ops.py`. `registry.py` selects the implementation.

Dimensions: N completion rows, B sequences, G generations per prompt, P prompts, L packed rows, D hidden size,
V vocabulary, H query heads, Hkv key and value heads, Dh head dimension, S sequences of a variable-length attention.
"""

from torch import Tensor

from vlmr1_kernels import checks
from vlmr1_kernels.inputs import HeadInputs, LossInputs
from vlmr1_kernels.layout import PrefixLayout
from vlmr1_kernels.registry import implementation_for
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
    """Return the log-probs of target tokens under an output head, without materializing the [N, V] logits.

    logp_t = z_t[target_t] - logsumexp(z_t) with z = softcap(hidden @ weight^T + bias) / temperature, and
    softcap(x) = softcap * tanh(x / softcap), or x if None. The entropy is -sum(p * log p). Both outputs are
    differentiable in hidden, weight and bias; backward recomputes the logits chunk by chunk.

    Args:
        hidden: [N, D] rows that predict the targets; float64, float32, bfloat16 or float16.
        weight: [V, D] output head, same dtype, or float32 with half-precision hidden: the GEMMs then read it in the
            dtype of hidden, and its gradient is float32.
        targets: [N] int64 or int32 token ids.
        bias: [V], in the dtype of hidden, or None.
        temperature: divides the logits before the softmax.
        softcap: bound of the logits, or None.
        entropy: also return the entropies.
        impl: name of an implementation, or "auto"; in every op.
        chunk_mib: MiB of logits to hold at once, for every gradient that is computed from them; None: chosen from the
            shape (`docs/kernels.md`).

    Returns:
        logp [N], or (logp [N], entropy [N]); float32, float64 for float64 inputs.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        ImplementationError: the implementation does not exist or does not support the call.
    """
    head = HeadInputs(hidden, weight, bias, targets, temperature, softcap)
    checks.head(head, chunk_mib)
    run = implementation_for("linear_logprob", impl, hidden, hidden.shape[0], *reversed(weight.shape))
    logp, token_entropy = run(head, entropy=entropy, chunk_mib=chunk_mib)
    return (logp, token_entropy) if entropy else logp


def group_advantages(rewards: Tensor, num_generations: int, *, scale: str = "group", impl: str = "auto") -> Tensor:
    """Return group-relative advantages (r - mean) / (std + 1e-4), arXiv:2402.03300; exactly 0 for equal rewards.

    Args:
        rewards: [B] floating point, B a multiple of num_generations; the sequences of a group are adjacent.
        scale: "group" (unbiased std of the group), "batch" (std of all rewards) or "none" (no division,
            arXiv:2503.20783); TRL's scale_rewards.

    Returns:
        advantages [B] in the dtype of the rewards.

    Raises:
        ValueError: wrong shape, dtype or scale.
        ImplementationError: the implementation does not exist or does not support the call.
    """
    checks.rewards(rewards, num_generations, scale)
    run = implementation_for("group_advantages", impl, rewards, rewards.numel(), num_generations)
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
    """Return the GRPO loss of given log-probs; `GRPOSettings` has the formulas and their sources.

    Args:
        logp: [N] log-probs of the completion tokens, sorted by sequence; the loss is differentiable in them.
        seq_ids: [N] int64 or int32 sequence of each row, 0..B-1.
        advantages: [B]; or pass `rewards` [B] and `num_generations`, which `group_advantages` turns into advantages.
        old_logp: [N] log-probs of the policy that sampled; None: on-policy, the ratio is 1.
        ref_logp: [N] log-probs of the reference model; required if beta > 0, else used for the metric `kl` only.
        sampling_logp: [N] log-probs reported by the rollout engine; required with `settings.tis_cap`.
        normalizer: sequences (grpo, gspo, dr_grpo) or tokens (bnpo, dapo, cispo) of the whole batch, so that the
            losses of its packs add up; None: B or N of this call.
        check: also validate values, which waits for the device.

    Returns:
        (loss [], metrics). All metrics are detached. `kl` (0 without ref_logp), `clip_low` and `clip_high` (fraction
        of rows; for cispo the fraction above the cap) are means over the N rows of this call; those of several packs
        combine exactly when weighted by `tokens`. Also `ratio_max`, `logp` [N], `tokens` (N) and `dropped_rows` (0).

    Raises:
        ValueError: a wrong argument, or entropy_coef, which needs logits.
        ImplementationError: the implementation does not exist or does not support the call.
    """
    if settings.entropy_coef != 0:
        raise ValueError("entropy_coef needs the logits: use linear_grpo_loss")
    checks.row_vector("logp", logp, None, None)
    row_logps = (old_logp, ref_logp, sampling_logp)
    inputs = LossInputs(seq_ids, advantages, rewards, num_generations, *row_logps, normalizer)
    sequences = checks.objective(logp, inputs, settings)
    if check:
        checks.objective_values(inputs)
    run = implementation_for("grpo_loss", impl, logp, logp.numel(), sequences)
    return run(logp, inputs, settings=settings)


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
    accumulate_grad: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `grpo_loss(linear_logprob(hidden, weight, targets), ...)`, with the gradient computed in forward.

    Each chunk of rows is projected to logits, which become log-probs, loss and gradient, and two GEMMs consume the
    gradient. This takes three GEMMs, two with a frozen weight, one without gradient; backward only scales. At
    importance level sequence the gradient of a row needs its whole sequence: the rows are projected twice (four
    GEMMs) unless one chunk holds them all. `docs/kernels.md` lists where an implementation avoids that.

    Args:
        hidden, weight, targets, bias, softcap, chunk_mib: as in `linear_logprob`; the temperature is
            `settings.temperature`.
        seq_ids, advantages, old_logp, ref_logp, sampling_logp, normalizer, rewards, num_generations: as in
            `grpo_loss`.
        active_rows: rows to project: bool [N], or increasing int64 indices. All other rows must have advantage 0;
            dropping them is then exact, since normalizers and sequence lengths still count them. A bool tensor on
            the GPU waits for the device. Not supported with beta or entropy_coef.
        check: also validate values (ranges, NaN, advantages of dropped rows), which waits for the device.
        accumulate_grad: backward adds the gradient of `weight`, a leaf, to `weight.grad` itself, in one pass over it.
            Autograd sees no such gradient: no hook of the weight runs (DDP, FSDP and ZeRO use them), and
            `torch.autograd.grad` finds none.

    Returns:
        (loss [], metrics) as in `grpo_loss`, and the mean `entropy`. With `active_rows` the means are over the
        `tokens - dropped_rows` projected rows, and `logp` is NaN at the dropped ones.

    Raises:
        ValueError: a wrong argument.
        ImplementationError: the implementation does not exist or does not support the call.
    """
    head = HeadInputs(hidden, weight, bias, targets, settings.temperature, softcap)
    checks.head(head, chunk_mib)
    row_logps = (old_logp, ref_logp, sampling_logp)
    inputs = LossInputs(seq_ids, advantages, rewards, num_generations, *row_logps, normalizer)
    checks.objective(targets, inputs, settings)
    if active_rows is not None:
        active_rows = checks.active_rows(active_rows, hidden, settings)
    if accumulate_grad:
        checks.leaf("weight", weight)
    if check:
        checks.token_ids(targets, weight.shape[0])
        checks.objective_values(inputs, active_rows)
    run = implementation_for("linear_grpo_loss", impl, hidden, hidden.shape[0], *reversed(weight.shape))
    options = {"chunk_mib": chunk_mib, "active_rows": active_rows, "accumulate_grad": accumulate_grad}
    return run(head, inputs, settings=settings, **options)


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
    """Return softmax(softcap(scale * q k^T), masked) v over groups of branches that share their prompt.

    A prompt row attends causally to its prompt; a branch row to the whole prompt of its group and causally to its
    branch. Outputs and gradients equal causal attention over each sequence prompt + branch. Query head h reads key
    and value head h // (H / Hkv). softcap(x) = softcap * tanh(x / softcap), or x if None.

    Args:
        q: [1, H, L, Dh], any strides with a contiguous last dimension.
        k, v: [1, Hkv, L, Dh], H a multiple of Hkv.
        layout: prompts and branches of the L rows.
        scale: default Dh ** -0.5.
        softcap: bound of the scores, or None.
        window: sliding window: rows of its sequence prompt + branch that a row attends to, itself included; or None.

    Returns:
        [1, H, L, Dh] in the dtype of q, differentiable in q, k and v.

    Raises:
        ValueError: inconsistent shapes, dtypes or devices, or a layout of another length.
        ImplementationError: the implementation does not exist or does not support the call, e.g. softcap or window.
    """
    checks.attention(q, k, v, layout, softcap, window)
    _, heads, length, head_dim = q.shape
    options = {"softcap": softcap, "window": window}
    given = {name: value for name, value in options.items() if value is not None}
    shape = (heads, k.shape[1], length, head_dim)
    run = implementation_for("shared_prefix_attention", impl, q, *shape, options=frozenset(given))
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
    """Return softmax(scale * q k^T) v within each of S concatenated sequences, without causal mask.

    Vision towers use it over images and windows.

    Args:
        q: [1, H, L, Dh], any strides with a contiguous last dimension.
        k, v: [1, Hkv, L, Dh], H a multiple of Hkv.
        cu_seqlens: [S + 1] int32 on the device of q, non-decreasing from 0 to L: sequence s has the rows
            cu_seqlens[s]..cu_seqlens[s + 1] - 1.
        max_length: upper bound of the sequence lengths.
        scale: default Dh ** -0.5.

    Returns:
        [1, H, L, Dh] in the dtype of q, differentiable in q, k and v.

    Raises:
        ValueError: inconsistent shapes, dtypes or devices; on a CPU also wrong values of cu_seqlens or max_length. On
            a GPU values are not checked, since that would wait for the device.
        ImplementationError: the implementation does not exist or does not support the call.
    """
    checks.varlen(q, k, v, cu_seqlens, max_length)
    _, heads, length, head_dim = q.shape
    run = implementation_for("varlen_attention", impl, q, heads, k.shape[1], length, head_dim)
    return run(q, k, v, cu_seqlens, max_length, scale=head_dim**-0.5 if scale is None else scale)
