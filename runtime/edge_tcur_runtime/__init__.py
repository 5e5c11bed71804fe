"""Torch-free device runtime of edge-tcur: predict, personalise and swap tCURLoRA adapters.

Importing the package is cheap: ONNX Runtime, numpy and safetensors are loaded by the modules
that use them.
"""

__version__ = "0.1.0"
