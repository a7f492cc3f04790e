"""Frozen weights and reference models held in the dtype of autocast, in every family: the same log-probs and gradients
bit for bit, no weight cast in a pass, and checkpoints with what was read."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import lora_steps, trainers
from tests.helpers.families import checkpoints, one_family
from tests.helpers.limits import limit_of
from tests.helpers.lora_steps import LORA
from tests.helpers.maker import Maker
from tests.helpers.updates import update
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.reference import make_reference
from vlmr1.grpo.setup import make_policy
from vlmr1.models import load_model
from vlmr1.models.frozen import frozen_in
from vlmr1.types import Group

BF16 = torch.bfloat16
TO_COPY = torch.ops.aten._to_copy.default
checkpoint = checkpoints()


class WeightCasts(TorchDispatchMode):
    """Names of a model's frozen matrices that are cast in this block."""

    def __init__(self, model: Any):
        super().__init__()
        _, *others = model.named_parameters()  # the first keeps the dtype of all
        matrices = {name: p for name, p in others if p.ndim > 1 and not p.requires_grad}
        self.weights = {p.data_ptr(): name for name, p in matrices.items()}
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is TO_COPY and out.dtype == BF16 and args[0].data_ptr() in self.weights:
            self.names.add(self.weights[args[0].data_ptr()])
        return out


@pytest.fixture
def published(model: Any) -> Any:
    """A float32 model whose weights are bfloat16 numbers, as those of published checkpoints are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16).float()
    return model


def groups_of(make: Maker) -> list[Group]:
    return make.groups(("Locate the digit 1.", ("wide",), (6, 3)), ("What is seven?", (), (4, 9)))


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and len(one) > 4
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("settings", [{}, {"lora_merge_rollout": True}], ids=["adapter", "merged"])
def test_a_lora_run_casts_no_weight_and_computes_the_same(settings, make, published, processor, tmp_path):
    trainer = lora_steps.trainer_of(published, processor, tmp_path, bf16=True, beta=0.04, **LORA, **settings)
    groups, prompt = groups_of(make), make.prompt("Locate the digit 7.", (84,))

    def results() -> tuple[Any, set[str]]:
        trainer.features.clear()
        loss, _, gradients = update(trainer, groups)
        trainer.model.zero_grad()
        with WeightCasts(trainer.base) as casts:
            (group,) = trainer.rollout([prompt])
            reference = trainer.reference.logprobs(make_pack(groups))
        drawn = {f"drawn {i}": c.logp for i, c in enumerate(group.completions)}
        return gradients | drawn | {"reference": reference, "loss": torch.tensor(loss)}, casts.names

    before, casts = results()
    with frozen_in(trainer.base, BF16):
        after, none = results()
    assert len(casts) > 14 and len(none) <= limit_of("casts of frozen weights"), none
    assert_equal(before, after)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert_equal(before, results()[0])


# The reference model


@pytest.mark.parametrize("kind", ["copy", "offload"])
def test_a_reference_in_the_compute_dtype_has_the_same_log_probs(kind, make, published, processor, tmp_path):
    trainer = trainers.trainer_of(published, processor, tmp_path, bf16=True, beta=0.04, reference=kind)
    wide = make_reference(kind, make_policy(trainer, trainer.base), trainer.model, trainer.accelerator)
    pack = make_pack(groups_of(make))
    with WeightCasts(trainer.reference.model) as casts:
        narrow = trainer.reference.logprobs(pack)
    assert torch.equal(narrow, wide.logprobs(pack)) and casts.names == set()
    each = (list(reference.model.parameters())[1:] for reference in (trainer.reference, wide))
    one, two = (sum(p.nbytes for p in parameters if p.ndim > 1) for parameters in each)
    assert 0.5 <= one / two < 0.55  # the towers' position embeddings stay float32


@one_family()
def test_embeddings_whose_values_do_not_fit_stay_float32(make, model, processor, tmp_path):
    trainer = trainers.trainer_of(model, processor, tmp_path, bf16=True, beta=0.04)
    wide = make_reference("copy", make_policy(trainer, trainer.base), trainer.model, trainer.accelerator)
    pack = make_pack(groups_of(make))
    assert torch.equal(trainer.reference.logprobs(pack), wide.logprobs(pack))
    dtypes = {name: p.dtype for name, p in trainer.reference.model.named_parameters()}
    assert dtypes["model.language_model.embed_tokens.weight"] == torch.float32
    assert dtypes["model.language_model.layers.0.mlp.up_proj.weight"] == BF16


@one_family()
def test_a_reference_that_follows_the_policy_stays_float32(published, processor, tmp_path):
    """Moves of 1e-6 are below half the spacing of bfloat16 numbers."""
    settings = {"bf16": True, "beta": 0.04, "sync_ref_model": True}
    trainer = trainers.trainer_of(published, processor, tmp_path, **settings)
    before = {name: p.clone() for name, p in trainer.reference.model.named_parameters()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1 + 1e-4)
    trainer.reference.sync(0.5)
    for name, parameter in trainer.reference.model.named_parameters():
        moved = parameter - before[name]
        assert parameter.dtype == torch.float32
        assert float(moved.norm()) == pytest.approx(5e-5 * float(before[name].norm()), rel=0.01), name


class Casts(TorchDispatchMode):
    """How often tensors of these shapes are cast to bfloat16 in this block."""

    def __init__(self, shapes: set[torch.Size]):
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += func is TO_COPY and out.dtype == BF16 and args[0].shape in self.shapes
        return out


@one_family()
def test_an_offloaded_reference_is_cast_in_host_memory(published, processor, tmp_path):
    """No weight is cast where the policy is: each is copied into the host's."""
    trainer = trainers.trainer_of(published, processor, tmp_path, bf16=True, beta=0.04, reference="offload")
    shapes = {m.weight.shape for m in trainer.base.modules() if isinstance(m, torch.nn.Linear)}
    with Casts(shapes - {trainer.base.lm_head.weight.shape}) as casts:
        make_reference("offload", make_policy(trainer, trainer.base), trainer.model, dtype=BF16)
        assert casts.count == 0
        make_reference("copy", make_policy(trainer, trainer.base), trainer.model, dtype=BF16)
        assert casts.count > 14


# Runs


@one_family("qwen2_vl")
def test_a_head_that_shares_frozen_embeddings_is_not_saved(published, processor, tmp_path):
    """Also where a script has frozen them: in a run the head is a copy."""
    published.get_input_embeddings().weight.requires_grad_(False)
    trainer = trainers.trainer_of(published, processor, tmp_path, bf16=True)
    model, folder = trainer.base, tmp_path / "saved"
    with frozen_in(model, BF16):
        copied = model.lm_head.weight
        trainer.save_model(str(folder))
        assert model.lm_head.weight is copied and copied.dtype == BF16
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))
    assert_equal(load_model(str(folder), dtype=torch.float32).state_dict(), model.state_dict())


@one_family()
@pytest.mark.slow
def test_a_run_with_a_frozen_tower_saves_what_was_read(published, processor, tmp_path, caplog):
    """Also a tower that bfloat16 cannot hold; and a resumed run reads it."""
    layer = published.model.visual.blocks[0].attn.proj.weight
    layer.data = layer.data * (1 + 2.0**-12)
    settings = {"bf16": True, "freeze_vision": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = trainers.trainer_of(published, processor, tmp_path, **settings)
    dtypes = set()
    trainer.rollout = watched(trainer.rollout, lambda: dtypes.update(p.dtype for p in layers(trainer)))
    trainer.train()
    assert dtypes == {torch.float32, BF16} and "visual.blocks.0.attn.proj.weight" in caplog.text
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    for folder in tmp_path.glob("checkpoint-*"):
        saved = load_file(folder / "model.safetensors")
        assert {value.dtype for value in saved.values()} == {torch.float32}
        tower = {name: p for name, p in published.state_dict().items() if "visual." in name}
        assert_equal({name: saved[name.replace("model.visual", "visual")] for name in tower}, tower)
        assert '"dtype": "float32"' in (folder / "config.json").read_text()
    again = trainers.trainer_of(published, processor, tmp_path, **settings | {"max_steps": 3})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 3


def layers(trainer: Any) -> list[Tensor]:
    return [p for p in trainer.base.parameters() if not p.requires_grad]


def watched(function: Any, before: Any) -> Any:
    return lambda *given, **options: (before(), function(*given, **options))[1]
