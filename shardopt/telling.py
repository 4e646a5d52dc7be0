"""Warnings that name the user's own line, however deep in the library, or below torch's wrappers, they arise."""

import sys
import warnings

INSIDE = ("shardopt", "torch", "contextlib")


def tell(warning: str) -> None:
    """A UserWarning at the nearest caller that is neither this library nor torch, which wraps `step` and schedulers.

    Where there is none, as on a thread that C began, at the outermost one.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(warning, stacklevel=level)
