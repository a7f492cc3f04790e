"""GRPO training of vision-language models. `GRPOConfig` and `GRPOTrainer` have the names and defaults of TRL."""

from typing import TYPE_CHECKING, Any

from vlmr1.lifecycle.console import quiet_imports

if TYPE_CHECKING:
    from vlmr1.api.config import GRPOConfig
    from vlmr1.api.trainer import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use: the command line starts without them."""
    if name in __all__:
        quiet_imports()
    if name == "GRPOConfig":
        from vlmr1.api.config import GRPOConfig

        return GRPOConfig
    if name == "GRPOTrainer":
        from vlmr1.api.trainer import GRPOTrainer

        return GRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
