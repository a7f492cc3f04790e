"""Print and enforce the bounds on the project's structure: `python -m tests.structure`, a part of `make lint`.

Bounds: entries at the top of vlmr1/, files of the project that a file imports from, import cycles, imports that run
against the order of the packages, lines of a file, and lines of each source tree (`[tool.vlmr1.structure]` of
pyproject.toml). Imports inside functions and under TYPE_CHECKING count; a re-exported name counts for the file that
defines it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {"vlmr1": ROOT / "vlmr1", "vlmr1_kernels": ROOT / "kernels/vlmr1_kernels", "benchmarks": ROOT / "benchmarks"}
ENTRIES, FAN_OUT, FAN_OUT_OF_ROOTS, LINES = 22, 12, 18, 400
ROOTS = ("vlmr1.grpo.trainer", "vlmr1.cli", "vlmr1.commands.")
# Packages and modules of vlmr1, a level a line; imports run from a later level to an earlier one, or stay in theirs.
ORDER = """
types errors
telemetry lifecycle
distributed
models
data
rewards
rollout
training
grpo
sft evaluation report planner tiny
config
commands api __init__
cli
"""
LEVEL = {name: level for level, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks or that are new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({ROOT / name for name in names if (ROOT / name).is_file()})


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name; a package by its own name."""
    found = {}
    for name, folder in SOURCES.items():
        for path in tracked(f"{folder.relative_to(ROOT)}/*.py"):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def exported(module: str) -> dict[str, tuple[str, str]]:
    """The names that a module imports at its top, each with the module and the name that it comes from."""
    nodes = [node for node in tree(module).body if isinstance(node, ast.ImportFrom) and node.module in modules()]
    return {alias.asname or alias.name: (str(node.module), alias.name) for node in nodes for alias in node.names}


def definer(module: str, name: str) -> str:
    """The module that defines what `from module import name` gives."""
    if f"{module}.{name}" in modules():
        return f"{module}.{name}"
    if name in exported(module) and modules()[module].name == "__init__.py":
        return definer(*exported(module)[name])
    return module


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of the project that a module imports from."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module in modules():
            found |= {definer(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules()}
    return frozenset(found - {module})


def cycles() -> list[list[str]]:
    """A ring of modules that import each other, where there is one."""
    try:
        TopologicalSorter({module: imports(module) for module in modules()}).prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


def level(module: str) -> int | None:
    """The place of a module of vlmr1 in the order of the packages; None elsewhere."""
    parts = module.split(".")
    return LEVEL.get(parts[1] if len(parts) > 1 else "__init__", -1) if parts[0] == "vlmr1" else None


def upward() -> list[tuple[str, str]]:
    """Imports from an earlier level of the order to a later one."""
    pairs = [(module, other) for module in modules() for other in imports(module)]
    return [(a, b) for a, b in pairs if (x := level(a)) is not None and (y := level(b)) is not None and y > x]


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def faults() -> list[str]:
    """Every bound that is exceeded, after a table of all of them."""
    found: list[str] = []

    def show(what: str, value: int, bound: int) -> None:
        print(f"{what:48} {value:6} of {bound}")
        if value > bound:
            found.append(f"{what}: {value}, at most {bound}")

    entries = {module.split(".")[1] for module in modules() if module.startswith("vlmr1.")} | {"recipes"}
    show("packages and modules at the top of vlmr1/", len(entries), ENTRIES)
    unplaced = sorted(entries - LEVEL.keys() - {"recipes"})
    found += [f"vlmr1/{name} has no place in the order of the packages" for name in unplaced]
    roots = [module for module in modules() if module.startswith(ROOTS)]
    for kind, names, bound in (("a file", modules().keys() - roots, FAN_OUT), ("a root", roots, FAN_OUT_OF_ROOTS)):
        counts = {name: len(imports(name)) for name in names}
        show(f"files that {kind} imports from", max(counts.values()), bound)
        found += [f"{name} imports from {count} files" for name, count in counts.items() if count > bound]
    rings = cycles()
    show("import cycles", len(rings), 0)
    found += [f"cycle: {', '.join(ring)}" for ring in rings]
    against = upward()
    show("imports against the order", len(against), 0)
    found += [f"{a} imports {b}" for a, b in sorted(against)]
    sizes = {path: lines(path) for path in tracked("*.py", "*.cpp", "*.h")}
    show("lines of a file", max(sizes.values()), LINES)
    found += [f"{path.relative_to(ROOT)} has {size} lines" for path, size in sizes.items() if size > LINES]
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["vlmr1"]["structure"]
    for name, bound in bounds.items():
        folders = name.split("+")
        total = sum(n for path, n in sizes.items() if path.relative_to(ROOT).parts[0] in folders)
        show(f"lines under {name}", total, bound)
    return found


if __name__ == "__main__":
    problems = faults()
    print(*problems, sep="\n")
    sys.exit(bool(problems))
