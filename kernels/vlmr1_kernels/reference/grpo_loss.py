"""The GRPO loss of given log-probs."""

from torch import Tensor

from vlmr1_kernels.inputs import LossInputs
from vlmr1_kernels.linear import accumulation_dtype
from vlmr1_kernels.reference.objective import loss_and_metrics, make_rows
from vlmr1_kernels.settings import GRPOSettings


def grpo_loss(logp: Tensor, inputs: LossInputs, *, settings: GRPOSettings) -> tuple[Tensor, dict[str, Tensor]]:
    dtype = accumulation_dtype(logp.dtype)
    return loss_and_metrics(logp.to(dtype), make_rows(inputs, settings, dtype), settings)
