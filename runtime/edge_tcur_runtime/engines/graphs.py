"""Which of a bundle's graphs a personalisation runs: the plain step, or one of its variants."""

from __future__ import annotations

from edge_tcur_runtime.engines.engine import require_graph
from edge_tcur_runtime.errors import ConfigError
from edge_tcur_runtime.formats.bundle import Bundle
from edge_tcur_runtime.settings import PersonalizeSettings

LAST = "step_last"  # role of the graph in which the last blocks alone learn
_STEP = "ort-step"


def engine_for(settings: PersonalizeSettings) -> str:
    """The engine that the settings ask for; variants of the step graph have one engine.

    Raises:
        ConfigError: they ask for a variant and for another engine.
    """
    asked = {
        "--last-blocks": settings.last_blocks,
        "--recompute on": settings.recompute == "on",
        "--allow-last-blocks": settings.allow_last_blocks,
    }
    variant = next((name for name, given in asked.items() if given), None)
    if variant is None or (variant == "--allow-last-blocks" and settings.engine == "auto"):
        return settings.engine
    if settings.engine not in ("auto", _STEP):
        raise ConfigError(
            f"{variant} is of the step graph; {settings.engine} has no such graph",
            where="engine",
            hint=f"use --engine {_STEP}, or leave {variant} out",
        )
    return _STEP


def graph_to_try(engine: str, bundle: Bundle, settings: PersonalizeSettings) -> str:
    """Role of the graph to begin with.

    With ``recompute`` at ``auto`` and a budget that is the one that recomputes, where the bundle has it: a
    peak that was crossed cannot be taken back, so the cheaper graph is measured first (`keeps_within`).

    Raises:
        IncompatibleError: the bundle was exported without the graph that is asked for.
    """
    if engine != _STEP:
        return "train"
    role = "step"
    if settings.last_blocks:
        role = LAST
    elif settings.recompute == "on" or _may_be_needed(bundle, settings):
        role = "step_recompute"
    require_graph(bundle, role, engine)
    return role


def _may_be_needed(bundle: Bundle, settings: PersonalizeSettings) -> bool:
    limited = settings.recompute == "auto" and settings.budget is not None
    return limited and bundle.graph("step_recompute") is not None


def keeps_within(limit: int, peak_two: int, growth: int, blocks: int) -> bool:
    """Whether steps of the plain graph of one and two samples surely fit, from those that recompute.

    The plain step keeps what each block computes; one that recomputes holds that of one block at a time. So a
    sample takes at most as many times more memory as there are blocks.

    Args:
        limit: bytes.
        peak_two: peak resident bytes after a recomputing step of two samples.
        growth: bytes that the second sample added.
        blocks: how many blocks are computed again.
    """
    return peak_two + 2 * blocks * growth <= limit
