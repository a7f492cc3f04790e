from typing import Any

import pytest

from vlmr1_kernels import GRPOSettings


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
