"""Layers with Liger's operators bound, beside the stock layers: definitions in plain torch show the binding, Liger's
kernels in Triton's interpreter the error."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.families import FAMILIES, checkpoints, one_family
from tests.helpers.fused import DEFINITIONS, counted, rms_norm, run, wide
from tests.helpers.interpreter import AVAILABLE, interpreted_liger
from vlmr1.grpo.packing import make_pack
from vlmr1.models import family_of
from vlmr1.models.fused_layers import Operators, fused_layers, is_rms_norm, liger_operators

checkpoint = checkpoints()
GROUP = [("Locate the digit 7.", (56,), (3, 2))]
# Calls of a pass: those of each decoder layer, then those of a tower layer
LAYERS: dict[str, tuple[str, str]] = {
    "qwen2_vl": ("rms_norm add_rms_norm swiglu rope", "rope"),
    "qwen2_5_vl": ("rms_norm add_rms_norm swiglu rope", "rms_norm rms_norm swiglu rope"),
    "qwen3_vl": ("rms_norm rms_norm rms_norm add_rms_norm swiglu rope", "rope"),
    "glm4v": ("rms_norm rms_norm rms_norm rms_norm swiglu_packed", "rms_norm rms_norm swiglu rope"),
    "internvl": ("rms_norm add_rms_norm swiglu rope", ""),
    "idefics3": ("rms_norm add_rms_norm swiglu rope", ""),
}
LAYERS["smolvlm"] = LAYERS["idefics3"]
FINAL = {"qwen2_5_vl": 2, "glm4v": 3}  # norms outside of layers; else that of the decoder


def expected_calls(model: Any) -> Counter[str]:
    kind, config = model.config.model_type, model.config
    tower = getattr(config.vision_config, "depth", None) or config.vision_config.num_hidden_layers
    decoder, vision = (Counter(names.split()) for names in LAYERS[kind])
    calls = Counter({name: n * config.text_config.num_hidden_layers for name, n in decoder.items()})
    calls.update({name: n * tower for name, n in vision.items()})
    return calls + Counter({"rms_norm": FINAL.get(kind, 1)})


def bound(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def relative(ours: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert ours.keys() == other.keys()
    difference = torch.stack([(ours[name] - value).double().norm() for name, value in other.items()]).norm()
    return float(difference / torch.stack([value.double().norm() for value in other.values()]).norm())


# The binding


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_definitions_give_the_stock_pass(dtype, make, model):
    """The forward to the bit; under autocast gradients meet in bfloat16 before a norm, which the stock layers add in
    float32."""
    pack, family = make_pack(make.groups(*GROUP)), family_of(model)
    logp, gradients = run(model, family, pack, dtype)
    family.operators, calls = counted(DEFINITIONS)
    logp_, gradients_ = run(model, family, pack, dtype)
    assert calls == expected_calls(model) and not bound(model)
    assert torch.equal(logp, logp_) and logp.std() > 0.1
    assert relative(gradients_, gradients) < (1e-5 if dtype is None else 2**-7)
