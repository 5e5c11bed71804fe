"""Errors of the workstation; the groups and exit codes are `edge_tcur_runtime.errors`'."""

from __future__ import annotations

from edge_tcur_runtime.errors import BadInputError, IncompatibleError


class BaseModelError(BadInputError):
    """A base model that cannot be loaded or used."""

    code = "bad-base"


class RunDirectoryError(BadInputError):
    """A run directory that is incomplete or was written by another version."""

    code = "bad-run"


class ComparisonError(BadInputError):
    """Runs of a comparison that failed; the others are recorded."""

    code = "comparison"


class ExportError(IncompatibleError):
    """A model that cannot be exported, or an exported graph that does not agree with torch."""

    code = "export"
