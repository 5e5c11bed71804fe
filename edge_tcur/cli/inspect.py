"""`edge-tcur inspect`: what is in an adapter file, a run directory or a bundle. Reads, never changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from edge_tcur_runtime.cli.framework import output_options
from edge_tcur_runtime.doctor import render_compared
from edge_tcur_runtime.errors import BadInputError, ExitCode, IntegrityError
from edge_tcur_runtime.formats.adapter import MAX_FILE_BYTES, Adapter, parse_adapter, read_bounded
from edge_tcur_runtime.formats.bundle import MANIFEST, Bundle, FileEntry, open_bundle, verify_file
from edge_tcur_runtime.formats.digest import digest_bytes
from edge_tcur_runtime.formats.factors import AnyFactors, Factors
from edge_tcur_runtime.output import Sink, table
from edge_tcur_runtime.units import format_size

EPILOG = """\b
Examples:
  edge-tcur inspect run/adapter.safetensors
  edge-tcur inspect run/
  edge-tcur inspect bundle/ --json
"""
RUN_FILE = "run.json"
_SHOWN = 6  # labels and indices in the text; JSON has all of them
_GROUP_HEADER = ("Group", "Slices", "Weight", "Rank", "Trained", "Core norm", "Rows", "Columns")
Description = tuple[dict[str, Any], str]


@click.command("inspect", epilog=EPILOG)
@click.argument("path", type=click.Path(path_type=Path))
@output_options
@click.pass_context
def inspect(context: click.Context, path: Path, sink: Sink) -> None:
    """Show what is in PATH: an adapter file, a run directory or a bundle directory.

    Every digest is checked; where a file of a bundle does not match its own, the exit code is 6.
    """
    if (path / RUN_FILE).is_file():
        payload, human = describe_run(path)
    elif (path / MANIFEST).is_file():
        payload, human = describe_bundle(path)
    elif path.is_dir():
        raise not_ours(path, "an adapter file, ")
    else:
        payload, human = describe_adapter(path)
    sink.result(payload, human)
    if payload.get("damaged"):
        context.exit(ExitCode.INTEGRITY)


def describe_groups(adapter: Adapter) -> list[dict[str, Any]]:
    """The groups of an adapter as JSON values: sizes, indices and the norm of each core."""
    return [
        {
            "name": name,
            "slices": len(spec.parameters),
            "n1": spec.n1,
            "n2": spec.n2,
            "rank": adapter.factors[name].rank,
            "trained_numbers": int(adapter.factors[name].core.size),
            "core_norm": float(np.linalg.norm(adapter.factors[name].core.astype(np.float64))),
            "blocks": adapter.factors[name].blocks,
            **_indices(adapter.factors[name]),
            "parameters": list(spec.parameters),
        }
        for name, spec in adapter.header.groups.items()
    ]


def group_rows(adapter: Adapter) -> str:
    """The groups of an adapter as a table."""
    rows = [
        (
            group["name"],
            str(group["slices"]),
            f"{group['n1']}x{group['n2']}",
            str(group["rank"]),
            f"{group['trained_numbers']:,}",
            f"{group['core_norm']:.3g}",
            _short(group.get("rows")),
            _short(group.get("cols")),
        )
        for group in describe_groups(adapter)
    ]
    return table(_GROUP_HEADER, rows)


def describe_adapter(path: Path) -> Description:
    """An adapter file, verified."""
    raw = read_bounded(path, MAX_FILE_BYTES)
    adapter = parse_adapter(raw, str(path))
    header, digest = adapter.header, digest_bytes(raw)
    payload = {
        "kind": "adapter",
        "path": str(path),
        "bytes": len(raw),
        "digest": digest,
        "base_digest": header.base_digest,
        "task": header.task,
        "labels": list(header.labels),
        "coupling": header.coupling,
        "transform": header.transform,
        "frame": header.frame,
        "groups": describe_groups(adapter),
        "trained_numbers": adapter.trained_numbers,
        "head_numbers": adapter.extra_numbers,
        "extras": {name: list(value.shape) for name, value in adapter.extras.items()},
        "provenance": dict(header.provenance),
    }
    facts = {
        "adapter": f"{path} ({format_size(len(raw))})",
        "digest": digest,
        "base": header.base_digest,
        "task": header.task,
        "labels": _labels(header.labels),
        "method": f"t-product ({header.transform}), coupling {header.coupling}, frame {header.frame}",
        "trained": f"{adapter.trained_numbers:,} numbers, head {adapter.extra_numbers:,}",
        **{f"from {key}": value for key, value in header.provenance.items()},
    }
    return payload, f"{_facts(facts)}\n\n{group_rows(adapter)}"


def not_ours(path: Path, more: str = "") -> BadInputError:
    """The error for a directory that is neither a run nor a bundle; `more` names what else may be given."""
    return BadInputError(
        f"neither a run ({RUN_FILE}) nor a bundle ({MANIFEST})",
        where=str(path),
        hint=f"give {more}a run directory or a bundle directory; if it is one, make or copy it again",
    )


def describe_run(root: Path) -> Description:
    """A run directory with its adapter."""
    from edge_tcur.training.run import open_run

    run = open_run(root)
    content, human = describe_adapter(run.adapter_path)
    metrics = {key: value for key, value in run.metrics.items() if key not in {"losses", "accuracies"}}
    payload = {
        "kind": "run",
        "path": str(root),
        "base_digest": run.base_digest,
        "labels": list(run.labels),
        "config": run.config.to_dict(),
        "preprocessing": run.preprocessing,
        "metrics": metrics,
        "adapter": content,
    }
    facts = {
        "run": str(root),
        **{key: f"{value:,}" for key, value in metrics.items() if isinstance(value, int)},
        **{key: f"{value:.4g}" for key, value in metrics.items() if isinstance(value, float)},
        **{key: str(value) for key, value in run.config.to_dict().items() if value != ""},
    }
    return payload, f"{_facts(facts)}\n\n{human}"


def describe_bundle(root: Path) -> Description:
    """A bundle: its files, and which of them do not match their digests."""
    bundle = open_bundle(root, verify=False)
    damaged = _damaged(bundle)
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files.values())
    groups = {
        name: {"slices": len(group.parameters), "n1": group.n1, "n2": group.n2, "rank": group.rank}
        for name, group in manifest.groups.items()
    }
    payload = {
        "kind": "bundle",
        "path": str(root),
        "base_digest": manifest.base_digest,
        "task": manifest.task,
        "labels": list(manifest.labels),
        "device": manifest.device,
        "precision": manifest.precision,
        "graphs": dict(manifest.graphs),
        "groups": groups,
        "files": {name: {"bytes": item.size, "digest": item.sha256} for name, item in manifest.files.items()},
        "bytes": size,
        "digests_match": not damaged,
        "damaged": damaged,
        "opset": manifest.opset,
        "ir_version": manifest.ir_version,
        "versions": dict(manifest.versions),
        "verified": None if manifest.verified is None else asdict(manifest.verified),
    }
    compared = None if manifest.verified is None else manifest.verified.targets
    facts = {
        "bundle": f"{root} ({format_size(size)})",
        "base": f"{manifest.base_digest}, stored as {manifest.precision}",
        "task": manifest.task,
        "labels": _labels(manifest.labels),
        "device": manifest.device or "any",
        "graphs": ", ".join(f"{role}: {name}" for role, name in manifest.graphs.items()),
        "format": f"opset {manifest.opset}, IR {manifest.ir_version}",
        "compared": render_compared(compared),
        "digests": "all match" if not damaged else f"{len(damaged)} files do not match",
    }
    return payload, "\n\n".join([_facts(facts), _bundle_groups(groups), _bundle_files(bundle, damaged)])


def _damaged(bundle: Bundle) -> dict[str, str]:
    """File name -> what is wrong with it."""
    faults = {name: _fault(bundle.path(name), entry) for name, entry in bundle.manifest.files.items()}
    return {name: fault for name, fault in faults.items() if fault is not None}


def _fault(path: Path, entry: FileEntry) -> str | None:
    try:
        verify_file(path, entry)
    except IntegrityError as error:
        return error.message
    return None


def _bundle_groups(groups: Mapping[str, Mapping[str, int]]) -> str:
    rows = [(name, str(g["slices"]), f"{g['n1']}x{g['n2']}", str(g["rank"])) for name, g in groups.items()]
    return table(("Group", "Slices", "Weight", "Rank"), rows)


def _bundle_files(bundle: Bundle, damaged: Mapping[str, str]) -> str:
    rows = [
        (name, format_size(entry.size), damaged.get(name, "as listed"))
        for name, entry in sorted(bundle.manifest.files.items())
    ]
    return table(("File", "Size", "Digest"), rows)


def _facts(facts: Mapping[str, str]) -> str:
    width = max(len(key) for key in facts)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in facts.items())


def _indices(factors: AnyFactors) -> dict[str, list[list[int]]]:
    """Rows and columns of every block; a sketch has none."""
    if not isinstance(factors, Factors):
        return {}
    return {"rows": factors.rows.tolist(), "cols": factors.cols.tolist()}


def _short(blocks: Sequence[Sequence[int]] | None) -> str:
    """The indices of the first block, and how many blocks there are besides."""
    if blocks is None:
        return "sketch"
    more = f" (+{len(blocks) - 1})" if len(blocks) > 1 else ""
    return _shortened(blocks[0]) + more


def _shortened(indices: Sequence[int]) -> str:
    if len(indices) <= _SHOWN:
        return " ".join(map(str, indices))
    return f"{' '.join(map(str, indices[: _SHOWN - 1]))} .. {indices[-1]}"


def _labels(labels: Sequence[str]) -> str:
    more = f", ... ({len(labels)})" if len(labels) > _SHOWN else ""
    return ", ".join(labels[:_SHOWN]) + more
