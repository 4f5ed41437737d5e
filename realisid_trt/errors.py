"""Every exception that a user can meet.

Each message says what happened, what was expected and what to do. Our own mistakes are asserts and raise none of these.
The command line prints the message without a traceback and exits with the class's `exit_status`.
"""

from __future__ import annotations


class RealisIDError(Exception):
    """The base class: `except RealisIDError` catches every error that a caller can fix.

    request: number of the failed request in a batch of several, from 1; else None.
    """

    exit_status = 1
    request: int | None = None

    def __str__(self) -> str:
        text = self._text()
        return text if self.request is None else f"request {self.request}: {text}"

    def _text(self) -> str:
        return super().__str__()


class RequestError(RealisIDError, ValueError):
    """An argument of a call or a flag of a command is wrong."""

    exit_status = 2


class PhotoError(RealisIDError, ValueError):
    """A reference photo that cannot be used.

    code: stable word for programs ("no_face", "many_faces", "corrupt", …); the text is for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)  # both, so that it can be copied and sent to another process
        self.code = code

    def _text(self) -> str:
        return str(self.args[1])


class BoxError(RequestError):
    """A face box that cannot be used."""


class ShapeError(RequestError):
    """An array, a batch or a picture size that the engine was not built for."""


class CheckpointError(RealisIDError):
    """A checkpoint folder that is incomplete or contradictory, or has surplus content or a refused format."""


class EngineError(RealisIDError):
    """An engine directory that cannot be used. Its subclasses say why."""


class EngineMissing(EngineError):
    """The engine directory does not exist, or holds no build for the requested backend."""


class EngineDamaged(EngineError):
    """A file of the engine directory is missing or altered, or its manifest was edited."""


class EngineMismatch(EngineError):
    """The engine was built for another format, version, architecture or machine."""


class BackendError(RealisIDError):
    """A backend is not installed, or failed while it ran."""


class NumericsError(RealisIDError):
    """NaN or infinity where a number was expected."""


class BuildError(RealisIDError):
    """A step of the build failed; the engine that was there before is untouched."""


class ParityError(BuildError):
    """An exported network does not compute what the torch module computes."""


class DiskError(RealisIDError):
    """Not enough free disk space, or the disk refused a write; what was there before is untouched."""


class RealisIDWarning(UserWarning):
    """Reports behaviour that the caller may not expect, such as a prompt that was cut off."""
