"""The error tree. Every error that a user can cause says what happened and what to do about it."""

from __future__ import annotations

import errno

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # or what its user may have of it


class SparqleError(Exception):
    """Base of all errors that a user can cause.

    `message` says what happened in one line, `hint` the way out, `code` names it on the wire.
    """

    code = "error"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class ConfigError(SparqleError):
    """An option has a value that cannot work."""

    code = "invalid_option"


class AudioFormatError(SparqleError):
    """Bytes that are not the audio they were declared to be, or a file without audio."""

    code = "invalid_audio"


class DeviceError(SparqleError):
    """No microphone, PortAudio missing, device busy; or a CUDA device that is not there."""

    code = "device"


class ModelError(SparqleError):
    """Weights that are missing, damaged or of the wrong shape."""

    code = "model"


class BusyError(SparqleError):
    """All slots of the engine are taken."""

    code = "busy"


class StepError(SparqleError):
    """A step that several streams shared failed, and nobody can tell through which of them."""

    code = "internal"


class BacklogError(SparqleError):
    """A stream sent audio faster than it can be captioned, past the agreed backlog."""

    code = "backlog"


class ProtocolError(SparqleError):
    """A client's message does not fit the protocol."""

    code = "invalid_message"


class MissingExtraError(SparqleError):
    """A feature needs a package that is not installed."""

    code = "missing_extra"
