"""The workstation side of edge-tcur: train tCURLoRA adapters and inspect them."""

__version__ = "0.1.0"
