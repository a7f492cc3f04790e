"""A decode step of every family waits for no device: on tensors without data, which have no value to wait for."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from tests.helpers.families import FAMILIES, config_of
from vlmr1.models import family_for
from vlmr1.rollout import NativeEngine, SamplingSettings, kv_cache
from vlmr1.rollout.engine import Request
from vlmr1.rollout.scheduler import Scheduler

WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "item"}
SAMPLING = {"default": {}, "greedy": {"greedy": True}, "truncated": {"top_k": 5, "top_p": 0.9, "min_p": 0.1}}
SAMPLING["penalty"] = {"repetition_penalty": 1.2, "temperature": 0.7}


class NoWait(TorchDispatchMode):
    """Fails where an operator reads a value of the device, or has tensors of host and device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.partition("::")[2] not in WAITING, func
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
        assert len({each.device.type for each in tensors if each.dim()}) < 2, func  # numbers are arguments of a launch
        return out


CASES = [(family, "default") for family in FAMILIES] + [("qwen2_5_vl", name) for name in SAMPLING if name != "default"]


@pytest.mark.parametrize("family, sampling", CASES)
def test_no_decode_step_waits(family, sampling, monkeypatch):
    monkeypatch.setattr(kv_cache, "shared_prefix_decode", lambda q, *_, **__: torch.empty_like(q))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it knows no tensors without data
    config = config_of(family)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config).eval()
    engine = NativeEngine(model, family_for(config), None, ignore_eos=True)  # type: ignore[arg-type]
    dims = 3 if "mrope_section" in (config.get_text_config(decoder=True).rope_parameters or {}) else 1
    prompt: Any = SimpleNamespace(input_ids=torch.zeros(30), positions=torch.zeros(dims, 30))
    settings = replace(SamplingSettings(20), **SAMPLING[sampling])
    scheduler = Scheduler(engine, Request([prompt] * 2, 4, settings, 0), engine.new_state(20), {})
    batch, draws = scheduler.new_batch(scheduler.limit), torch.zeros(8, dtype=torch.float64, device="meta")
    with torch.no_grad(), NoWait():
        output = scheduler.step(batch, draws)
    assert [(each.shape, each.device.type) for each in output] == [((8,), "meta")] * 3
