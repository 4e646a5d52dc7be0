"""For commands whose reader may leave before they are done, as `| head -1` does."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

P = ParamSpec("P")


def quiet(command: Callable[P, int]) -> Callable[P, int]:
    """The command, which ends without a traceback where nobody reads what it prints; its exit code is then 1.

    Python flushes stdout once more as it ends: what is left then goes where nothing is read.
    """

    @wraps(command)
    def ended(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            try:
                return command(*args, **kwargs)
            finally:
                sys.stdout.flush()  # also what argparse printed before it left
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1

    return ended
