"""torch -> bundle: inference graph, step graph, ONNX Runtime Training artifacts, parity."""
