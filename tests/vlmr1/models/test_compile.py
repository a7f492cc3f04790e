"""A decoder layer under torch.compile and on fake tensors: its attention is one operator of the graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from vlmr1.models.attention import PackedAttention, shared_attention
from vlmr1_kernels import PrefixLayout

LAYOUTS = [
    PrefixLayout((5, 3), ((4, 2), (3,))),
    PrefixLayout((7,), ((2, 6, 5),)),
    PrefixLayout((2, 9, 4), ((), (8,), (1,))),
]
WIDTH = 32


@pytest.fixture
def decoder() -> Iterator[Any]:
    torch._dynamo.reset()
    yield make_decoder()
    torch._dynamo.reset()


def make_decoder() -> Any:
    config = Qwen2_5_VLTextConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    )  # fmt: skip
    return Qwen2_5_VLTextModel(config)


def run(layer: Any, decoder: Any, layout: PrefixLayout, hidden: Tensor) -> list[Tensor]:
    """Output of a layer, and the gradients of its input and of a weight."""
    hidden = hidden.requires_grad_()
    positions = torch.arange(hidden.shape[1]).expand(3, 1, -1)
    rotations = decoder.rotary_emb(hidden, positions)
    with shared_attention(decoder):
        out = layer(hidden, position_embeddings=rotations, shared=PackedAttention(layout))
    weight = decoder.layers[0].self_attn.k_proj.weight
    return [out, *torch.autograd.grad(out.square().sum(), (hidden, weight))]


@pytest.mark.slow
def test_one_graph_serves_a_layer_at_every_layout(decoder: Any) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    layer = decoder.layers[0]
    run(layer, decoder, LAYOUTS[0], torch.randn(1, LAYOUTS[0].total_length, WIDTH))  # loads the implementation
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for layout in LAYOUTS:
        hidden = torch.randn(1, layout.total_length, WIDTH)
        expected = run(layer, decoder, layout, hidden.clone())
        torch.testing.assert_close(run(compiled, decoder, layout, hidden), expected)
    assert counter.frame_count <= 2  # of the first sizes, then of any
    names = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert not any("tolist" in name or "scaled_dot_product" in name for name in names)


def test_a_layer_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        decoder, layout = make_decoder(), PrefixLayout((5, 3), ((4, 2), (3,)))
        hidden = torch.empty(1, layout.total_length, WIDTH)
        found = run(decoder.layers[0], decoder, layout, hidden)
    assert [tuple(each.shape) for each in found] == [(1, 17, WIDTH), (1, 17, WIDTH), (16, WIDTH)]
