"""Processes that do one piece of a build, and end when the build's own process ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal


def belong_to(parent: int) -> None:
    """Makes this process end with its parent, even if the parent is killed, and ignore Ctrl-C. Call it first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
