"""The compile tests with each release of Triton: python -m tests.helpers.triton_versions (or `make test-triton`)

Each release has an environment of its own, which takes all other packages from this one.
"""

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from xml.etree import ElementTree

from tests.helpers.cuda_table import update
from tests.helpers.python import ROOT, environment

RELEASES = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
# Of Triton's compiler: 8 bytes of the float32 decode kernel are spilled.
KNOWN = {("3.7.1", "test_nothing_spills_and_shared_memory_suffices[sm_80]")}
TESTS = "tests/kernels/test_triton_compile.py"
OTHERS = sysconfig.get_paths()["purelib"]


def interpreter(release: str) -> Path:
    """Return the interpreter that has this release; install it where it is missing."""
    folder = ROOT / ".venv-triton" / release
    python = folder / "bin" / "python"
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    if not (packages / "triton").is_dir():
        venv.create(folder)
        (packages / "others.pth").write_text(OTHERS)  # after its own
        words = ("install", "-qq", "--disable-pip-version-check", "--no-deps", "--target", packages)
        subprocess.run([sys.executable, "-m", "pip", *words, f"triton=={release}"], check=True)
    return python


def outcome(python: Path) -> dict[str, object]:
    """Run the tests; return the exact version, how many passed, and the names of the others."""
    command = [python, "-c", "import triton; print(triton.__version__)"]
    version = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    with NamedTemporaryFile(suffix=".xml") as report:
        words = ("-q", "-p", "no:cacheprovider", f"--junitxml={report.name}", TESTS)
        subprocess.run([python, "-m", "pytest", *words], env=environment(), cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report.name).iter("testcase"))
    bad = sorted(str(case.get("name")) for case in cases if any(child.tag != "system-out" for child in case))
    return {"version": version, "passed": len(cases) - len(bad), "others": bad}


def main() -> Iterator[str]:
    """Yield what failed."""
    found = {release: outcome(interpreter(release)) for release in RELEASES}
    update(triton=found)
    for each in found.values():
        print(each)
        unknown = [name for name in each["others"] if (each["version"], name) not in KNOWN]  # type: ignore[attr-defined]
        yield from (f"Triton {each['version']}: {name}" for name in unknown)


if __name__ == "__main__":
    sys.exit("\n".join(main()) or None)
