"""What an export does with the result of parity: targets that fail are removed, the rest is recorded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edge_tcur.errors import ExportError
from edge_tcur_export.divergence import Source, find_difference, starts_in_tracing
from edge_tcur_export.parity import (
    INFER,
    LAST,
    TOLERANCES,
    Case,
    Failure,
    Verification,
    has_rank_of,
    verify_bundle,
)
from edge_tcur_export.program_divergence import (
    ProgramSource,
    find_program_difference,
    traces_otherwise,
)
from edge_tcur_runtime.formats.bundle import BASE_PTD, MANIFEST, Manifest, Verified, serialize_manifest
from edge_tcur_runtime.formats.memory import MemoryTables

ADAPTER_PTD = "adapter.ptd"
# Roles of the graphs that make up a target, by the role that is compared.
_ROLES = {role: (role,) for role in ("step", "step_recompute", LAST)} | {
    "train": ("train", "eval", "optimizer", "checkpoint"),
}
_HIDDEN = (
    "no single operator departs once its value is looked at: ONNX Runtime joins operators differently then"
)
_HIDDEN_PROGRAM = (
    "no operator departs in the program lowered again with its values as outputs: the file is at fault, or "
    "ExecuTorch joins operators, or shares their memory, otherwise then"
)
_SURE = 0.05  # of the failing quantity's error: an operator that is off by as much is at fault
_TRACED = "the traced program departs from the model already, before any operator is converted"


@dataclass(frozen=True)
class Outcome:
    """A bundle after parity.

    Attributes:
        manifest: without the targets that failed, and with what was compared.
        errors: target -> quantity -> largest relative error, of those that passed.
        failures: target that was removed -> why, with the first operator that differs.
        skipped: target that cannot be run here -> why.
    """

    manifest: Manifest
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def raise_failures(self, out: Path) -> None:
        """Ends the export where a target was removed; the bundle at `out` is there without it.

        Raises:
            ExportError: what failed, and what the bundle still holds.
        """
        if self.failures:
            raise _error(self.failures, f"the bundle at {out} was written without it and {_kept(self)}")


def settle(
    root: Path,
    manifest: Manifest,
    cases: Sequence[Case],
    sources: Mapping[str, Source | ProgramSource],
    last: Sequence[Case] = (),
    inputs: str | None = None,
) -> Outcome:
    """Compares the bundle at `root` with torch, removes the targets that fail and writes the manifest again.

    Args:
        sources: role of a graph, or name of a program -> what it was converted from.
        last: the cases of the graph in which the last blocks alone learn.
        inputs: what the cases are of, for the manifest (`Verified`).

    Raises:
        ExportError: the inference graph fails, without which there is no bundle.
    """
    found = verify_bundle(root, cases, manifest, last=last)
    failures = {
        target: _explain(
            failure,
            root,
            manifest.graphs.get(target),
            sources.get(target),
            last if target == LAST else cases,
            manifest,
        )
        for target, failure in found.failures.items()
    }
    if INFER in failures:
        raise _error({INFER: failures[INFER]}, "nothing was written: there is no bundle without this graph")
    verified = Verified(found.passed, dict(TOLERANCES), inputs)
    kept = replace(_without(root, manifest, failures), verified=verified)
    return _written(root, kept, found, failures)


def unverified(root: Path, manifest: Manifest) -> Outcome:
    """Records in the manifest that nothing was compared."""
    return _written(root, replace(manifest, verified=Verified((), {})), Verification(), {})


def _written(root: Path, manifest: Manifest, found: Verification, failures: Mapping[str, str]) -> Outcome:
    (root / MANIFEST).write_bytes(serialize_manifest(manifest))
    errors = {target: found.errors[target] for target in found.passed}
    return Outcome(manifest, errors, failures, found.skipped)


def _error(failures: Mapping[str, str], then: str) -> ExportError:
    return ExportError("; ".join(f"{target}: {why}" for target, why in failures.items()), hint=then)


def _kept(outcome: Outcome) -> str:
    return f"holds what agrees with torch: {', '.join(outcome.errors)}"


def _without(root: Path, manifest: Manifest, failed: Mapping[str, str]) -> Manifest:
    """The manifest without the files of the targets in `failed`, which are removed."""
    roles = {role for target in failed for role in _ROLES.get(target, ())}
    names = {manifest.graphs[role] for role in roles if role in manifest.graphs}
    programs = {name: spec for name, spec in manifest.programs.items() if name not in failed}
    names |= {spec.file for name, spec in manifest.programs.items() if name in failed}
    if manifest.programs and not programs:
        names |= {BASE_PTD, ADAPTER_PTD} & set(manifest.files)
    for name in names:
        (root / name).unlink()
    return replace(
        manifest,
        files={name: entry for name, entry in manifest.files.items() if name not in names},
        graphs={role: name for role, name in manifest.graphs.items() if role not in roles},
        programs=programs,
        recomputed_blocks=None if "step_recompute" in roles else manifest.recomputed_blocks,
        last_blocks=None if LAST in roles else manifest.last_blocks,
        memory=_tables_without(manifest.memory, roles),
    )


def _tables_without(tables: MemoryTables | None, roles: Collection[str]) -> MemoryTables | None:
    if tables is None:
        return None
    kept = {role: table for role, table in tables.graphs.items() if role not in roles}
    return replace(tables, graphs=kept) if kept else None


def _explain(
    failure: Failure,
    root: Path,
    graph: str | None,
    source: Source | ProgramSource | None,
    cases: Sequence[Case],
    manifest: Manifest,
) -> str:
    """The failure with the first operator that differs, where there is something to look into."""
    if failure.quantity is None or source is None:
        return failure.message
    allowed = TOLERANCES[failure.quantity]
    tolerances = (allowed, max(allowed, _SURE * min(failure.error, 1.0)))
    program = isinstance(source, ProgramSource)
    for case in cases:
        if (program or graph == manifest.graphs.get("train")) and not has_rank_of(case, manifest):
            continue
        why = _look(source, None if graph is None else root / graph, case, tolerances)
        if why is not None:
            return f"{failure.message}; {why}"
    return f"{failure.message}; {_HIDDEN_PROGRAM if program else _HIDDEN}"


def _look(
    source: Source | ProgramSource, graph: Path | None, case: Case, tolerances: tuple[float, float]
) -> str | None:
    """The operator at which a case departs, or that its traced program does; None where neither is seen."""
    if isinstance(source, ProgramSource):
        found = find_program_difference(source, case.feeds, tolerances)
        traced = found is None and traces_otherwise(source, case.feeds, case.outputs)
    else:
        assert graph is not None
        found = find_difference(graph, source, case.feeds, tolerances)
        traced = found is None and starts_in_tracing(source, case.feeds, case.outputs)
    if found is not None:
        return f"the first operator that differs is {found}"
    return _TRACED if traced else None
