"""Libraries that complain at their import of what is not needed here."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from types import ModuleType


def import_quietly(name: str) -> ModuleType | None:
    """Imports a module without what it says meanwhile; None where it is not installed.

    torchao, which transformers imports where it is installed (it comes with ExecuTorch), warns of missing
    GPU libraries.
    """
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return None
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        logging.disable(disabled)
