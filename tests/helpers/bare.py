"""An interpreter that finds the packages alone that training needs, and what those need.

python bare.py CODE WORDS..."""

import re
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.machinery import PathFinder
from typing import Any

from packaging.requirements import Requirement

NEEDED = ("torch", "transformers", "accelerate", "numpy", "pillow", "safetensors")


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: Iterable[str], found: frozenset[str] = frozenset()) -> frozenset[str]:
    """These distributions and all that they require without extras."""
    for name in map(normalized, names):
        if name not in found:
            requires = map(Requirement, metadata.requires(name) or ())
            kept = [each.name for each in requires if each.marker is None or each.marker.evaluate({"extra": ""})]
            found = closure(kept, found | {name})
    return found


KEPT = closure(NEEDED) | {"vlmr1"}
OWNERS = metadata.packages_distributions().items()
ABSENT = {module for module, names in OWNERS if not KEPT & set(map(normalized, names))}


class OthersAbsent(PathFinder):
    """Finds neither modules nor metadata of other distributions."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(*given: Any) -> Any:
        return (each for each in PathFinder.find_distributions(*given) if normalized(each.name) in KEPT)


if __name__ == "__main__":
    sys.meta_path[:] = [OthersAbsent if each is PathFinder else each for each in sys.meta_path]
    exec(sys.argv.pop(1))
