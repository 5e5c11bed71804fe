"""The embedded default: from nothing to a personalised adapter on a torch-free device, on real digits."""

from edge_tcur.quickstart.run import QuickstartResult, quickstart

__all__ = ["QuickstartResult", "quickstart"]
