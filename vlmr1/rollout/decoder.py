"""One decode step of the decoder, computed from its weights without the forwards of its layers.

On CUDA a layer takes about a dozen launches: the residual add and the norm are one kernel (Liger), queries, keys and
values one product, RoPE and the write to the KV cache one kernel, SwiGLU one kernel (Liger). On a CPU the arithmetic is
that of the stock forward, operation by operation, and its bits are equal. The prefill is the stock forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from vlmr1.distributed.sharded import is_partitioned
from vlmr1.models.family import ModelFamily
from vlmr1.models.fused_layers import operators_for
from vlmr1.rollout.decoder_weights import Adapted, Projection, StepWeights, adapters_of
from vlmr1.rollout.sequences import Batch
from vlmr1_kernels import rope_kv_write

# Modules of a decoder, of a layer, of its attention and its MLP: those of every family, and those of some.
DECODER = ({"embed_tokens", "layers", "norm", "rotary_emb"}, set())
LAYER = (
    {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    {"post_self_attn_layernorm", "post_mlp_layernorm"},
)
ATTENTION = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"})
MLP = ({"down_proj"}, {"gate_proj", "up_proj", "gate_up_proj", "act_fn", "activation_fn"})
# Fields that change the arithmetic where they are set.
UNKNOWN_FIELDS = ("sliding_window", "attn_logit_softcapping", "residual_multiplier", "embedding_multiplier")
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@dataclass(frozen=True)
class Norm:
    """An RMS norm over the last dimension."""

    weight: Tensor
    eps: float


class TorchLayers:
    """Norms and SwiGLU in plain torch."""

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        if x.dtype == torch.float32 or x.is_cuda:
            return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)  # on a CPU the same operations as below
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
        return norm.weight * wide.to(x.dtype)

    def add_norm(self, x: Tensor, branch: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return (norm(x + branch), x + branch), both in the dtype of x."""
        x = x + branch
        return self.norm(x, norm), x

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate).mul_(up)


class LigerLayers(TorchLayers):
    """Norms and SwiGLU in one launch each, by Liger's kernels."""

    def __init__(self) -> None:
        from liger_kernel.ops import fused_add_rms_norm, rms_norm, swiglu

        self._norm, self._add_norm = rms_norm.rms_norm_forward, fused_add_rms_norm.fused_add_rms_norm_forward
        self._swiglu = swiglu.swiglu_forward

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self._norm(x, norm.weight, norm.eps, 0.0, "llama", None)[0]

    def add_norm(self, x: Tensor, branch: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        normed, x, *_ = self._add_norm(x, branch, norm.weight, norm.eps, 0.0, "llama")
        return normed, x

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._swiglu(gate.contiguous(), up.contiguous())[2]


@dataclass(frozen=True)
class Layer:
    """Weights of a decoder layer."""

    index: int
    input_norm: Norm
    mlp_norm: Norm
    attention_out_norm: Norm | None
    mlp_out_norm: Norm | None
    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    head_norms: dict[str, Any]  # arguments of `rope_kv_write`
    scale: float


class DecodeForward:
    """Decode steps of one engine's model. Made once an engine; `refresh` before each generation.

    Weights that are not in the compute dtype are copied, as autocast would do. The copies keep their addresses until
    `release`. Weights in the compute dtype are read in place. On CUDA only those of
    keys and values are then copied, so that one product computes both."""

    def __init__(
        self, model: Any, family: ModelFamily, dtype: torch.dtype | None = None, *,
        merged_gemms: bool | None = None, layers: TorchLayers | None = None,
    ):  # fmt: skip
        """`dtype`: of autocast, None: off. `merged_gemms`: compute projections of one input together; None: except on a
        CPU, where separate products keep the bits of the stock forward. `layers`: None: Liger's on CUDA, if there."""
        self.decoder = attrgetter(family.decoder_path)(model)
        self.device = self.decoder.embed_tokens.weight.device
        self.autocast = dtype
        self.dtype = dtype or self.decoder.embed_tokens.weight.dtype
        self.merged_gemms = self.device.type != "cpu" if merged_gemms is None else merged_gemms
        liger = layers is None and operators_for("auto", self.device.type) is not None
        self.functions = layers or (LigerLayers() if liger else TorchLayers())
        first = self.decoder.layers[0].self_attn
        self.head_dim: int = first.head_dim
        self.interleaved = bool(pairs_are_adjacent(type(first).__module__, self.head_dim))
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.like = torch.empty(0, dtype=wide, device=self.device)  # of the angles
        self.weights = StepWeights(self.dtype)
        self.layers: list[Layer] = []
        self.refresh()

    @staticmethod
    def supports(model: Any, family: ModelFamily, dtype: torch.dtype | None = None) -> str | None:
        """Return why the stock forward has to run, or None."""
        decoder = attrgetter(family.decoder_path)(model)
        if is_partitioned(model) or any(isinstance(module, FSDPModule) for module in model.modules()):
            return "the weights are sharded"
        return _structure_reason(decoder) or _weights_reason(decoder, dtype)

    @property
    def fixed_addresses(self) -> bool:
        """Whether the weights that a step reads have been where they are since this object was made."""
        return not self.weights.moved

    @property
    def addresses(self) -> tuple[int, ...]:
        """Addresses of the weights that a step reads."""
        return self.weights.addresses

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(each.nbytes for each in self.weights.buffers.values())

    @property
    def copies(self) -> bool:
        """Whether the weights of products are copies: autocast then needs none of its own."""
        return self.weights.copies_all

    def refresh(self) -> None:
        """Read the weights anew: adapters may have been merged, and copied weights changed."""
        with torch.no_grad():
            self.weights.begin()
            self.layers = [self._layer(index, layer) for index, layer in enumerate(self.decoder.layers)]
            self.embedding = self.weights.in_place(self.decoder.embed_tokens.weight)
            self.norm = self._norm(self.decoder.norm)
            self.weights.end()

    def release(self, *, keep_copies: bool = False) -> None:
        """Hold no weight until the next `refresh`, but for copies that are kept: captured graphs read them."""
        self.layers = []
        self.weights.release(keep_copies)

    def hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states [S, D] of a step; write keys and values of its tokens to the cache."""
        with torch.autocast(self.device.type, enabled=False), torch.cuda.device_of(self.embedding):
            return self._hidden(batch)

    def _hidden(self, batch: Batch) -> Tensor:
        functions, attention = self.functions, batch.attention
        assert attention.step is not None
        rows = attention.step[0]
        positions = batch.positions.expand(batch.position_dims, -1)[..., None]  # [K, S, 1]
        angles = self.decoder.rotary_emb(self.like, positions if len(positions) > 1 else positions[0])
        cos, sin = (each[:, 0] for each in angles)  # [S, Dr]
        x = F.embedding(batch.tokens, self.embedding)  # [S, D]
        branch: Tensor | None = None
        for layer in self.layers:
            normed, x = self._add_norm(x, branch, layer.input_norm)
            q, k, v = (each.unflatten(1, (-1, self.head_dim)) for each in layer.qkv(normed.to(self.dtype)))
            keys, values = attention.cache.layer(layer.index)
            q = rope_kv_write(q, k, v, cos, sin, keys, values, rows, interleaved=self.interleaved, **layer.head_norms)
            branch = layer.out(attention.read(layer.index, q, layer.scale).flatten(1))[0]
            if layer.attention_out_norm is not None:
                branch = functions.norm(branch, layer.attention_out_norm)
            normed, x = self._add_norm(x, branch, layer.mlp_norm)
            branch = layer.down(functions.swiglu(*layer.gate_up(normed.to(self.dtype))))[0]
            if layer.mlp_out_norm is not None:
                branch = functions.norm(branch, layer.mlp_out_norm)
        return self._add_norm(x, branch, self.norm)[0]

    def _add_norm(self, x: Tensor, branch: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        return (self.functions.norm(x, norm), x) if branch is None else self.functions.add_norm(x, branch, norm)

    def _layer(self, index: int, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp

        def project(*names: str, **options: Any) -> Projection:
            modules = {name: getattr(mlp if hasattr(mlp, name) else attention, name) for name in names}
            return Projection(self.weights, f"layers.{index}", modules, merged=self.merged_gemms, **options)

        norms: dict[str, Any] = {}
        if hasattr(attention, "q_norm"):
            norms = {name: self.weights.in_place(getattr(attention, name).weight) for name in ("q_norm", "k_norm")}
            norms["eps"] = attention.q_norm.variance_epsilon
        fused = hasattr(mlp, "gate_up_proj")
        return Layer(
            index,
            input_norm=self._norm(layer.input_layernorm),
            mlp_norm=self._norm(layer.post_attention_layernorm),
            attention_out_norm=self._norm(getattr(layer, "post_self_attn_layernorm", None)),
            mlp_out_norm=self._norm(getattr(layer, "post_mlp_layernorm", None)),
            qkv=project("q_proj", "k_proj", "v_proj"),
            out=project("o_proj"),
            gate_up=project("gate_up_proj", halves=True) if fused else project("gate_proj", "up_proj", stacked=True),
            down=project("down_proj"),
            head_norms=norms,
            scale=attention.scaling,
        )

    def _norm(self, module: Any) -> Any:
        return None if module is None else Norm(self.weights.in_place(module.weight), module.variance_epsilon)


def _structure_reason(decoder: nn.Module) -> str | None:
    """Return what of a decoder is not known here, or None."""
    layers: Any = getattr(decoder, "layers", ())
    if not len(layers):
        return "the decoder has no layers"
    parts: list[tuple[str, Any, tuple[set[str], set[str]]]] = [("decoder", decoder, DECODER)]
    for layer in layers:
        parts += [("layer", layer, LAYER), ("attention", getattr(layer, "self_attn", None), ATTENTION)]
        parts += [("MLP", getattr(layer, "mlp", None), MLP)]
    for name, module, (needed, some) in parts:
        found = {} if module is None else dict(module.named_children())
        if not needed <= found.keys() <= needed | some or not _alternatives(found):
            return f"the {name} has other modules than is known: {', '.join(found)}"
        for key, each in found.items():
            if "norm" in key and not _is_rms_norm(each):
                return f"{key} is {type(each).__name__}"
        field = next((each for each in UNKNOWN_FIELDS if getattr(module, each, None) is not None), None)
        if field is not None:
            return f"the {name} has {field}"
    if any(getattr(module, hooks) for module in layers.modules() for hooks in HOOKS):
        return "modules of its layers have hooks, which would not run"
    attention, probe = layers[0].self_attn, torch.linspace(-3, 3, 7)
    for act in (getattr(layer.mlp, "act_fn", None) or layer.mlp.activation_fn for layer in layers):
        if not torch.equal(act(probe), F.silu(probe)):
            return f"its activation is {type(act).__name__}"
    if pairs_are_adjacent(type(attention).__module__, attention.head_dim) is None:
        return "its RoPE is not known"
    return None


def _alternatives(found: dict[str, Any]) -> bool:
    """Whether modules that belong together are all there."""
    pairs = (("q_norm", "k_norm"), ("post_self_attn_layernorm", "post_mlp_layernorm"), ("gate_proj", "up_proj"))
    if any((one in found) != (other in found) for one, other in pairs):
        return False
    return "down_proj" not in found or (("gate_proj" in found) != ("gate_up_proj" in found))


def _is_rms_norm(module: Any) -> bool:
    known = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    return known and [name for name, _ in module.named_parameters()] == ["weight"] and module.weight.dim() == 1


def _weights_reason(decoder: Any, dtype: torch.dtype | None) -> str | None:
    """Return which weights cannot be read, or None."""
    linear: list[Adapted] = []
    for layer in decoder.layers:
        for module in (*layer.self_attn.children(), *layer.mlp.children()):
            if any(True for _ in module.parameters()) and not _is_rms_norm(module):
                adapted, reason = adapters_of(module)
                if reason is not None:
                    return reason
                linear.append(adapted)
    head_dim = decoder.layers[0].self_attn.head_dim
    norms = [each for each in decoder.modules() if _is_rms_norm(each)]
    if any(getattr(layer.self_attn, name).weight.shape != (head_dim,)
           for layer in decoder.layers for name in ("q_norm", "k_norm") if hasattr(layer.self_attn, name)):  # fmt: skip
        return "norms of queries and keys are not over a head"
    tensors = [tensor for each in linear for tensor in each.tensors()]
    embedding = decoder.embed_tokens.weight
    if len({tensor.device for tensor in (embedding, *tensors, *(norm.weight for norm in norms))}) > 1:
        return "the weights are on several devices"
    if type(decoder.embed_tokens) is not nn.Embedding:
        return f"the embedding is {type(decoder.embed_tokens).__name__}"
    if dtype is None and any(tensor.dtype != embedding.dtype for tensor in tensors):
        return "weights and adapters have several dtypes, without autocast"
    return None


@lru_cache(maxsize=16)
def pairs_are_adjacent(module: str, head_dim: int) -> bool | None:
    """Return whether the RoPE of a model's code rotates pairs of adjacent columns, or of columns half a width apart;
    None for any other. Found by calling it on random numbers."""
    apply: Callable[..., Any] | None = getattr(sys.modules[module], "apply_rotary_pos_emb", None)
    if apply is None or not apply.__module__.startswith("transformers."):
        return None
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = torch.randn(4, 1, 1, 3, head_dim, generator=generator, dtype=torch.float64)
    rotated, _ = apply(q, k, cos[0], sin[0])
    rows, cache = torch.arange(3), torch.empty(1, 3, head_dim, dtype=torch.float64)
    heads = [each[0].transpose(0, 1) for each in (q, k, k)]  # [3, 1, Dh]
    for interleaved in (False, True):
        arguments: Any = (*heads, cos[0, 0], sin[0, 0], cache, cache.clone(), rows)
        found = rope_kv_write(*arguments, interleaved=interleaved, impl="reference")
        if torch.allclose(found, rotated[0].transpose(0, 1)):
            return interleaved
    return None
