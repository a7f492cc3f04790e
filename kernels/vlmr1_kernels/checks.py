"""Argument checks of the ops: shapes, dtypes and devices always, values on request (that waits for the device)."""

from itertools import pairwise

import torch
from torch import Tensor

from vlmr1_kernels.inputs import DecodeTables, HeadInputs, LossInputs, SamplingOptions
from vlmr1_kernels.layout import PrefixLayout
from vlmr1_kernels.settings import GRPOSettings

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
ROW_LOGPS = ("old_logp", "ref_logp", "sampling_logp")


def head(inputs: HeadInputs, chunk_mib: float | None) -> None:
    hidden, weight, bias, targets, temperature, softcap = inputs
    _floating("hidden", hidden)
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [N, D], it is {_shape(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [V, {hidden.shape[1]}], it is {_shape(weight)}")
    if weight.dtype != torch.float32 or hidden.dtype.itemsize != 2:  # float32 masters of a half-precision head
        _same("weight", weight, "hidden", hidden)
    elif weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, hidden is on {hidden.device}")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [{weight.shape[0]}], it is {_shape(bias)}")
        _same("bias", bias, "hidden", hidden)
    _integer("targets", targets, hidden.shape[0], hidden)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, it is {temperature}")
    _above_zero("softcap", softcap)
    _above_zero("chunk_mib", chunk_mib)


def leaf(name: str, value: Tensor) -> None:
    if not value.is_leaf:
        raise ValueError(f"accumulate_grad needs a leaf, {name} is computed from other tensors")


def scores(inputs: LossInputs) -> tuple[str, Tensor]:
    """Return name and value [B] of the given one of advantages and rewards."""
    if (inputs.advantages is None) == (inputs.rewards is None):
        raise ValueError("give either advantages or rewards (with num_generations)")
    if inputs.advantages is not None:
        if inputs.num_generations is not None:
            raise ValueError("num_generations goes with rewards, not with advantages")
        return "advantages", inputs.advantages
    if inputs.num_generations is None:
        raise ValueError("rewards needs num_generations")
    assert inputs.rewards is not None
    rewards(inputs.rewards, inputs.num_generations, "group")
    return "rewards", inputs.rewards


def objective(rows: Tensor, inputs: LossInputs, settings: GRPOSettings) -> int:
    """Check the inputs of a loss over `rows` [N] or [N, ...] and return the number of sequences B."""
    name, values = scores(inputs)
    count = rows.shape[0]
    _integer("seq_ids", inputs.seq_ids, count, rows)
    row_vector(name, values, None, rows)
    for name in ROW_LOGPS:
        value = getattr(inputs, name)
        if value is not None:
            row_vector(name, value, count, rows)
            if value.requires_grad:
                raise ValueError(f"{name} requires a gradient, but is a constant of the objective: detach it")
    if settings.beta > 0 and inputs.ref_logp is None:
        raise ValueError("ref_logp is required: beta is above 0")
    if settings.tis_cap is not None and inputs.sampling_logp is None:
        raise ValueError("sampling_logp is required: tis_cap is set")
    normalizer = inputs.normalizer
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be one number, it is {_shape(normalizer)}")
    elif normalizer is not None and not normalizer > 0:
        raise ValueError(f"normalizer must be above 0, it is {normalizer}")
    return values.numel()


def active_rows(rows: Tensor, hidden: Tensor, settings: GRPOSettings) -> Tensor:
    """Return the rows as int64 indices [n] on the device of `hidden`."""
    for name in ("beta", "entropy_coef"):
        if getattr(settings, name) != 0:
            raise ValueError(f"active_rows is not supported with {name}: rows of advantage 0 have a loss too")
    if rows.dim() != 1:
        raise ValueError(f"active_rows must have one dimension, it is {_shape(rows)}")
    if rows.dtype == torch.bool:
        if rows.shape[0] != hidden.shape[0]:
            raise ValueError(f"active_rows must be bool [{hidden.shape[0]}], it is {_shape(rows)}")
        rows = rows.nonzero()[:, 0]
    elif rows.dtype not in INTEGERS:
        raise ValueError(f"active_rows must be bool or integer, it is {rows.dtype}")
    return rows.to(hidden.device, torch.int64)


def objective_values(inputs: LossInputs, active: Tensor | None = None) -> None:
    """Check ranges, order and NaN, and that rows other than `active` have advantage 0."""
    name, values = scores(inputs)
    seq_ids = inputs.seq_ids
    _range("seq_ids", seq_ids, values.numel(), "the number of sequences")
    if bool((seq_ids[1:] < seq_ids[:-1]).any()):
        raise ValueError("seq_ids is not sorted")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} contains NaN or infinity")
    if active is not None:
        _range("active_rows", active, seq_ids.numel(), "the number of rows")
        if bool((active[1:] <= active[:-1]).any()):
            raise ValueError("active_rows is not in increasing order")
        dropped = torch.ones_like(seq_ids, dtype=torch.bool)
        dropped[active] = False
        if inputs.num_generations is not None:  # the advantage is 0 where the group's rewards are equal
            groups = values.view(-1, inputs.num_generations)
            values = (groups != groups[:, :1]).any(dim=1).repeat_interleave(inputs.num_generations)
        if bool((values[seq_ids[dropped]] != 0).any()):
            raise ValueError("active_rows drops a row whose advantage is not 0")
    for name in ROW_LOGPS:
        value = getattr(inputs, name)
        if value is not None and bool(torch.isnan(value if active is None else value[active]).any()):
            raise ValueError(f"{name} contains NaN")


def token_ids(targets: Tensor, vocabulary: int) -> None:
    _range("targets", targets, vocabulary, "the vocabulary")


def rewards(values: Tensor, num_generations: int, scale: str) -> None:
    row_vector("rewards", values, None, None)
    if num_generations < 1 or values.numel() % num_generations:
        raise ValueError(f"num_generations is {num_generations}; the {values.numel()} rewards must be a multiple of it")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale is {scale!r}; known: group, batch, none")


def attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, softcap: float | None, window: int | None) -> None:
    _packed_attention(q, k, v)
    if q.shape[2] != layout.total_length:
        raise ValueError(f"q has {q.shape[2]} rows, the layout has {layout.total_length}")
    _above_zero("softcap", softcap)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None, it is {window}")


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int) -> None:
    _packed_attention(q, k, v)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be int32 [S + 1], it is {cu_seqlens.dtype} {_shape(cu_seqlens)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, q is on {q.device}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, it is {max_length}")
    # Neither a traced nor a fake tensor has values.
    if cu_seqlens.device.type == "cpu" and type(cu_seqlens) is Tensor and not torch.compiler.is_compiling():
        offsets = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(offsets)]
        if offsets[0] != 0 or offsets[-1] != q.shape[2] or min(lengths) < 0:
            raise ValueError(f"cu_seqlens must rise from 0 to {q.shape[2]}, it is {offsets}")
        if max(lengths) > max_length:
            raise ValueError(f"cu_seqlens has a sequence of {max(lengths)} rows, max_length is {max_length}")


def _packed_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    _floating("q", q)
    if q.dim() != 4 or q.shape[0] != 1:
        raise ValueError(f"q must be [1, H, L, Dh], it is {_shape(q)}")
    for name, value in (("k", k), ("v", v)):
        if value.dim() != 4 or value.shape[0] != 1 or value.shape[2:] != q.shape[2:]:
            raise ValueError(f"{name} must be [1, Hkv, {q.shape[2]}, {q.shape[3]}], it is {_shape(value)}")
        _same(name, value, "q", q)
    if k.shape != v.shape:
        raise ValueError(f"k is {_shape(k)}, v is {_shape(v)}: they must be equal")
    _grouped_heads(q.shape[1], k.shape[1])


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: DecodeTables,
    block: int,
    max_group: int | None,
    max_prefix: int | None,
) -> None:
    _floating("q", q)
    if q.dim() != 3:
        raise ValueError(f"q must be [B, H, Dh], it is {_shape(q)}")
    batch = len(q)
    _cache(q, keys, values)
    _grouped_heads(q.shape[1], keys.shape[0])
    if tables.group_offsets.dim() != 1 or tables.group_offsets.shape[0] < 2:
        raise ValueError(f"group_offsets must be [P + 1], P at least 1, it is {_shape(tables.group_offsets)}")
    if tables.suffix_blocks.dim() != 2:
        raise ValueError(f"suffix_blocks must be [{batch}, M], it is {_shape(tables.suffix_blocks)}")
    groups = tables.group_offsets.shape[0] - 1
    shapes = ([groups + 1], [groups], [groups], [batch, tables.suffix_blocks.shape[1]], [batch])
    for name, table, shape in zip(tables._fields, tables, shapes, strict=True):
        if table.dtype != torch.int32 or _shape(table) != shape:
            raise ValueError(f"{name} must be int32 {shape}, it is {table.dtype} {_shape(table)}")
        if table.device != q.device:
            raise ValueError(f"{name} is on {table.device}, q is on {q.device}")
    for name, bound in (("block", block), ("max_group", max_group), ("max_prefix", max_prefix)):
        if bound is not None and bound < 1:
            raise ValueError(f"{name} must be at least 1, it is {bound}")
    if torch.is_grad_enabled() and (q.requires_grad or keys.requires_grad or values.requires_grad):
        raise ValueError("shared_prefix_decode has no gradient, but q, keys or values require one: use torch.no_grad()")


def sampling(
    logits: Tensor, draws: Tensor, suppressed_ids: Tensor | None, seen: Tensor | None, options: SamplingOptions
) -> None:
    _floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be [S, V], V at least 1, it is {_shape(logits)}")
    tensors = {"draws": (draws, torch.float64, [logits.shape[0]]), "seen": (seen, torch.bool, _shape(logits))}
    if suppressed_ids is not None:
        tensors["suppressed_ids"] = (suppressed_ids, torch.int64, [suppressed_ids.numel()])
    for name, (value, dtype, shape) in tensors.items():
        if value is None:
            continue
        if value.dtype != dtype or _shape(value) != shape:
            raise ValueError(f"{name} must be {dtype} {shape}, it is {value.dtype} {_shape(value)}")
        if value.device != logits.device:
            raise ValueError(f"{name} is on {value.device}, logits is on {logits.device}")
    if options.repetition_penalty != 1 and seen is None:
        raise ValueError("seen is required: repetition_penalty is set")
    bounds = {
        "temperature": (options.temperature > 0, "above 0"),
        "top_k": (options.top_k >= 0, "at least 0"),
        "top_p": (0 < options.top_p <= 1, "above 0, at most 1"),
        "min_p": (0 <= options.min_p <= 1, "between 0 and 1"),
        "repetition_penalty": (options.repetition_penalty > 0, "above 0"),
    }
    for name, (holds, wanted) in bounds.items():
        if not holds:
            raise ValueError(f"{name} must be {wanted}, it is {getattr(options, name)}")
    if torch.is_grad_enabled() and logits.requires_grad:
        raise ValueError("sample_tokens has no gradient, but logits requires one: use torch.no_grad()")


def _cache(q: Tensor, keys: Tensor, values: Tensor) -> None:
    head_dim = q.shape[-1]
    for name, value in (("keys", keys), ("values", values)):
        if value.dim() != 3 or value.shape[2] != head_dim or value.stride(2) != 1:
            raise ValueError(
                f"{name} must be [Hkv, R, {head_dim}] with a contiguous last dimension, it is {_shape(value)} "
                f"with strides {list(value.stride())}"
            )
        _same(name, value, "q", q)
    if keys.shape != values.shape:
        raise ValueError(f"keys is {_shape(keys)}, values is {_shape(values)}: they must be equal")


def rope(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, rows: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None,
) -> None:  # fmt: skip
    _floating("q", q)
    if q.dim() != 3 or q.stride(2) != 1:
        raise ValueError(f"q must be [S, H, Dh] with a contiguous last dimension, it is {_shape(q)}")
    tokens, heads, head_dim = q.shape
    _cache(q, keys, values)
    _grouped_heads(heads, keys.shape[0])
    for name, value in (("k", k), ("v", v)):
        if _shape(value) != [tokens, keys.shape[0], head_dim] or value.stride(2) != 1:
            raise ValueError(
                f"{name} must be [{tokens}, {keys.shape[0]}, {head_dim}] with a contiguous last dimension, "
                f"it is {_shape(value)}"
            )
        _same(name, value, "q", q)
    if cos.dim() != 2 or len(cos) != tokens or cos.shape[1] % 2 or not 0 < cos.shape[1] <= head_dim:
        raise ValueError(f"cos must be [{tokens}, Dr], Dr even and at most {head_dim}, it is {_shape(cos)}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin is {_shape(sin)}, cos is {_shape(cos)}: they must be equal")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm must both be given, or neither")
    for name, value in (("cos", cos), ("sin", sin), ("q_norm", q_norm), ("k_norm", k_norm)):
        if value is None:
            continue
        if value.dtype not in (torch.float32, q.dtype) or value.device != q.device:
            raise ValueError(
                f"{name} must be float32 or {q.dtype} on {q.device}, it is {value.dtype} on {value.device}"
            )
        if name.endswith("norm") and _shape(value) != [head_dim]:
            raise ValueError(f"{name} must be [{head_dim}], it is {_shape(value)}")
    if rows.dtype != torch.int64 or _shape(rows) != [tokens] or rows.device != q.device:
        raise ValueError(
            f"rows must be int64 [{tokens}] on {q.device}, it is {rows.dtype} {_shape(rows)} on {rows.device}"
        )
    given = (q, k, v, cos, sin, keys, values, q_norm, k_norm)
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given):
        raise ValueError("rope_kv_write has no gradient, but an argument requires one: use torch.no_grad()")


def row_vector(name: str, value: Tensor, count: int | None, like: Tensor | None) -> None:
    if value.dim() != 1 or (count is not None and value.shape[0] != count):
        raise ValueError(f"{name} must be [{'N' if count is None else count}], it is {_shape(value)}")
    _floating(name, value)
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, the rows are on {like.device}")


def _grouped_heads(heads: int, kv_heads: int) -> None:
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key and value heads")


def _above_zero(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be above 0, or None, it is {value}")


def _floating(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, it is {value.dtype}")


def _integer(name: str, value: Tensor, count: int, like: Tensor) -> None:
    if value.dtype not in INTEGERS:
        raise ValueError(f"{name} must be int64 or int32, it is {value.dtype}")
    if value.shape != (count,):
        raise ValueError(f"{name} must be [{count}], it is {_shape(value)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, not on {like.device}")


def _same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise ValueError(f"{name} is {value.dtype}, {other_name} is {other.dtype}: they must be equal")
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, {other_name} is on {other.device}")


def _range(name: str, value: Tensor, limit: int, what: str) -> None:
    if value.numel() and (int(value.min()) < 0 or int(value.max()) >= limit):
        raise ValueError(f"{name} must be in 0..{limit - 1} ({what}), it spans {int(value.min())}..{int(value.max())}")


def _shape(value: Tensor) -> list[int]:
    return list(value.shape)
