"""Which operators have a kernel in an execution provider of ONNX Runtime; the others run on the CPU.

Each table says where it comes from. A table holds names, not the conditions that a provider puts on shapes
and attributes: what is missing from a table has no kernel, what is in it may still be refused at load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from edge_tcur_runtime.errors import UsageError

# Listed by onnxruntime 1.32.0 itself (get_all_opkernel_def), kernels for opset 20.
_CPU = frozenset({
    "Abs", "Acos", "Acosh", "Add", "Affine", "AffineGrid", "And", "ArgMax", "ArgMin", "Asin", "Asinh",
    "Atan", "Atanh", "AveragePool", "BatchNormalization", "BitShift", "BitwiseAnd", "BitwiseNot",
    "BitwiseOr", "BitwiseXor", "BlackmanWindow", "Cast", "Ceil", "Celu", "Clip", "Col2Im", "Compress",
    "Concat", "ConcatFromSequence", "ConstantOfShape", "Conv", "ConvInteger", "ConvTranspose", "Cos",
    "Cosh", "Crop", "CumSum", "DFT", "DeformConv", "DepthToSpace", "DequantizeLinear", "Det", "Div",
    "Dropout", "DynamicQuantizeLinear", "DynamicSlice", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand",
    "EyeLike", "Flatten", "Floor", "GRU", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm",
    "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample",
    "HammingWindow", "HannWindow", "HardSigmoid", "Hardmax", "Identity", "If", "ImageScaler",
    "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM", "LayerNormalization", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "LogSoftmax", "Loop", "LpNormalization", "LpPool", "MatMul", "MatMulInteger",
    "Max", "MaxPool", "MaxRoiPool", "MaxUnpool", "Mean", "MeanVarianceNormalization", "MelWeightMatrix",
    "MemcpyFromHost", "MemcpyToHost", "Min", "Mod", "Mul", "Multinomial", "Neg", "NonMaxSuppression",
    "NonZero", "Not", "OneHot", "Optional", "OptionalGetElement", "OptionalHasElement", "Or", "PRelu",
    "Pad", "ParametricSoftplus", "Pow", "QLinearConv", "QLinearMatMul", "QuantizeLinear", "RNN",
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range", "Reciprocal",
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare", "RegexFullMatch", "Relu", "Reshape", "Resize",
    "ReverseSequence", "RoiAlign", "Round", "STFT", "Scale", "ScaledTanh", "Scan", "ScatterElements",
    "ScatterND", "Selu", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
    "SequenceInsert", "SequenceLength", "Shape", "Shrink", "Sigmoid", "Sign",
    "SimplifiedLayerNormalization", "Sin", "Sinh", "Size", "Slice", "Softmax", "Softplus", "Softsign",
    "SpaceToDepth", "Split", "SplitToSequence", "Sqrt", "Squeeze", "StringConcat", "StringNormalizer",
    "StringSplit", "Sub", "Sum", "Tan", "Tanh", "TfIdfVectorizer", "ThresholdedRelu", "Tile", "TopK",
    "Transpose", "Trilu", "Unique", "Unsqueeze", "Where", "Xor"
})  # fmt: skip
# Measured: onnxruntime-webgpu 1.27.0 places a graph of this one node (opset 20, float32 or bool) on the GPU;
# BatchNormalization and Resize from the provider's source.
_WEBGPU = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh",
    "BatchNormalization", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Conv", "ConvTranspose", "Cos",
    "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Einsum", "Elu", "Equal", "Erf", "Exp",
    "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm",
    "GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish",
    "Identity", "InstanceNormalization", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log",
    "LpNormalization", "MatMul", "MaxPool", "Mish", "Mul", "Neg", "Not", "Pad", "Pow", "Range",
    "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize",
    "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sin", "Sinh", "Slice", "Softmax", "Softplus",
    "Split", "Sqrt", "Squeeze", "Sub", "Tan", "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose",
    "Unsqueeze", "Where"
})  # fmt: skip
_XNNPACK = frozenset({
    "AveragePool", "Conv", "ConvTranspose", "Gemm", "MatMul", "MaxPool", "QLinearConv", "Resize", "Softmax"
})  # fmt: skip
_COREML = frozenset({
    "Add", "AveragePool", "Cast", "Clip", "Concat", "Conv", "ConvTranspose", "DepthToSpace", "Div", "Erf",
    "Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "GridSample", "GroupNormalization",
    "InstanceNormalization", "LayerNormalization", "LeakyRelu", "MatMul", "Max", "MaxPool", "Mul", "PRelu",
    "Pow", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Resize", "Round",
    "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose",
    "Unsqueeze"
})  # fmt: skip
_NNAPI = frozenset({
    "Abs", "Add", "AveragePool", "Cast", "Clip", "Concat", "Conv", "DequantizeLinear", "Div", "Elu", "Exp",
    "Flatten", "Floor", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "Identity", "Log", "MatMul", "Max",
    "MaxPool", "Min", "Mul", "Neg", "Pow", "QLinearConv", "QLinearMatMul", "QuantizeLinear", "Relu",
    "Reshape", "Resize", "Sigmoid", "Sin", "Slice", "Softmax", "Sqrt", "Squeeze", "Sub", "Tanh", "Transpose"
})  # fmt: skip
_QNN = frozenset({
    "Abs", "Add", "And", "ArgMax", "ArgMin", "Asin", "Atan", "AveragePool", "BatchNormalization", "Cast",
    "Ceil", "Clip", "Concat", "Conv", "ConvTranspose", "Cos", "CumSum", "DepthToSpace", "DequantizeLinear",
    "Div", "Einsum", "Elu", "Equal", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements",
    "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "Greater", "GreaterOrEqual",
    "GridSample", "HardSigmoid", "HardSwish", "InstanceNormalization", "Inverse", "LRN", "LSTM",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "LpNormalization",
    "MatMul", "Max", "MaxPool", "Mean", "Min", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pad", "Pow",
    "QuantizeLinear", "RandomUniformLike", "Reciprocal", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "Relu", "Reshape", "Resize", "Round", "STFT", "ScatterElements", "ScatterND",
    "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum",
    "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Unsqueeze", "Upsample", "Where"
})  # fmt: skip
# docs/OperatorKernels.md of onnxruntime (1.26's development, made from the registered kernels): those for
# float32 (or bool) at opset 20.
_CUDA = frozenset({
    "Abs", "Add", "Affine", "And", "ArgMax", "ArgMin", "AveragePool", "BatchNormalization", "Cast",
    "Ceil", "Clip", "Compress", "Concat", "ConcatFromSequence", "ConstantOfShape", "Conv",
    "ConvTranspose", "Cos", "Crop", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Dropout",
    "DynamicSlice", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor",
    "GRU", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool",
    "Greater", "GreaterOrEqual", "GridSample", "HardSigmoid", "HardSwish", "Identity", "If",
    "ImageScaler", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM", "LayerNormalization",
    "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "Loop", "MatMul", "MatMulInteger", "Max",
    "MaxPool", "MemcpyFromHost", "MemcpyToHost", "Min", "Mod", "Mul", "Neg", "NonZero", "Not", "OneHot",
    "Or", "PRelu", "Pad", "ParametricSoftplus", "Pow", "QuantizeLinear", "RNN", "RandomNormal",
    "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range", "Reciprocal", "ReduceL1",
    "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "ReverseSequence", "RoiAlign", "Round",
    "ScaledTanh", "Scan", "ScatterElements", "ScatterND", "Selu", "SequenceAt", "SequenceConstruct",
    "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "Shape", "Shrink", "Sigmoid",
    "Sign", "SimplifiedLayerNormalization", "Sin", "Size", "Slice", "Softmax", "Softplus", "Softsign",
    "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Tile", "TopK",
    "Transpose", "Trilu", "Unsqueeze", "Where", "Xor"
})  # fmt: skip
# docs/operators.md of onnx-tensorrt for TensorRT 10.0: what its parser takes.
_TENSORRT = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh",
    "AveragePool", "BatchNormalization", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "Cosh", "CumSum", "DeformConv", "DepthToSpace",
    "DequantizeLinear", "Div", "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike",
    "Flatten", "Floor", "GRU", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm",
    "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample",
    "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax", "Identity", "If", "ImageScaler",
    "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM", "LayerNormalization", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "LogSoftmax", "Loop", "LpNormalization", "LpPool", "MatMul", "Max", "MaxPool",
    "Mean", "MeanVarianceNormalization", "Min", "Mish", "Mod", "Mul", "Neg", "NonMaxSuppression",
    "NonZero", "Not", "OneHot", "Or", "PRelu", "Pad", "ParametricSoftplus", "Pow", "QuantizeLinear",
    "RNN", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range",
    "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize",
    "ReverseSequence", "RoiAlign", "Round", "ScaledTanh", "Scan", "Scatter", "ScatterElements",
    "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Size", "Slice", "Softmax",
    "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tan", "Tanh",
    "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Upsample", "Where", "Xor"
})  # fmt: skip
# Measured: python tests/benchmarks/provider_kernels.py OpenVINO, onnxruntime-openvino 1.24.1.
_OPENVINO = frozenset({
    "Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh",
    "AveragePool", "BatchNormalization", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Compress", "Concat",
    "Conv", "ConvTranspose", "Cos", "Cosh", "DepthToSpace", "DequantizeLinear", "Div", "Dropout",
    "DynamicQuantizeLinear", "Elu", "Erf", "Exp", "Expand", "Flatten", "Floor", "GRU", "Gather",
    "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "Greater", "GreaterOrEqual",
    "GridSample", "HardSigmoid", "HardSwish", "Identity", "If", "InstanceNormalization", "LRN", "LSTM",
    "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "LpNormalization",
    "MatMul", "Max", "MaxPool", "Mean", "MeanVarianceNormalization", "Min", "Mod", "Mul", "Neg",
    "NonMaxSuppression", "NonZero", "Not", "Or", "PRelu", "Pad", "Pow", "QuantizeLinear", "RNN",
    "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "ReverseSequence",
    "RoiAlign", "Round", "Scatter", "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid",
    "Sign", "Sin", "Sinh", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt",
    "Squeeze", "Sub", "Sum", "Tan", "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Unsqueeze",
    "Where", "Xor"
})  # fmt: skip
_DOCS = "onnxruntime.ai/docs/execution-providers"


@dataclass(frozen=True)
class Provider:
    """What is known of a provider.

    Attributes:
        operators: of ONNX's own domain that have a kernel.
        source: where the table comes from.
        integers: whether 64-bit integers (sizes and indices) have kernels.
    """

    operators: frozenset[str]
    source: str
    integers: bool


PROVIDERS = {
    "cpu": Provider(_CPU, "onnxruntime 1.32.0, get_all_opkernel_def", True),
    "cuda": Provider(_CUDA, "onnxruntime, docs/OperatorKernels.md at 001d12d, opset 20", True),
    "tensorrt": Provider(_TENSORRT, "onnx-tensorrt, docs/operators.md for TensorRT 10.0", True),
    "openvino": Provider(_OPENVINO, "onnxruntime-openvino 1.24.1, measured", True),
    "webgpu": Provider(_WEBGPU, "onnxruntime-webgpu 1.27.0, measured", False),
    "xnnpack": Provider(_XNNPACK, f"{_DOCS}/Xnnpack-ExecutionProvider, operators as of 1.14", False),
    "coreml": Provider(_COREML, f"{_DOCS}/CoreML-ExecutionProvider, ML Program", False),
    "nnapi": Provider(_NNAPI, f"{_DOCS}/NNAPI-ExecutionProvider", False),
    "qnn": Provider(_QNN, f"{_DOCS}/QNN-ExecutionProvider", False),
}


@dataclass(frozen=True)
class Unsupported:
    """A node without a kernel in a provider.

    Attributes:
        operator: its type, with the domain where that is not ONNX's own.
        node: its name in the graph.
        module: name of the torch module that it came from, where known.
        integer: whether it works on 64-bit integers alone: sizes and indices, a few bytes.
    """

    operator: str
    node: str
    module: str | None
    integer: bool


def find_provider(name: str) -> Provider:
    """The provider of that name.

    Raises:
        UsageError: there is no table for it.
    """
    if name not in PROVIDERS:
        raise UsageError(
            f"no table of operators for the provider {name!r}", hint=f"known: {', '.join(PROVIDERS)}"
        )
    return PROVIDERS[name]


def find_unsupported(
    model: onnx.ModelProto, provider: Provider, modules: Mapping[str, str] | None = None
) -> list[Unsupported]:
    """Nodes of a graph without a kernel in `provider`, in graph order.

    Args:
        model: with the types of its values.
        modules: value name -> name of the torch module, where known.
    """
    graph = model.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    found = []
    for node in graph.node:
        integer = _data_type(node, kinds) == onnx.TensorProto.INT64
        own = node.domain in ("", "ai.onnx")
        if own and node.op_type in provider.operators and (provider.integers or not integer):
            continue
        name = node.op_type if own else f"{node.domain}.{node.op_type}"
        module = (modules or {}).get(node.output[0])
        found.append(Unsupported(name, node.name, module, integer))
    return found


def _data_type(node: onnx.NodeProto, kinds: Mapping[str, int]) -> int:
    """The element type that a kernel is chosen by: of the first input that is no condition."""
    names = [name for name in node.input if name][1 if node.op_type == "Where" else 0 :]
    return kinds.get(names[0], 0) if names else 0
