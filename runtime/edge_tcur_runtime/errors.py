"""Every error that a user can see, grouped by who must act, and the exit code of each group.

This is a leaf module: it imports nothing of the project. The workstation's errors
(`edge_tcur.errors`) are subclasses of these, so one table maps both tools' errors to exit codes.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes of `edge-tcur` and `edge-tcur-device` (documented in docs/errors.md)."""

    DONE = 0
    DEFECT = 1
    USAGE = 2
    BAD_INPUT = 3
    INCOMPATIBLE = 4
    BUDGET = 5
    INTEGRITY = 6
    DISK = 7
    NETWORK = 8
    PAUSED = 9


class EdgeError(Exception):
    """Base of every error meant for a user.

    Args:
        message: what was wrong, with expected and actual values.
        where: the file, line or field concerned, e.g. ``"train.csv:17"``.
        hint: what the user can do next.

    Attributes:
        code: stable machine-readable identifier of the error class.
        exit_code: the process exit code of the group.
    """

    code = "error"
    exit_code = ExitCode.DEFECT

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message

    def to_dict(self) -> dict[str, object]:
        """The error as the JSON object printed under the key ``error``."""
        return {
            "code": self.code,
            "exit_code": int(self.exit_code),
            "message": self.message,
            "where": self.where,
            "hint": self.hint,
        }


class UsageError(EdgeError):
    """Options that contradict each other or name something that does not exist."""

    code = "usage"
    exit_code = ExitCode.USAGE


class BadInputError(EdgeError):
    """Data, configuration or a file that cannot be used as it is."""

    code = "bad-input"
    exit_code = ExitCode.BAD_INPUT


class DataError(BadInputError):
    """A data set that is missing, empty, malformed or has unknown labels."""

    code = "bad-data"


class ConfigError(BadInputError):
    """A configuration value or key that is not valid."""

    code = "bad-config"


class FileFormatError(BadInputError):
    """A file that does not follow its format."""

    code = "bad-format"


class OutputExistsError(BadInputError):
    """An output path that is already there and would be overwritten."""

    code = "output-exists"


class IncompatibleError(EdgeError):
    """Two valid things that do not fit together (adapter and base, file and version)."""

    code = "incompatible"
    exit_code = ExitCode.INCOMPATIBLE


class BaseMismatchError(IncompatibleError):
    """An adapter made for another base."""

    code = "base-mismatch"


class FormatVersionError(IncompatibleError):
    """A file written by a newer version of the tools."""

    code = "format-version"


class MissingEngineError(IncompatibleError):
    """The library that a feature needs is not installed here."""

    code = "missing-engine"


class HealthCheckError(IncompatibleError):
    """A published adapter that does not work on this device; the one before it stays in use."""

    code = "health-check"


class BudgetError(EdgeError):
    """The memory budget cannot be met, or was exceeded and the run stopped."""

    code = "budget"
    exit_code = ExitCode.BUDGET


class IntegrityError(EdgeError):
    """A file whose content is not what its digest or signature promises."""

    code = "integrity"
    exit_code = ExitCode.INTEGRITY


class TrustError(IntegrityError):
    """What a server sent is not signed by the keys that this device trusts, is old, or was altered."""

    code = "trust"


class DiskError(EdgeError):
    """The disk is full, read-only or failing."""

    code = "disk"
    exit_code = ExitCode.DISK


class NetworkError(EdgeError):
    """A server could not be reached or broke off."""

    code = "network"
    exit_code = ExitCode.NETWORK


class PausedError(EdgeError):
    """Work that stopped in good order before its end; the same command goes on with it."""

    code = "paused"
    exit_code = ExitCode.PAUSED
