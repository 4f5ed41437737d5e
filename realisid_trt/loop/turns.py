"""Who may use an engine: one thread at a time, and nobody from within a progress callback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..backends import Backend
from ..errors import BackendError, RequestError

CLOSED = "this engine was closed. Load it again: Engine.load(…)."


class Turns:
    """The turns of one engine's users."""

    def __init__(self, backend: Backend) -> None:
        self.is_closed = False
        self._backend, self._lock, self._user = backend, threading.Lock(), 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """A context for one user's calls of the backend. Raises BackendError if the engine was closed."""
        with self.alone():
            if self.is_closed:
                raise BackendError(CLOSED)
            with self._backend.turn():
                yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A context for one user at a time. Refuses a callback that calls its own engine: it would deadlock."""
        self._refuse_reentry()
        with self._lock:
            self._user = threading.get_ident()
            try:
                yield
            finally:
                self._user = 0

    def check_free(self) -> None:
        """Raises BackendError if the engine was closed, RequestError if it is used from within its own callback."""
        self._refuse_reentry()
        if self.is_closed:
            raise BackendError(CLOSED)

    def _refuse_reentry(self) -> None:
        if self._user == threading.get_ident():
            raise RequestError(
                "a progress callback called the engine that runs it. Engine calls are not re-entrant: record what you "
                "need and call again after generate() returns."
            )
