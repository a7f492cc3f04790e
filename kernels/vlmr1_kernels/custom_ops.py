"""Registers compiled implementations as torch custom ops: schema, fake tensors and autograd of all of them.

Each function here takes plain functions on tensors and returns the function that `ops.py` calls. The plain functions
become custom ops `vlmr1_kernels::<op>_<implementation>`, which torch.compile does not trace into.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmr1_kernels.inputs import HeadInputs, LossInputs
from vlmr1_kernels.linear import accumulation_dtype, add_to_grad, chunk_rows
from vlmr1_kernels.settings import GRPOSettings

_LIBRARY = torch.library.Library("vlmr1_kernels", "FRAGMENT")
_METRICS = ("kl", "clip_low", "clip_high", "ratio_max")
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets"
_OPTIONS = "float temperature, float? softcap"  # with _HEAD the fields of HeadInputs
_HEAD_COUNT = len(HeadInputs._fields)
_NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"
_INPUTS = (  # fields of LossInputs
    "Tensor seq_ids, Tensor? advantages, Tensor? rewards, int num_generations, "
    "Tensor? old_logp, Tensor? ref_logp, Tensor? sampling_logp, Tensor? normalizer"
)
_INPUTS_COUNT = len(LossInputs._fields)
_SETTINGS = (  # fields of GRPOSettings
    "str loss_type, float epsilon_low, float epsilon_high, float? delta, float beta, str kl, "
    "bool use_bias_correction_kl, str importance_level, float? tis_cap, float entropy_coef, float temperature, "
    "int? max_completion_length"
)
_SETTINGS_COUNT = len(fields(GRPOSettings))

# Custom ops that are made of torch's ops, and what they run: a count of allocations looks into them.
COMPOSED: dict[Any, Callable[..., Any]] = {}

ChunkRows = Callable[[Tensor, Tensor, float | None], tuple[int, int]]  # `linear.chunk_rows`


def register(name: str, arguments: str, results: int, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the custom op `vlmr1_kernels::<name>`. torch.library.custom_op would import torch._dynamo."""
    _LIBRARY.define(f"{name}({arguments}) -> ({', '.join(['Tensor'] * results)})")
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"{_LIBRARY.ns}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, _LIBRARY.ns), name).default


def attention(
    op: str,
    name: str,
    rows: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, ...]],
    empty_gradients: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
    *,
    lse_by_row: bool = False,
) -> Callable[..., Tensor]:
    """Return the op run(q, k, v, *rows, scale) from functions of q [1, H, L, Dh] and k, v [1, Hkv, L, Dh].

    forward(q, k, v, *rows, scale) -> out [1, H, L, Dh] with rows outermost in memory, log-sum-exp [H, L], with rows
        outermost if `lse_by_row`
    backward(d_out, q, k, v, out, lse, *rows, scale) -> d_q, d_k, d_v
    empty_gradients(q, k, v) -> tensors with the shapes and strides of d_q, d_k, d_v

    `rows` is the schema of the arguments that say which rows attend to which; the first is a tensor.
    """

    def fake_forward(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        _, heads, length, head_dim = q.shape
        out = q.new_empty(1, length, heads, head_dim).transpose(1, 2)
        shape = (length, heads) if lse_by_row else (heads, length)
        lse = q.new_empty(shape, dtype=accumulation_dtype(q.dtype))
        return out, lse.T if lse_by_row else lse

    def fake_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
        return empty_gradients(q, k, v)

    qkv, options = "Tensor q, Tensor k, Tensor v", f"{rows}, float scale"
    run_forward = register(f"{op}_{name}", f"{qkv}, {options}", 2, forward, fake_forward)
    arguments = f"Tensor d_out, {qkv}, Tensor out, Tensor lse, {options}"
    run_backward = register(f"{op}_{name}_backward", arguments, 3, backward, fake_backward)
    COMPOSED.update({run_forward: forward, run_backward: backward})

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, *options: Any) -> Tensor:
            out, lse = run_forward(q, k, v, table, *options)
            ctx.save_for_backward(q, k, v, out, lse, table)
            ctx.options = options
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
            gradients = run_backward(d_out, *ctx.saved_tensors, *ctx.options)
            return *gradients, None, *([None] * len(ctx.options))

    return Attention.apply  # type: ignore[return-value]


def _flat_inputs(inputs: LossInputs, like: Tensor) -> LossInputs:
    """Return the inputs as the schema takes them: no optional int, the normalizer a tensor [] on the device."""
    value, dtype = inputs.normalizer, accumulation_dtype(like.dtype)
    if isinstance(value, Tensor):
        value = value.detach().reshape(()).to(like.device, dtype)
    elif value is not None:
        value = torch.full((), value, dtype=dtype, device=like.device)
    return inputs._replace(num_generations=inputs.num_generations or 1, normalizer=value)


def group_advantages(name: str, forward: Callable[[Tensor, int, str], Tensor]) -> Callable[..., Tensor]:
    """Return the op from forward(rewards [B], num_generations, scale) -> [B]."""

    def fake(rewards: Tensor, num_generations: int, scale: str) -> Tensor:
        return torch.empty_like(rewards)

    arguments = "Tensor rewards, int num_generations, str scale"
    run_forward = register(f"group_advantages_{name}", arguments, 1, forward, fake)

    def run(rewards: Tensor, num_generations: int, *, scale: str) -> Tensor:
        return run_forward(rewards.detach(), num_generations, scale)

    return run


def linear_logprob(
    name: str, forward: Callable[..., Any], backward: Callable[..., Any], chunk_rows: ChunkRows = chunk_rows
) -> Callable[..., Any]:
    """Return the op from two functions.

    forward(head, entropy, chunks)
        -> logp [N], entropy [N] or [0], lse [N] of the logits after softcap and temperature
    backward(head, lse, entropy, d_logp [N], d_entropy [N] or [0], needs, chunks)
        -> d_hidden [N, D], d_weight [V, D], d_bias [V], in the dtype of the input; [0] if not needed

    `chunks` are the rows to project and the rows to consume at once. `needs` says which of the gradients of hidden,
    weight and bias to compute.
    """

    def call_forward(*values: Any) -> Any:
        return forward(HeadInputs(*values[:_HEAD_COUNT]), *values[_HEAD_COUNT:])

    def call_backward(*values: Any) -> Any:
        return backward(HeadInputs(*values[:_HEAD_COUNT]), *values[_HEAD_COUNT:-4], values[-4:-1], values[-1])

    def fake_forward(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        logp = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
        return logp, torch.empty_like(logp) if others[-2] else logp.new_empty(0), torch.empty_like(logp)

    def fake_backward(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        return gradients_like(hidden, weight, others[-4:-1])

    arguments = f"{_HEAD}, {_OPTIONS}, bool with_entropy, int[] chunks"
    run_forward = register(f"linear_logprob_{name}", arguments, 3, call_forward, fake_forward)
    upstream = "Tensor lse, Tensor entropy, Tensor d_logp, Tensor d_entropy"
    arguments = f"{_HEAD}, {_OPTIONS}, {upstream}, {_NEEDS}, int[] chunks"
    run_backward = register(f"linear_logprob_{name}_backward", arguments, 3, call_backward, fake_backward)

    class LinearLogprob(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any):
            logp, entropy, lse = run_forward(hidden, weight, bias, targets, *options)
            ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
            ctx.options = options
            return logp, entropy

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, d_logp: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
            temperature, softcap, _, chunks = ctx.options
            needs = ctx.needs_input_grad[:3]
            *head, lse, entropy = ctx.saved_tensors
            upstream = lse, entropy, d_logp.contiguous(), d_entropy.contiguous()
            gradients = run_backward(*head, temperature, softcap, *upstream, *needs, chunks)
            return *_needed(gradients, needs), None, None, None, None, None

    def run(head: HeadInputs, *, entropy: bool, chunk_mib: float | None) -> tuple[Tensor, Tensor]:
        return LinearLogprob.apply(*head, entropy, chunk_rows(head.hidden, head.weight, chunk_mib))

    return run


def grpo_loss(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the op from forward(logp [N], inputs, settings), whose `inputs.normalizer` is a tensor [] or None.

    It returns loss [], d loss / d logp [N], kl [], clip_low [], clip_high [], ratio_max [] in the accumulation dtype.
    """

    def run_forward(logp: Tensor, *values: Any) -> tuple[Tensor, ...]:
        return forward(logp, LossInputs(*values[:_INPUTS_COUNT]), GRPOSettings(*values[_INPUTS_COUNT:]))

    def fake(logp: Tensor, *others: Any) -> tuple[Tensor, ...]:
        wide = accumulation_dtype(logp.dtype)
        return logp.new_empty((), dtype=wide), logp.new_empty(logp.shape, dtype=wide), *_scalars(logp, 4)

    op = register(f"grpo_loss_{name}", f"Tensor logp, {_INPUTS}, {_SETTINGS}", 6, run_forward, fake)

    class GRPOLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logp: Tensor, *others: Any):
            loss, d_logp, *metrics = op(logp, *others)
            ctx.save_for_backward(d_logp)
            ctx.dtype, ctx.others = logp.dtype, len(others)
            ctx.mark_non_differentiable(*metrics)
            return loss, *metrics

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
            (d_logp,) = ctx.saved_tensors
            return (d_logp * d_loss).to(ctx.dtype), *([None] * ctx.others)

    def run(logp: Tensor, inputs: LossInputs, *, settings: GRPOSettings) -> tuple[Tensor, dict[str, Tensor]]:
        loss, *values = GRPOLoss.apply(logp, *_flat_inputs(inputs, logp), *vars(settings).values())
        metrics = dict(zip(_METRICS, values, strict=True))
        detached = logp.detach().to(accumulation_dtype(logp.dtype))
        return loss, metrics | {"logp": detached} | _counts(logp.shape[0], logp.shape[0], logp.device)

    return run


def linear_grpo_loss(name: str, forward: Callable[..., Any], chunk_rows: ChunkRows = chunk_rows) -> Callable[..., Any]:
    """Return the op from one function.

    forward(head, rows [n] | None, inputs, chunks, scale, needs, settings)
        -> loss [], d_hidden [n, D], d_weight [V, D], d_bias [V] (times `scale`, in the dtype of the input; [0] if not
        needed), logp [n], entropy [], kl [], clip_low [], clip_high [], ratio_max []

    `rows` are the n projected of the N rows, None: all; `head` has these only. `inputs` has log-probs [n], but
    `seq_ids` [N], since sequence lengths count all rows. `chunks` and `needs` are as in `linear_logprob`.
    """

    def run_forward(hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, rows: Any, *values: Any) -> Any:
        settings = GRPOSettings(*values[-_SETTINGS_COUNT:])
        softcap, chunks, scale, *needs = values[_INPUTS_COUNT:-_SETTINGS_COUNT]
        head = HeadInputs(hidden, weight, bias, targets, settings.temperature, softcap)
        return forward(head, rows, LossInputs(*values[:_INPUTS_COUNT]), chunks, scale, tuple(needs), settings)

    def fake(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
        needs = others[-_SETTINGS_COUNT - 3 : -_SETTINGS_COUNT]
        logp = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
        loss, *metrics = _scalars(hidden, 6)
        return loss, *gradients_like(hidden, weight, needs), logp, *metrics

    arguments = f"{_HEAD}, Tensor? rows, {_INPUTS}, float? softcap, int[] chunks, float scale, {_NEEDS}, {_SETTINGS}"
    op = register(f"linear_grpo_loss_{name}", arguments, 10, run_forward, fake)

    class LinearGRPOLoss(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, training: bool, accumulate: bool,
            scale: float, *others: Any,
        ):  # fmt: skip
            before, after = others[:-_SETTINGS_COUNT], others[-_SETTINGS_COUNT:]
            needs = [training and needed for needed in ctx.needs_input_grad[:3]]  # which is set under no_grad too
            out = op(hidden, weight, bias, *before, scale, *needs, *after)
            loss, d_hidden, d_weight, d_bias, *metrics = out
            ctx.save_for_backward(d_hidden, d_weight, d_bias)
            ctx.scale, ctx.others = scale, len(others) + 3
            ctx.leaf = weight if accumulate and needs[1] else None
            ctx.mark_non_differentiable(*metrics)
            return loss, *metrics

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
            gradients, factor = _needed(ctx.saved_tensors, ctx.needs_input_grad[:3]), d_loss / ctx.scale
            if ctx.leaf is not None:
                add_to_grad(ctx.leaf, ctx.saved_tensors[1], factor, keep=_graph_is_retained())
                gradients[1] = None
            return *_scaled(gradients, factor), *([None] * ctx.others)

    def run(
        head: HeadInputs,
        inputs: LossInputs,
        *,
        settings: GRPOSettings,
        chunk_mib: float | None,
        active_rows: Tensor | None,
        accumulate_grad: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, weight, bias, targets, _, softcap = head
        total = hidden.shape[0]
        if active_rows is not None:
            hidden, targets = hidden.index_select(0, active_rows), targets[active_rows]
            row_logps = {name: getattr(inputs, name) for name in ("old_logp", "ref_logp", "sampling_logp")}
            inputs = inputs._replace(**{n: None if x is None else x[active_rows] for n, x in row_logps.items()})
        count = hidden.shape[0]
        loss, logp, entropy, *values = LinearGRPOLoss.apply(
            hidden, weight, bias, torch.is_grad_enabled(), accumulate_grad, _gradient_scale(hidden), targets,
            active_rows, *_flat_inputs(inputs, hidden), softcap, chunk_rows(hidden, weight, chunk_mib),
            *vars(settings).values(),
        )  # fmt: skip
        if active_rows is not None:
            logp = logp.new_full((total,), torch.nan).index_copy_(0, active_rows, logp)
        metrics = dict(zip(_METRICS, values, strict=True)) | {"entropy": entropy, "logp": logp}
        return loss, metrics | _counts(total, count, hidden.device)

    return run


def _gradient_scale(hidden: Tensor) -> float:
    """Return the loss scale of float16: a power of two near N.

    The gradient of a mean over N rows would underflow in float16 before backward scales it."""
    return float(2 ** max(hidden.shape[0] - 1, 0).bit_length()) if hidden.dtype == torch.float16 else 1.0


def _scaled(gradients: Sequence[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """Return the gradients times `factor`, in place unless the graph is retained for another backward."""
    if torch.compiler.is_compiling() or _graph_is_retained():
        return [None if gradient is None else (gradient * factor).to(gradient.dtype) for gradient in gradients]
    return [None if gradient is None else gradient.mul_(factor) for gradient in gradients]


def _graph_is_retained() -> bool:
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def _counts(total: int, projected: int, device: torch.device) -> dict[str, Tensor]:
    def number(value: int) -> Tensor:
        return torch.full((), value, dtype=torch.int64, device=device)

    return {"tokens": number(total), "dropped_rows": number(total - projected)}


def _scalars(like: Tensor, count: int) -> list[Tensor]:
    return [like.new_empty((), dtype=accumulation_dtype(like.dtype)) for _ in range(count)]


def gradients_like(hidden: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialized d_hidden, d_weight, d_bias; [0] if not needed."""
    needs_hidden, needs_weight, needs_bias = needs
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        hidden.new_empty(weight.shape[:1] if needs_bias else (0,)),
    )


def _needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
