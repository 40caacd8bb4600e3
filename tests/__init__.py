"""The tests. They make millions of short-lived objects, which the garbage collector need not look for so often."""

import gc

gc.set_threshold(100_000, 20, 100)
