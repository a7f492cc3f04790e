"""Settings of a run's logs and report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vlmr1.errors import missing_package
from vlmr1.types import Settings, setting

TRACKERS = {  # of report_to: module, and what to install
    "azure_ml": ("azureml", "azureml-core"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
ALSO = {"tensorboard": "tensorboardX"}  # modules that do as well
NO_PACKAGE = ("all", "none", "kubeflow")


class _Shared(Settings):
    shared = ("report_to",)
    if TYPE_CHECKING:
        report_to: str | list[str] | None


@dataclass
class ReportSettings(_Shared):
    """Logs and reports that a run writes."""

    group = "Reports"

    write_report: bool = setting(True, "write training.html into output_dir when the run ends")

    def check_device(self, device: str) -> Iterator[str]:
        for name in [self.report_to] if isinstance(self.report_to, str) else self.report_to or []:
            if name in TRACKERS and find_spec(ALSO.get(name, TRACKERS[name][0])) is None:
                yield from missing_package(f"report_to={name}", *TRACKERS[name])
            elif name not in TRACKERS and name not in NO_PACKAGE:
                yield f"report_to is {name!r}: known are {', '.join(TRACKERS)}, all and none"


@dataclass
class CompletionLogSettings(Settings):
    """The log of completions."""

    group = "Reports"

    log_completions: int = setting(4, "completions a step written to completions.jsonl")

    @property
    def completions_to_log(self) -> int:
        """The number of completions of a step in completions.jsonl, at most."""
        return self.log_completions

    def check(self) -> Iterator[str]:
        yield from self.at_least(0, "log_completions")
