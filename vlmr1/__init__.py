"""Training of vision-language models: GRPO, and supervised fine-tuning. Names and defaults are those of TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmr1.lifecycle.console import quiet_imports

if TYPE_CHECKING:
    from vlmr1.api.config import GRPOConfig
    from vlmr1.api.sft_config import SFTConfig
    from vlmr1.api.sft_trainer import SFTTrainer
    from vlmr1.api.trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer"]
MODULES = {"GRPOConfig": "config", "GRPOTrainer": "trainer", "SFTConfig": "sft_config", "SFTTrainer": "sft_trainer"}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: the command line starts without them."""
    if name in MODULES:
        quiet_imports()
        return getattr(import_module(f"vlmr1.api.{MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
