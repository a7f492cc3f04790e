"""Fused operators in place of the forwards of single layers, bound to instances for the duration of a pass.

A layer is bound where its class computes what the operator computes: a small instance with the class's own forward is
compared with the definition here, bit by bit. No class and no module of a library is changed, and hooks of a layer run
as before. Where no operator fits, or dtypes differ at a call, the stock forward runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import distributions
from importlib.util import find_spec
from inspect import unwrap
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from vlmr1.errors import SettingError

logger = logging.getLogger(__name__)
LIGER = ("RMSNorm", "FusedAddRMSNorm", "LayerNorm", "SiLUMul", "FusedGateUpSiLUMul", "Rope")  # as in `Operators`
ROPE = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision")  # functions that forwards of attention call
DECODER_NORMS = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}
# Norms whose output only linear layers of another module read; those of queries and keys are rotated, and converted.
READ_BY = DECODER_NORMS | {"norm1": "attn", "norm2": "mlp"}
HEAD_NORMS = ("q_norm", "k_norm")
READERS = ("q_proj", "k_proj", "v_proj", "qkv", "gate_proj", "up_proj", "gate_up_proj")


class Operators(NamedTuple):
    """The operators, differentiable; rope and the backward of swiglu may overwrite their inputs."""

    rms_norm: Callable[..., Tensor]  # x [.., D], weight [D], eps, whether backward may overwrite its input
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]  # residual, x, weight, eps -> norm of the sum, sum
    layer_norm: Callable[..., Tensor]  # x, weight, bias, eps
    swiglu: Callable[..., Tensor]  # gate, up -> silu(gate) * up
    swiglu_packed: Callable[..., Tensor]  # [.., gate and up]
    rope: Callable[..., tuple[Tensor, Tensor]]  # q [b, H, l, Dh], k, cos [b or 1, l, Dh], sin


@cache
def liger_operators() -> Operators:
    """Return the functions of the liger-kernel package; ImportError or AttributeError where one is missing."""
    from liger_kernel import ops

    norm, add_norm, layer_norm, swiglu, packed, rope = (getattr(ops, f"Liger{name}Function").apply for name in LIGER)

    def rms_norm(x: Tensor, weight: Tensor, eps: float, in_place: bool) -> Tensor:
        return norm(x, weight, eps, 0.0, "llama", in_place)

    def swiglu_packed(both: Tensor) -> Tensor:
        """Flatten to rows: Liger's gradient has two dimensions, whatever its input has."""
        return packed(both.flatten(0, -2)).view(*both.shape[:-1], -1)

    return Operators(rms_norm, add_norm, layer_norm, swiglu, swiglu_packed, rope)


def operators_for(setting: str, device: str) -> Operators | None:
    """The operators of `fused_layers` on a device; None for the stock forwards, with `auto` also where liger-kernel
    cannot be used."""
    if setting == "torch" or (setting == "auto" and (device != "cuda" or find_spec("liger_kernel") is None)):
        return None
    try:
        return liger_operators()
    except (ImportError, AttributeError) as error:
        version = next((each.version for each in distributions(name="liger-kernel")), "of an unknown version")
        reason = f"liger-kernel {version} cannot be used ({error})"
        if setting == "auto":
            logger.warning("fused_layers: stock layers, for %s", reason)
            return None
        raise SettingError(f"fused_layers={setting}: {reason}; install vlmr1[gpu], or use torch") from error


@contextmanager
def fused_layers(model: nn.Module, operators: Operators | None) -> Iterator[None]:
    """Bind the operators to the model's layers within the block; a backward pass that recomputes layers must run
    inside. A module that has a forward of its own, as in an enclosing block, keeps it."""
    bound = [] if operators is None else list(_forwards(model, operators))
    for module, forward in bound:
        module.forward = partial(_rewrapped(type(module).forward, forward), module)
    try:
        yield
    finally:
        for module, _ in bound:
            del module.forward


def _forwards(model: nn.Module, operators: Operators) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """The modules to bind, and functions of a module and its inputs."""
    narrow = {id(norm) for module in model.modules() for norm in _narrow_norms(module)}
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if is_rms_norm(module):
            yield module, partial(_rms_norm, operators, id(module) in narrow)
        elif type(module) is nn.LayerNorm and module.bias is not None and len(module.normalized_shape) == 1:
            yield module, partial(_layer_norm, operators)
        elif (swiglu := swiglu_of(module)) is not None:
            yield module, partial(swiglu, operators)
        elif is_decoder_layer(module) and not any("forward" in vars(module.get_submodule(n)) for n in DECODER_NORMS):
            yield module, _decoder_layer
        elif (name := rope_of(type(module))) is not None:
            yield module, _with_rope(type(module), name, operators)


def _rewrapped(forward: Any, inner: Callable[..., Any]) -> Callable[..., Any]:
    """`inner` in the wrappers that the class's forward has around its own function, as checkpointing is one."""
    within = getattr(forward, "__wrapped__", None)
    if within is None:
        return inner
    replaced = CellType(_rewrapped(within, inner))
    cells = tuple(replaced if cell.cell_contents is within else cell for cell in forward.__closure__ or ())
    return _function(forward, forward.__globals__, cells)


def _function(like: Any, names: dict[str, Any], closure: Any) -> FunctionType:
    """Return a function of the same code with other global names and another closure."""
    made = FunctionType(like.__code__, names, like.__name__, like.__defaults__, closure)
    made.__kwdefaults__ = like.__kwdefaults__
    return made


def _stock(module: nn.Module) -> Callable[..., Any]:
    return partial(type(module).forward, module)


# Small instances


def _probed(check: Callable[..., bool]) -> Callable[..., bool]:
    """The check, once for its arguments, with real numbers on the CPU whatever encloses the pass. A class that needs
    more than its small instance has, or takes other arguments, computes something else."""

    @cache
    def checked(*args: Any) -> bool:
        try:
            with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
                return check(*args)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return False

    return checked


def _numbers(*shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.linspace(-1.3, 1.7, count, device="cpu", dtype=torch.float32).sin().reshape(shape)


def _probe(kind: type[nn.Module], attributes: dict[str, Any], *, modules: Any = (), parameters: Any = ()) -> Any:
    """An instance of the class that has these parts; its constructor does not run."""
    made: Any = object.__new__(kind)
    nn.Module.__init__(made)
    vars(made).update(attributes)
    for name, module in dict(modules).items():
        setattr(made, name, module)
    for name, parameter in dict(parameters).items():
        setattr(made, name, parameter)
    return made


# Norms


def _rms_norm(operators: Operators, narrow: bool, module: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    """The norm of x, or the norm of residual + x and the sum. A narrow norm's output has the dtype of autocast: its
    readers would convert it, each of them anew."""
    weight, eps = module.weight, getattr(module, _eps_name(module))
    if residual is not None:
        if residual.dtype == weight.dtype and x.dtype.itemsize <= residual.dtype.itemsize:
            y, total = operators.add_rms_norm(residual, x, weight, eps)
            return y.to(_autocast_dtype(x) or y.dtype) if narrow else y, total
        total = residual + x
        return _rms_norm(operators, narrow, module, total), total
    dtype = _autocast_dtype(x) if narrow else None
    if x.dtype.itemsize > weight.dtype.itemsize:
        y = _stock(module)(x)
    else:  # the stock norm of a half-precision x has the dtype of a float32 weight
        y = operators.rms_norm(x if x.dtype == dtype else x.to(weight.dtype), weight, eps, narrow)
    return y.to(dtype or y.dtype)


def _layer_norm(operators: Operators, module: Any, x: Tensor) -> Tensor:
    """Torch's norm is one kernel too, but autocast runs it in float32, with conversions around it."""
    if x.dtype != module.weight.dtype or x.dtype == torch.float32 or _autocast_dtype(x) is None:
        return _stock(module)(x)
    return operators.layer_norm(x, module.weight, module.bias, module.eps)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on the meta device
    return torch.get_autocast_dtype(kind) if enabled else None


def _eps_name(module: nn.Module) -> str:
    return "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"


def is_rms_norm(module: nn.Module) -> bool:
    """Whether this is an RMSNorm whose weight has no offset and whose input is rounded before the product."""
    if "RMSNorm" not in type(module).__name__ or [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    return hasattr(module, _eps_name(module)) and _computes_rms_norm(type(module), _eps_name(module))


@_probed
def _computes_rms_norm(kind: type[nn.Module], eps: str) -> bool:
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = _numbers(8).to(dtype), _numbers(2, 8).to(dtype)
        wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 0.1)
        probe = _probe(kind, {eps: 0.1}, parameters={"weight": nn.Parameter(weight)})
        if not torch.equal(kind.forward(probe, x), weight * wide.to(dtype)):
            return False
    return True


def _narrow_norms(module: nn.Module) -> Iterator[nn.Module]:
    """Children whose output only plain linear layers read, or the attention behind a rotation: both convert it to the
    dtype of autocast."""
    children = dict(module.named_children())
    if _called_rope(type(module)):
        yield from (children[norm] for norm in HEAD_NORMS if norm in children)
    for norm, name in READ_BY.items():
        reader = children.get(name)
        if norm in children and reader is not None:
            linear = [child for child_name, child in reader.named_children() if child_name in READERS]
            kinds = {type(getattr(child, "base_layer", child)) for child in linear}  # within an adapter
            if kinds == {nn.Linear} and (swiglu_of(reader) or _called_rope(type(reader))):
                yield children[norm]


# MLPs


def swiglu_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """The forward of a SwiGLU MLP with two projections or a packed one; None for other modules."""
    names = {name for name, _ in module.named_children()}
    activation = names & {"act_fn", "activation_fn"}
    if len(activation) == 1:
        for projections, forward in _SWIGLU.items():
            name = next(iter(activation))
            if names - activation == set(projections):
                same = _computes_swiglu(type(module), name, type(getattr(module, name)), projections)
                return forward if same else None
    return None


def _swiglu(operators: Operators, module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if gate.dtype != up.dtype:
        return _stock(module)(x)
    return module.down_proj(operators.swiglu(gate, up))


def _swiglu_packed(operators: Operators, module: Any, x: Tensor) -> Tensor:
    return module.down_proj(operators.swiglu_packed(module.gate_up_proj(x)))


_SWIGLU: dict[tuple[str, ...], Callable[..., Tensor]] = {
    ("gate_proj", "up_proj", "down_proj"): _swiglu,
    ("gate_up_proj", "down_proj"): _swiglu_packed,
}


@_probed
def _computes_swiglu(
    kind: type[nn.Module], name: str, activation: type[nn.Module], projections: tuple[str, ...]
) -> bool:
    widths = {"down_proj": (3, 4), "gate_up_proj": (4, 6)}
    made = {each: nn.Linear(*widths.get(each, (4, 3)), device="cpu") for each in projections}
    for index, linear in enumerate(made.values()):
        linear.weight.copy_(_numbers(*linear.weight.shape) + index)
    x = _numbers(2, 4)
    inner = [made[each](x) for each in projections[:-1]]
    gate, up = inner if len(inner) == 2 else inner[0].chunk(2, -1)
    expected = made["down_proj"](nn.functional.silu(gate) * up)
    probe = _probe(kind, {}, modules={**made, name: activation()})
    return torch.equal(kind.forward(probe, x), expected)


# Residual connections


def _decoder_layer(layer: Any, hidden_states: Tensor, **options: Any) -> Tensor:
    """The layer with its first addition in the norm behind it."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **options)
    normed, hidden_states = layer.post_attention_layernorm(attended, hidden_states)
    return hidden_states + layer.mlp(normed)


def is_decoder_layer(module: nn.Module) -> bool:
    """Whether this is a layer of attention and MLP with a norm before each, and nothing else."""
    children = dict(module.named_children())
    if children.keys() != {*DECODER_NORMS, *DECODER_NORMS.values()}:
        return False
    return all(is_rms_norm(children[name]) for name in DECODER_NORMS) and _computes_layer(type(module))


@_probed
def _computes_layer(kind: type[nn.Module]) -> bool:
    parts: dict[str, nn.Module] = {name: _Affine(index + 2) for index, name in enumerate(DECODER_NORMS)}
    parts |= {"self_attn": _Attention(), "mlp": _Affine(5)}
    probe = _probe(kind, {}, modules=parts)
    x = _numbers(1, 2, 4)
    after = x + parts["self_attn"](parts["input_layernorm"](x), position_embeddings=_numbers(4))[0]
    expected = after + parts["mlp"](parts["post_attention_layernorm"](after))
    out = kind.forward(probe, x, position_embeddings=_numbers(4))
    return isinstance(out, Tensor) and torch.equal(out, expected)


class _Affine(nn.Module):
    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + 1


class _Attention(nn.Module):
    def forward(self, hidden_states: Tensor, position_embeddings: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states * position_embeddings, None


# Rotary embeddings


def rope_of(kind: type[nn.Module]) -> str | None:
    """The name by which a class's forward calls a function that rotates the halves of a head; None for others."""
    name = _called_rope(kind)
    forward: Any = unwrap(kind.forward)
    return name if name is not None and _computes_rope(forward.__globals__[name], name) else None


def _called_rope(kind: type[nn.Module]) -> str | None:
    forward = unwrap(kind.forward)
    names = forward.__code__.co_names if isinstance(forward, FunctionType) else ()
    return next((name for name in ROPE if name in names), None)


def _with_rope(kind: type[nn.Module], name: str, operators: Operators) -> FunctionType:
    """The class's forward, which finds another function under this global name."""
    forward: Any = unwrap(kind.forward)
    stock = forward.__globals__[name]

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if options or cos.dtype.itemsize < q.dtype.itemsize or q.dtype != k.dtype:
            return stock(q, k, cos, sin, **options)
        if name == ROPE[0]:
            return operators.rope(q, k, cos, sin)
        q, k = operators.rope(*(each.transpose(0, 1)[None] for each in (q, k)), cos[None], sin[None])
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    return _function(forward, {**forward.__globals__, name: rotate}, forward.__closure__)


@_probed
def _computes_rope(function: Callable[..., tuple[Tensor, Tensor]], name: str) -> bool:
    angles = _numbers(1, 3, 4)
    cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
    q, k = _numbers(1, 2, 3, 8), _numbers(1, 1, 3, 8) + 1

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    expected = rotated(q), rotated(k)
    if name == ROPE[0]:
        found = function(q, k, cos, sin)
    else:
        given = (each[0].transpose(0, 1) for each in (q, k))
        found = tuple(each.transpose(0, 1)[None] for each in function(*given, cos[0], sin[0]))
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
