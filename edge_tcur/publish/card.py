"""The model card of a published adapter: what it is, in words, from signed facts only."""

from __future__ import annotations

from edge_tcur.publish.facts import Description, Sources
from edge_tcur_runtime.formats.adapter import Adapter
from edge_tcur_runtime.formats.offer import AdapterFacts
from edge_tcur_runtime.units import format_size

_LABELS_SHOWN = 20
_OPTIONS = ("base", "data", "task", "rank", "epochs", "seed")  # of `edge-tcur train`, for the card


def render_card(adapter: Adapter, facts: AdapterFacts, said: Description, sources: Sources, size: int) -> str:
    """The card as Markdown; it tells no path of the publisher's machine.

    Args:
        size: bytes of the adapter file.
    """
    header = adapter.header
    labels = ", ".join(header.labels[:_LABELS_SHOWN])
    if len(header.labels) > _LABELS_SHOWN:
        labels += f", ... ({len(header.labels)} in all)"
    rows = {
        "task": header.task,
        "labels": labels,
        "base": f"`{header.base_digest}`",
        "tokenizer": f"`{facts.base.tokenizer}`" if facts.base.tokenizer else "none",
        "method": f"tCURLoRA: rank {facts.rank}, coupling {header.coupling}, transform {header.transform}, "
        f"frame {header.frame}",
        "trained numbers": f"{adapter.trained_numbers:,} in cores, {adapter.extra_numbers:,} in the head",
        "size": format_size(size),
        "adapter format": str(facts.format_version),
        "edge-tcur-runtime": f"{facts.runtime} or newer",
        "channel, rollout": f"{facts.channel}, {facts.rollout / 100:g} % when it was published",
    }
    lines = [
        f"# {facts.name}, version {facts.version}",
        "",
        "An adapter for one exact base: it changes what the base answers and works with no other one.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {key} | {_cell(value)} |" for key, value in rows.items()),
        "",
        "## Data",
        "",
        said.data or "The publisher gave no description of the data.",
        "",
        "## Metrics",
        "",
        *(f"- {key}: {value}" for key, value in facts.metrics.items()),
        *([] if facts.metrics else ["None were given."]),
        "",
        "As the publisher measured them; a device checks only that the adapter answers as it should.",
        "",
        "## How it was made",
        "",
        *_made(adapter, sources),
        "",
        *(["## Note", "", said.note, ""] if said.note else []),
    ]
    return "\n".join(lines)


def _made(adapter: Adapter, sources: Sources) -> list[str]:
    lines = [f"- {key}: {value}" for key, value in sorted(adapter.header.provenance.items())]
    if sources.run is not None:
        config = sources.run.config
        options = {name: config[name] for name in _OPTIONS if config.get(name) is not None}
        for name in ("base", "data"):  # the last part of a path, not where it lies on this machine
            if name in options:
                options[name] = str(options[name]).rstrip("/").rpartition("/")[2]
        command = " ".join(f"--{name} {value}" for name, value in options.items())
        lines.append(f"- command: `edge-tcur train {command}`")
    return lines or ["Unknown."]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
