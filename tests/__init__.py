"""The tests, in rooms as the package: the tests of `score_sde/sdes/` are in `tests/sdes/`, and so on.

`cli` has the command line as a user meets it; a test of several rooms is in the highest of them.
"""

import gc
from pathlib import Path

# tests make millions of short-lived objects, which the garbage collector need not look for so often
gc.set_threshold(100_000, 20, 100)

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "data" / "recorded"  # what other projects computed; its README says how
