"""Pictures of a run: the reward curve, and one HTML file with boxes drawn on held-out images."""

from vlmr1.report.curves import reward_curve
from vlmr1.report.html import Example, write_report

__all__ = ["Example", "reward_curve", "write_report"]
