"""How a process of a run ends."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from vlmr1.lifecycle.processes import exit_process
class Left:
    def __del__(self):
        print("taken down", flush=True)
left = Left()
atexit.register(print, "at exit")
sys.stdout.write("not flushed, ")
exit_process(3)
"""


@pytest.mark.parametrize(("world", "said"), [("1", "taken down\n"), ("2", "")], ids=["alone", "a rank"])
def test_a_rank_ends_with_what_was_registered_and_no_more(world, said):
    here = os.environ | {"WORLD_SIZE": world, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, f"not flushed, at exit\n{said}"), done.stderr
