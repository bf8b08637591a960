"""
What makes the scripts comfortable and robust. A first reading can skip this folder.

The scripts import it before PyTorch, for two defaults that must be set before that.
"""

import os
import sys

# PyTorch's threads wait for each other by spinning, and so take the cores from other programs, and
# these from them. On two cores beside six busy programs, a page took 29 seconds with the default
# and 10 with a short spin (tests/benchmarks/busy.md). What the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # GNU's OpenMP, on Linux: turns
    os.environ.setdefault("KMP_BLOCKTIME", "1")      # LLVM's, on macOS and Windows: milliseconds

# no traceback after Ctrl-C while PyTorch is imported, which takes seconds
show_error = sys.excepthook
sys.excepthook = lambda kind, *error: kind is KeyboardInterrupt or show_error(kind, *error)
