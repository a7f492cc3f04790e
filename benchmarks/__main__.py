"""`python -m benchmarks`, which `vlmr1 bench` calls.

vlmr1 bench --quick                 a look in minutes, on a tiny model
vlmr1 bench                         whole steps: naive, every switch, all of them, TRL
vlmr1 bench sft                     updates of supervised fine-tuning, beside TRL's SFTTrainer
vlmr1 bench compare A.json B.json   two result files
vlmr1 bench report FILE.json        tables and a page of one
vlmr1 bench readme --check          the tables of README.md and docs/sft.md against their result files
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from benchmarks.console import quiet

if __name__ == "__main__":
    quiet()  # before torch is imported

TOOLS = {"compare": "benchmarks.compare", "report": "benchmarks.report", "readme": "benchmarks.readme"}
TOOLS |= {"sft": "benchmarks.sft"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where arms compute different things, 2 for the user's mistakes, 130 after Ctrl-C."""
    from benchmarks.harness import CheckFailed
    from vlmr1.errors import UserError

    words = list(sys.argv[1:] if arguments is None else arguments)
    known = words[:1] and words[0] in TOOLS
    try:
        run = import_module(TOOLS[words[0]] if known else "benchmarks.step").main
        return run(words[1:] if known else words)
    except UserError as error:
        print(f"vlmr1 bench: {error}", file=sys.stderr)
        return 2
    except CheckFailed as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
