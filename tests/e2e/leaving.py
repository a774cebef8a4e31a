"""What ranks run that leave an interpreter which cannot end well: a thread of gloo's is one such, seldom."""

import atexit
import os
import sys


def abort_at_the_end() -> None:
    """Return, with text that is not written out yet, and die of SIGABRT where the interpreter ends."""
    atexit.register(os.abort)
    sys.stdout.write("the last words")
