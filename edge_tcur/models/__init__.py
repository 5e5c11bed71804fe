"""Loading a base: Hugging Face directories and hub ids, or any function that returns a module."""

from edge_tcur.models.base import Base, base_digest, load_base

__all__ = ["Base", "base_digest", "load_base"]
