"""Which parameters are trained, where the reference comes from, where activations are kept, each
setting changes what it says and nothing else, and what cannot be is refused by name."""

from typing import Any

import pytest
import torch

from tests.helpers.lora_steps import LORA, perturb
from tests.helpers.refused import refusal
from tests.helpers.trainers import gradients, relative, trainer_of
from vlmr1.config import GRPOConfig
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.grpo.reference import frozen_copy
from vlmr1.models import family_of

PEFT = ["--use_peft", "true"]


@pytest.mark.parametrize("module, arguments", [("peft", PEFT), ("bitsandbytes", [*PEFT, "--load_in_4bit", "true"])])
def test_what_is_not_installed_is_named(module, arguments, monkeypatch):
    monkeypatch.setattr("vlmr1.errors.find_spec", lambda name: None if name == module else True)
    setting = arguments[-2].lstrip("-")
    assert refusal(*arguments) == f"{setting} needs {module}: pip install 'vlmr1[quant]'"


# Tower and projector


FREEZE = {
    "nothing": ({}, True, True, False),
    "tower and projector": ({"freeze_vision": True}, False, False, True),
    "both by name": ({"freeze_vision": True, "freeze_merger": True}, False, False, True),
    "tower": ({"freeze_vision": True, "freeze_merger": False}, False, True, False),
    "projector": ({"freeze_merger": True}, True, False, False),
}


@pytest.mark.parametrize("settings, tower, merger, cached", FREEZE.values(), ids=FREEZE.keys())
def test_freeze(settings, tower, merger, cached, model, processor, make, tmp_path):
    """Features are kept over rollout, reference and policy only where nothing of both is trained."""
    plain = gradients(trainer_of(model, processor, tmp_path), make)[1]
    make.random.manual_seed(0)
    trainer = trainer_of(model, processor, tmp_path, **settings)
    found = gradients(trainer, make)[1]
    assert (trainer.features is not None) == cached
    of_merger = {name for name in plain if ".visual.merger." in name}
    of_tower = {name for name in plain if ".visual." in name} - of_merger
    expected = plain.keys() - (set() if tower else of_tower) - (set() if merger else of_merger)
    assert of_merger and of_tower and found.keys() == expected
    assert relative(found, {name: plain[name] for name in expected}) < 1e-5


ENCODED = {  # images of each call
    "shared": ({"max_steps": 2}, [2, 2]),
    "not shared": ({"share_vision": False, "share_prompt": False}, [2, 2 * 3, 2 * 3]),
}


@pytest.mark.parametrize("settings, images", ENCODED.values(), ids=ENCODED.keys())
def test_a_frozen_tower_encodes_an_image_once_a_step(settings, images, model, processor, tmp_path, monkeypatch):
    """For rollout, reference and policy; without share_vision again for each completion of a pass."""
    trainer = trainer_of(model, processor, tmp_path, freeze_vision=True, **settings)
    encode, counts = trainer.family.encode_images, []
    monkeypatch.setattr(trainer.family, "encode_images", lambda m, them: counts.append(len(them)) or encode(m, them))
    trainer.train()
    assert [count for count in counts if count] == images
    assert (trainer.features is None) == ("share_vision" in settings)
    assert trainer.features is None or trainer.features.kept == {}  # freed after each step


# The reference


def test_reference_in_host_memory(model, processor, make, tmp_path):
    """Equal log-probs and gradients as of a copy; frozen parts are the policy's own."""
    loss, copied = gradients(trainer_of(model, processor, tmp_path, freeze_vision=True), make)
    make.random.manual_seed(0)
    trainer = trainer_of(model, processor, tmp_path, freeze_vision=True, reference="offload")
    loss_, found = gradients(trainer, make)
    assert loss == loss_ and all(torch.equal(copied[name], found[name]) for name in copied)
    reference: Any = trainer.reference
    policy = dict(trainer.model.named_parameters())
    own = {name for name, p in reference.model.named_parameters() if p.data_ptr() != policy[name].data_ptr()}
    assert own == {name for name, parameter in policy.items() if parameter.requires_grad}
    assert len(reference.host) == len(own)


def test_reference_in_host_memory_follows_no_update(model, processor, make, tmp_path):
    """It stays what it was when the policy moves; several packs bring it once."""
    trainer = trainer_of(model, processor, tmp_path, reference="offload")
    reference: Any = trainer.reference
    pack = make_pack([make.group(make.prompt("Locate the digit 7.", (84,)), (5, 9))])
    before = reference.logprobs(pack)
    perturb(trainer.model, 0.05)
    assert not torch.equal(trainer.policy.logprobs(pack), before) and torch.equal(reference.logprobs(pack), before)
    brought: list[int] = []
    bring = reference._brought
    reference._brought = lambda: brought.append(1) or bring()
    reference.logprobs(pack)
    with reference.ready():
        assert torch.equal(reference.logprobs(pack), reference.logprobs(pack))
    assert len(brought) == 2
    host = [kept.data_ptr() for kept in reference.host.values()]
    assert [parameter.data_ptr() for parameter in reference.host] == host


KINDS = {"auto": "AdapterReference", "adapter": "AdapterReference", "copy": "Reference", "offload": "HostReference"}


@pytest.mark.parametrize("kind", KINDS)
def test_reference_of_an_adapter(kind, model, processor, make, tmp_path):
    """Each is the model that the run began with, which an adapter that has learned something is not."""
    pack = make_pack([make.group(make.prompt("Locate the digit 7.", (84,)), (5, 9))])
    base = PackedPolicy(frozen_copy(model), family_of(model), temperature=1.0).logprobs(pack)
    trainer = trainer_of(model, processor, tmp_path, reference=kind, **LORA)
    perturb(trainer.model)
    reference: Any = trainer.reference
    assert type(reference).__name__ == KINDS[kind]
    torch.testing.assert_close(reference.logprobs(pack), base, rtol=1e-6, atol=1e-6)
    assert float((trainer.policy.logprobs(pack) - base).abs().max()) > 1e-2
    adapter = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(adapter) == 2 * 7 * model.config.text_config.num_hidden_layers  # trained again afterwards
    copies = {p.data_ptr() for p in reference.model.parameters()} - {p.data_ptr() for p in trainer.model.parameters()}
    assert len(copies) == (0 if "Adapter" in KINDS[kind] else len(adapter))


def test_a_run_with_an_adapter(model, processor, tmp_path):
    """Rollout, reference, policy and update: the KL begins at 0 and grows, the base stays."""
    trainer = trainer_of(model, processor, tmp_path, max_steps=3, max_completion_length=24, learning_rate=1e-2, **LORA)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kl[0] == 0 and kl[2] > 1e-4
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained


# Activations in host memory


def test_activation_offload(model, processor, make, tmp_path, monkeypatch):
    """Equal gradients, and what the decoder's layers keep, their inputs, goes through host memory."""
    monkeypatch.setattr(GRPOConfig, "check_device", lambda self: None)  # as on a GPU
    plain, count = held(trainer_of(model, processor, tmp_path, gradient_checkpointing=True), make, monkeypatch)
    make.random.manual_seed(0)
    settings = {"gradient_checkpointing": True, "activation_offload": True}
    found, moved = held(trainer_of(model, processor, tmp_path, **settings), make, monkeypatch)
    assert relative(found, plain) == 0
    layers = model.config.text_config.num_hidden_layers + model.config.vision_config.depth
    assert count == 0 and moved >= layers


def held(trainer: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients with what `Trainer.train` enables, and how many tensors were held in host memory; pinned memory needs a
    GPU, so here it is not."""
    packed: list[int] = []

    class Counted(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool, device_type: str):
            super().__init__(pin_memory=False, device_type=device_type)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: packed.append(1) or pack(tensor)

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Counted)
    kwargs = dict(trainer.args.activation_checkpointing_kwargs or {})  # as `Trainer.train` takes them apart
    trainer.model.activation_checkpointing_enable(offload=kwargs.pop("offload", False))
    return gradients(trainer, make)[1], len(packed)
