"""Calls of the ops with bad arguments: the error names the argument."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vlmr1_kernels
from tests.helpers import decode_cases
from tests.helpers.kernel_cases import Case
from vlmr1_kernels import GRPOSettings, ImplementationError, PrefixLayout, SamplingOptions, use
from vlmr1_kernels.testing import cast

ROWS, SEQUENCES = 9, 4
NAN = torch.full((ROWS,), torch.nan)
META = torch.zeros(ROWS, device="meta")
GIVEN: dict[str, Any] = cast(Case((3, 1, 4, 1), 20, 37, bias=True).draw(0, torch.float32), torch.float32)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = False) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device, requires_grad=grad)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def only(*names: str) -> dict[str, Any]:
    return {name: GIVEN[name] for name in names}


LOSS = only("seq_ids", "advantages", "old_logp", "ref_logp", "sampling_logp")
GOOD: dict[str, dict[str, Any]] = {
    "linear_logprob": only("hidden", "weight", "targets", "bias"),
    "group_advantages": {"rewards": torch.ones(6), "num_generations": 3},
    "grpo_loss": LOSS | {"logp": zeros(ROWS), "check": True},
    "linear_grpo_loss": GIVEN | {"active_rows": torch.arange(ROWS), "check": True},
    "shared_prefix_attention": dict.fromkeys("qkv", zeros(1, 2, 5, 8)) | {"layout": PrefixLayout((2,), ((3,),))},
    "varlen_attention": dict.fromkeys("qkv", zeros(1, 2, 5, 8)) | {"cu_seqlens": integers(0, 2, 5), "max_length": 3},
    "shared_prefix_decode": decode_cases.cast(
        decode_cases.Case((3, 2), (2, 2), (3,) * 4, head_dim=8).draw(), torch.float32
    ),
}
SAMPLED = zeros(3, 7)
GOOD["sample_tokens"] = {
    "logits": SAMPLED, "draws": zeros(3).double(), "suppressed_ids": integers(2).long(), "seen": SAMPLED > 0,
    "options": SamplingOptions(0.5, False, 3, 0.5, 0.1, 1.2),
}  # fmt: skip
GOOD["rope_kv_write"] = decode_cases.cast(decode_cases.RopeCase(norms=True).draw(), torch.float32)
DOUBLE = {
    op: {name: v.double() for name, v in GOOD[op].items() if isinstance(v, Tensor) and v.is_floating_point()}
    for op in ("linear_logprob", "group_advantages", "grpo_loss", "linear_grpo_loss")
}
WIDE = decode_cases.cast(decode_cases.Case((3,), (1,), (1,), head_dim=264).draw(), torch.float32)
# Of each op: (what is wrong, words that the message holds)
BAD: dict[str, list[tuple[dict[str, Any], tuple[str, ...]]]] = {
    "linear_logprob": [
        ({"hidden": zeros(3)}, ("hidden", "[3]")),
        ({"hidden": zeros(ROWS, 20, dtype=torch.int64)}, ("hidden", "float32")),
        ({"weight": zeros(37, 4)}, ("weight", "[37, 4]")),
        ({"weight": zeros(37, 20, dtype=torch.bfloat16)}, ("weight", "bfloat16", "float32")),
        ({"weight": zeros(37, 20, device="meta")}, ("weight", "meta", "cpu")),
        ({"targets": zeros(2, dtype=torch.int64)}, ("targets", "[2]")),
        ({"targets": zeros(ROWS)}, ("targets", "int64")),
        ({"targets": META.long()}, ("targets", "meta")),
        ({"bias": zeros(5)}, ("bias", "[37]")),
        ({"bias": zeros(37, dtype=torch.float16)}, ("bias", "float16", "float32")),
        ({"bias": zeros(37, device="meta")}, ("bias", "meta")),
        ({"temperature": 0.0}, ("temperature",)),
        ({"softcap": -1.0}, ("softcap",)),
        ({"chunk_mib": 0}, ("chunk_mib",)),
    ],
    "group_advantages": [
        ({"num_generations": 4}, ("num_generations is 4", "6 rewards")),
        ({"num_generations": 0}, ("num_generations is 0",)),
        ({"rewards": torch.ones(2, 3)}, ("rewards", "[2, 3]")),
        ({"rewards": torch.ones(6, dtype=torch.int64)}, ("rewards", "float64")),
        ({"scale": "batches"}, ("scale", "batches")),
    ],
    "grpo_loss": [
        ({"logp": zeros(2, 9)}, ("logp", "[2, 9]")),
        ({"logp": zeros(ROWS, dtype=torch.int64)}, ("logp", "float32")),
        ({"advantages": None}, ("advantages", "rewards")),
        ({"advantages": torch.ones(4, 1)}, ("advantages", "[4, 1]")),
        ({"advantages": zeros(4, device="meta")}, ("advantages", "meta", "cpu")),
        ({"num_generations": 2}, ("num_generations", "rewards")),
        ({"advantages": None, "rewards": torch.ones(4)}, ("rewards", "num_generations")),
        ({"seq_ids": zeros(4, dtype=torch.int64)}, ("seq_ids", "[9]")),
        ({"seq_ids": zeros(ROWS)}, ("seq_ids", "int64")),
        ({"seq_ids": META.long()}, ("seq_ids", "meta")),
        *(({name: zeros(8)}, (name, "[9]")) for name in ("old_logp", "ref_logp", "sampling_logp")),
        *(({name: zeros(ROWS, grad=True)}, (name, "gradient")) for name in ("old_logp", "ref_logp", "sampling_logp")),
        *(({name: META}, (name, "meta")) for name in ("old_logp", "ref_logp", "sampling_logp")),
        *(({name: NAN}, (name, "NaN")) for name in ("old_logp", "ref_logp", "sampling_logp")),
        ({"ref_logp": None, "settings": GRPOSettings(beta=0.1)}, ("ref_logp", "beta")),
        ({"sampling_logp": None, "settings": GRPOSettings(tis_cap=2.0)}, ("sampling_logp", "tis_cap")),
        ({"settings": GRPOSettings(entropy_coef=0.1)}, ("entropy_coef",)),
        ({"normalizer": 0}, ("normalizer",)),
        ({"normalizer": torch.ones(2)}, ("normalizer",)),
        ({"advantages": torch.ones(3)}, ("seq_ids", "0..2")),
        ({"advantages": torch.tensor([1.0, 0, 0, torch.inf])}, ("advantages", "infinity")),
        ({"seq_ids": torch.arange(ROWS) % SEQUENCES}, ("seq_ids", "sorted")),
    ],
    "linear_grpo_loss": [
        ({"settings": GRPOSettings(beta=0.1)}, ("active_rows", "beta")),
        ({"settings": GRPOSettings(entropy_coef=0.1)}, ("active_rows", "entropy_coef")),
        ({"active_rows": torch.ones(3, dtype=torch.bool)}, ("active_rows", "[9]")),
        ({"active_rows": torch.ones(3)}, ("active_rows", "bool")),
        ({"active_rows": torch.tensor([3, 1])}, ("active_rows", "order")),
        ({"active_rows": torch.tensor([9])}, ("active_rows", "0..8")),
        ({"active_rows": torch.tensor([0, 1])}, ("active_rows", "advantage")),
        ({"weight": zeros(37, 21)}, ("weight", "[37, 21]")),
        ({"targets": torch.full((ROWS,), 37)}, ("targets", "0..36")),
        ({"targets": torch.full((ROWS,), -1)}, ("targets", "0..36")),
        ({"seq_ids": torch.full((ROWS,), -1)}, ("seq_ids", "0..3")),
        ({"seq_ids": torch.arange(ROWS) % SEQUENCES}, ("seq_ids", "sorted")),
        *(({name: NAN}, (name, "NaN")) for name in ("old_logp", "ref_logp", "sampling_logp")),
        ({"ref_logp": zeros(ROWS, grad=True)}, ("ref_logp", "gradient")),
        ({"advantages": NAN[:4]}, ("advantages", "NaN")),
    ],
    "shared_prefix_attention": [
        (dict.fromkeys("qkv", zeros(2, 2, 5, 8)), ("q must be", "[2, 2, 5, 8]")),
        (dict.fromkeys("qkv", zeros(1, 2, 6, 8)), ("6 rows", "layout")),
        ({"k": zeros(1, 2, 4, 8)}, ("k must be", "[1, 2, 4, 8]")),
        ({"v": zeros(1, 1, 5, 8)}, ("v is", "[1, 1, 5, 8]")),
        ({"q": zeros(1, 3, 5, 8)}, ("3 query heads", "2")),
        ({"v": zeros(1, 2, 5, 8).bfloat16()}, ("v is", "bfloat16", "float32")),
        ({"softcap": 0.0}, ("softcap",)),
        ({"softcap": -1.0}, ("softcap",)),
        ({"window": 0}, ("window",)),
    ],
    "varlen_attention": [
        ({"cu_seqlens": integers(1, 5)}, ("cu_seqlens", "[1, 5]")),
        ({"cu_seqlens": integers(0, 4)}, ("cu_seqlens", "[0, 4]")),
        ({"cu_seqlens": integers(0, 3, 2, 5)}, ("cu_seqlens", "[0, 3, 2, 5]")),
        ({"cu_seqlens": integers(0)}, ("cu_seqlens", "[1]")),
        ({"cu_seqlens": integers(0, 5).long()}, ("cu_seqlens", "int64")),
        ({"cu_seqlens": integers(0, 5).to("meta")}, ("cu_seqlens", "meta")),
        ({"max_length": 2}, ("max_length is 2", "3 rows")),
        ({"max_length": 0}, ("max_length",)),
        ({"v": zeros(1, 2, 5, 4)}, ("v must be", "[1, 2, 5, 4]")),
    ],
    "shared_prefix_decode": [
        ({"q": zeros(4, 8)}, ("q must be", "[4, 8]")),
        ({"q": zeros(4, 3, 8)}, ("3 query heads", "2")),
        ({"keys": zeros(2, 9, 7)}, ("keys", "[2, 9, 7]")),
        ({"values": zeros(2, 8, 9).mT}, ("values", "contiguous")),
        ({"values": zeros(2, 9, 8)}, ("keys", "values is [2, 9, 8]")),
        ({"values": zeros(2, 9, 8).half()}, ("values", "float16", "float32")),
        ({"group_offsets": integers(0)}, ("group_offsets",)),
        ({"group_offsets": integers(0, 2, 4).long()}, ("group_offsets", "int64")),
        ({"prefix_starts": integers(0, 0, 0)}, ("prefix_starts", "[3]")),
        ({"prefix_lengths": zeros(2)}, ("prefix_lengths", "float32")),
        ({"suffix_blocks": integers(0, 0, 0, 0)}, ("suffix_blocks", "[4]")),
        ({"suffix_blocks": zeros(5, 2, dtype=torch.int32)}, ("suffix_blocks", "[5, 2]")),
        ({"suffix_lengths": zeros(4, 1, dtype=torch.int32)}, ("suffix_lengths", "[4, 1]")),
        ({"suffix_lengths": zeros(4, dtype=torch.int32, device="meta")}, ("suffix_lengths", "meta")),
        ({"block": 0}, ("block",)),
        ({"max_group": 0}, ("max_group",)),
        ({"max_prefix": -1}, ("max_prefix",)),
        ({"q": zeros(4, 4, 8, grad=True)}, ("gradient",)),
    ],
    "sample_tokens": [
        ({"logits": zeros(7)}, ("logits", "[7]")),
        ({"logits": zeros(3, 0)}, ("logits", "[3, 0]")),
        ({"logits": zeros(3, 7, dtype=torch.int64)}, ("logits", "float32")),
        ({"logits": zeros(3, 7, grad=True)}, ("logits", "gradient")),
        ({"draws": zeros(3)}, ("draws", "float64", "float32")),
        ({"draws": zeros(2).double()}, ("draws", "[3]", "[2]")),
        ({"draws": zeros(3, dtype=torch.float64, device="meta")}, ("draws", "meta", "cpu")),
        ({"suppressed_ids": integers(1, 2)}, ("suppressed_ids", "int64", "int32")),
        ({"suppressed_ids": zeros(1, 2, dtype=torch.int64)}, ("suppressed_ids", "[2]", "[1, 2]")),
        ({"seen": zeros(3, 7)}, ("seen", "bool", "float32")),
        ({"seen": zeros(3, 6) > 0}, ("seen", "[3, 7]", "[3, 6]")),
        ({"seen": None}, ("seen", "repetition_penalty")),
        ({"options": SamplingOptions(temperature=0.0)}, ("temperature",)),
        ({"options": SamplingOptions(top_k=-1)}, ("top_k",)),
        ({"options": SamplingOptions(top_p=0.0)}, ("top_p",)),
        ({"options": SamplingOptions(min_p=1.5)}, ("min_p",)),
        ({"options": SamplingOptions(repetition_penalty=0.0)}, ("repetition_penalty",)),
    ],
    "rope_kv_write": [
        ({"q": zeros(5, 64)}, ("q must be", "[5, 64]")),
        ({"q": zeros(5, 3, 16)}, ("3 query heads", "2")),
        ({"k": zeros(5, 4, 16)}, ("k must be [5, 2, 16]", "[5, 4, 16]")),
        ({"v": zeros(5, 2, 16).half()}, ("v is", "float16")),
        ({"keys": zeros(2, 9, 7)}, ("keys", "[2, 9, 7]")),
        ({"values": zeros(2, 9, 16)}, ("keys", "values is [2, 9, 16]")),
        ({"cos": zeros(5, 15)}, ("cos must be [5, Dr]", "[5, 15]")),
        ({"sin": zeros(5, 8)}, ("sin is [5, 8]", "[5, 16]")),
        ({"cos": zeros(5, 16).double()}, ("cos must be float32", "float64")),
        ({"k_norm": None}, ("q_norm and k_norm",)),
        ({"q_norm": zeros(4)}, ("q_norm must be [16]", "[4]")),
        ({"rows": integers(0, 1, 2, 3, 4)}, ("rows must be int64 [5]", "int32")),
        ({"q": zeros(5, 4, 16, grad=True)}, ("gradient",)),
    ],
}
CALLS = [(op, change, words) for op, calls in BAD.items() for change, words in calls]


@pytest.mark.parametrize(("op", "change", "words"), CALLS, ids=[f"{op}-{words[0]}" for op, _, words in CALLS])
def test_bad_input_is_named(op: str, change: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        getattr(vlmr1_kernels, op)(**(GOOD[op] | change))
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


@pytest.mark.parametrize("op", BAD)
def test_good_input_is_not_refused(op: str) -> None:
    getattr(vlmr1_kernels, op)(**GOOD[op])


@pytest.mark.parametrize(
    ("op", "impl", "change", "words"),
    [
        ("shared_prefix_attention", "cpu", {"softcap": 3.0, "window": 2}, ("softcap", "window")),
        ("shared_prefix_attention", "cpu", dict.fromkeys("qkv", zeros(1, 2, 5, 8).double()), ("not torch.float64",)),
        ("shared_prefix_attention", "flex", {}, ("cuda", "cpu")),
        ("shared_prefix_attention", "flash", {}, ("cuda", "cpu")),
        ("varlen_attention", "flash", {}, ("cuda", "cpu")),
        ("group_advantages", "flash", {}, ("has no implementation 'flash'",)),
        ("shared_prefix_decode", "triton", decode_cases.Case((3,), (1,), (1,)).draw(), ("not torch.float64",)),
        ("rope_kv_write", "triton", decode_cases.RopeCase().draw(), ("not torch.float64",)),
        ("shared_prefix_decode", "triton", WIDE, ("supports head dimensions up to 256, not 264",)),
        ("sample_tokens", "triton", {}, ("triton has no top_k, no top_p",)),
        ("sample_tokens", "triton", {"logits": SAMPLED.double()}, ("not torch.float64",)),
        *((op, impl, DOUBLE[op], ("not torch.float64",)) for op in DOUBLE for impl in ("native", "triton")),
    ],
)
def test_an_implementation_is_refused_with_the_reason(op: str, impl: str, change: dict[str, Any], words: tuple) -> None:
    if impl == "triton":
        pytest.importorskip("triton")
    for how in ("argument", "block"):
        with pytest.raises(ImplementationError) as caught, use(**({op: impl} if how == "block" else {})):
            getattr(vlmr1_kernels, op)(**(GOOD[op] | change), impl="auto" if how == "block" else impl)
        assert [word for word in (op, impl, *words) if word not in str(caught.value)] == [], caught.value


@pytest.mark.parametrize(
    ("prompts", "branches", "message"),
    [
        ((), (), "prompt_lengths is empty"),
        ((2, 3), ((1,),), "prompt_lengths has 2 groups, branch_lengths has 1"),
        ((2, 0), ((1,), (1,)), r"prompt_lengths\[1\] is 0"),
        ((2,), ((1, -1),), r"branch_lengths\[0\] is \(1, -1\)"),
    ],
)
def test_bad_layout_is_named(prompts: tuple[int, ...], branches: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixLayout(prompts, branches)


@pytest.mark.parametrize(
    ("setting", "value", "others"),
    [
        ("loss_type", "ppo", {}),
        ("kl", "k4", {}),
        ("importance_level", "word", {}),
        ("epsilon_low", 1.5, {}),
        ("epsilon_high", -0.1, {}),
        ("epsilon_high", 0.2, {"loss_type": "cispo"}),
        ("delta", 0.9, {}),
        ("delta", 4.0, {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("beta", -0.1, {}),
        ("beta", float("nan"), {}),
        ("tis_cap", 0.0, {}),
        ("entropy_coef", float("inf"), {}),
        ("temperature", 0.0, {}),
        ("max_completion_length", 0, {}),
        ("max_completion_length", None, {"loss_type": "dr_grpo"}),
    ],
)
def test_bad_setting_is_named(setting: str, value: Any, others: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{setting} is {value!r}"):
        GRPOSettings(**{setting: value}, **others)
