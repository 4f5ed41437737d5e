"""Processes that do one piece of a build, and end with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal


def belong_to(parent: int) -> None:
    """Called first in such a process: it ends with its parent, even if that is killed, and leaves Ctrl-C to the
    parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
