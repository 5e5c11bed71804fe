"""A language model's head and its loss in pieces of the vocabulary.

The outputs of a language model are its largest tensor: 256 tokens over 151,936 words are 148 MiB, and a
step holds three of them (outputs, log-probabilities, gradient). Its head, where it is the table of words that
the model begins with, is 519 MiB in float32 once it is dequantised. Neither is needed whole: the loss wants
the logarithm of a sum over words, its gradient with respect to the hidden states a weighted mean of the
table's rows, and both can be gathered piece by piece with a running maximum (Milakov and Gimelshein, *Online
normalizer calculation for softmax*, arXiv 1805.02867; for language models Wijmans et al., *Cut Your Losses in
Large-Vocabulary Language Models*, arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edge_tcur_export.recompute import Gate
from edge_tcur_runtime.tasks import IGNORED

PIECE_BYTES = 16 * 2**20  # of a head in float32 that a bundle's graphs hold at a time
_FLOAT, _INT = ir.DataType.FLOAT, ir.DataType.INT64


@dataclass
class _Head:
    """The product that gives the outputs.

    Attributes:
        table: the weight, f32 [words, features], as an embedding has it.
        hidden: what it is multiplied with, f32 [..., features].
        product: the node.
        gradients: products of the outputs' gradient and the table.
    """

    table: ir.Value
    hidden: ir.Value
    product: ir.Node
    gradients: list[ir.Node] = field(default_factory=list)

    @property
    def words(self) -> int:
        """Rows of the table."""
        return _sizes(self.table)[0]

    def pieces(self, piece_bytes: int) -> list[tuple[int, int]]:
        """First and last word (exclusive) of each piece; of a head that is small enough, one."""
        words, features = _sizes(self.table)
        rows = max(1, piece_bytes // (4 * features))
        return [(start, min(start + rows, words)) for start in range(0, words, rows)]


def write_token_loss(model: ir.Model, targets: str, piece_bytes: int) -> bool:
    """Writes loss, metric and the gradient of the hidden states of a step graph in pieces of the vocabulary,
    each computed when the one before it is done. The graph has no output ``logits`` then.

    Args:
        model: a step graph of `edge_tcur.tasks.task.CausalLm`, changed in place.
        targets: name of the input that holds the tokens, int64 [batch, sequence].
        piece_bytes: of the head in float32, at a time.

    Returns:
        False, and nothing changed, where the head is no table of words that the model begins with as well, is
        read in another way too, or is no larger than a piece.
    """
    head = _find_head(model.graph)
    if head is None or len(head.gradients) != 1 or len(_shape(head.hidden) or ()) != 2:
        return False
    pieces = head.pieces(piece_bytes)
    if len(pieces) < 2:
        return False
    writer = _Writer(model.graph)
    labels = next(value for value in model.graph.inputs if value.name == targets)
    loss, metric, gradient = _token_loss(writer, head, labels, pieces)
    # Before the first reader of the gradient; what the nodes read stands before the outputs' product.
    model.graph.insert_after(head.product, writer.nodes)
    head.gradients[0].outputs[0].replace_all_uses_with(gradient)
    found = {"loss": loss, "metric": metric}
    kept = [found.get(str(value.name), value) for value in model.graph.outputs if value.name != "logits"]
    for value in model.graph.outputs:
        if value.name in found:
            new, name = found[value.name], value.name
            new.type, new.shape = value.type, value.shape
            value.name, new.name = f"{name}.whole", name
    del model.graph.outputs[:]
    model.graph.outputs.extend(kept)
    common.RemoveUnusedNodesPass()(model)
    return True


def split_head(model: ir.Model, piece_bytes: int) -> bool:
    """Lets an inference graph multiply with one piece of the head after the other.

    Returns:
        False, and nothing changed, where there is nothing to split; see `write_token_loss`.
    """
    head = _find_head(model.graph)
    if head is None or head.gradients:
        return False
    pieces = head.pieces(piece_bytes)
    if len(pieces) < 2:
        return False
    writer, outputs = _Writer(model.graph), list[ir.Value]()
    before = (_shape(head.hidden) or ())[:-1]
    for piece in pieces:
        rows = writer.rows(head.table, piece, outputs[-1:] or [head.hidden])
        turned = writer("Transpose", [rows], perm=(1, 0), shape=(*_sizes(rows)[::-1],))
        outputs.append(writer("MatMul", [head.hidden, turned], shape=(*before, piece[1] - piece[0])))
    old = head.product.outputs[0]
    whole = writer("Concat", outputs, axis=-1)
    whole.shape, whole.type = old.shape, old.type
    model.graph.insert_after(head.product, writer.nodes)
    name, old.name = old.name, f"{old.name}.whole"
    whole.name = name
    old.replace_all_uses_with(whole, replace_graph_outputs=True)
    common.RemoveUnusedNodesPass()(model)
    return True


def _find_head(graph: ir.Graph) -> _Head | None:
    """The head, where nothing but lookups and its own products read it."""
    value = next((value for value in graph.outputs if value.name == "logits"), None)
    node = None if value is None else value.producer()
    while node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    turn = node.inputs[1].producer()
    table = turn.inputs[0] if turn is not None and turn.op_type == "Transpose" else None
    if table is None or table.name not in graph.initializers or len(_shape(table) or ()) != 2:
        return None
    head = _Head(table, node.inputs[0], node)
    looked_up, waiting = False, [(table, False)]
    while waiting:
        value, turned = waiting.pop()
        for reader, place in value.uses():
            if reader.op_type == "Transpose":
                waiting.append((reader.outputs[0], not turned))
            elif reader.op_type == "Gather" and place == 0 and not turned:
                looked_up = True
            elif reader.op_type == "MatMul" and place == 1 and not turned:
                head.gradients.append(reader)
            elif reader is not node:
                return None
    return head if looked_up else None


def _token_loss(
    writer: _Writer, head: _Head, labels: ir.Value, pieces: list[tuple[int, int]]
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Loss, metric and gradient with respect to the hidden states."""
    tokens = (_shape(head.hidden) or (None,))[0]
    column, features = (tokens, 1), _sizes(head.table)[1]
    following = _following(writer, labels, column)
    ignored = writer(
        "Equal", [following, writer.constant(np.int64(IGNORED))], dtype=ir.DataType.BOOL, shape=column
    )
    known = writer("Not", [ignored], dtype=ir.DataType.BOOL, shape=column)
    state = _Running(writer, head)
    for piece in pieces:
        state.take(piece)
    weight = writer("Cast", [known], to=int(_FLOAT), shape=column)
    count_known = writer("ReduceSum", [weight], keepdims=0, shape=())
    share = writer("Max", [count_known, writer.constant(np.float32(1))], shape=())
    # The rows of the true tokens; an ignored one reads the first row, and counts nothing.
    index = writer("Where", [known, following, writer.constant(np.int64(0))], dtype=_INT, shape=column)
    flat = writer("Reshape", [index, writer.constant(np.array([-1]))], dtype=_INT, shape=(tokens,))
    rows = writer("Gather", [head.table, flat], axis=0, shape=(tokens, features))
    own = writer("Mul", [head.hidden, rows], shape=(tokens, features))
    true = writer.reduce("ReduceSum", own, column)
    total = writer("Add", [state.largest, writer("Log", [state.total], shape=column)], shape=column)
    cost = writer("Sub", [total, true], shape=column)
    counted = writer("Where", [known, cost, writer.constant(np.float32(0))], shape=column)
    loss = writer("Div", [writer("ReduceSum", [counted], keepdims=0, shape=()), share], shape=())
    right = writer("Equal", [state.best, following], dtype=ir.DataType.BOOL, shape=column)
    hits = writer("Cast", [right], to=int(_FLOAT), shape=column)
    metric = writer("Div", [writer("ReduceSum", [hits], keepdims=0, shape=()), share], shape=())
    mean = writer("Div", [state.sum, state.total], shape=(tokens, features))
    difference = writer("Sub", [mean, rows], shape=(tokens, features))
    scale = writer("Div", [weight, share], shape=column)
    return loss, metric, writer("Mul", [difference, scale], shape=(tokens, features))


def _following(writer: _Writer, labels: ir.Value, column: tuple[object, ...]) -> ir.Value:
    """Each position's next token, int64 [batch * sequence, 1]: `IGNORED` at the last one of a sample."""
    ends = [np.array([1]), np.array([np.iinfo(np.int64).max]), np.array([1])]
    later = writer("Slice", [labels, *map(writer.constant, ends)], dtype=_INT)
    pads = [writer.constant(np.array([0, 0, 0, 1])), writer.constant(np.int64(IGNORED))]
    padded = writer("Pad", [later, *pads], dtype=_INT, shape=_shape(labels))
    return writer("Reshape", [padded, writer.constant(np.array([-1, 1]))], dtype=_INT, shape=column)


class _Running:
    """What the pieces so far have given, of each token.

    Attributes:
        largest: the largest output, f32 [tokens, 1].
        total: sum of ``exp(output - largest)``, f32 [tokens, 1].
        sum: the table's rows weighted with these, summed, f32 [tokens, features].
        best: the word of the largest output, int64 [tokens, 1].
    """

    largest: ir.Value
    total: ir.Value
    sum: ir.Value
    best: ir.Value

    def __init__(self, writer: _Writer, head: _Head) -> None:
        self._write, self._head = writer, head
        self._tokens = (_shape(head.hidden) or (None,))[0]
        self._first = True

    def take(self, piece: tuple[int, int]) -> None:
        """Adds the words of one piece."""
        write, column = self._write, (self._tokens, 1)
        wide, deep = (self._tokens, piece[1] - piece[0]), (self._tokens, _sizes(self._head.table)[1])
        # The first waits for what it is multiplied with, each other one for all that the one before it gives.
        after = [self._head.hidden] if self._first else [self.sum, self.total, self.best]
        rows = write.rows(self._head.table, piece, after)
        outputs = write("Gemm", [self._head.hidden, rows], transB=1, shape=wide)
        here = write.reduce("ReduceMax", outputs, column)
        place = write("ArgMax", [outputs], axis=1, keepdims=1, dtype=_INT, shape=column)
        word = write("Add", [place, write.constant(np.int64(piece[0]))], dtype=_INT, shape=column)
        largest = here if self._first else write("Max", [self.largest, here], shape=column)
        powers = write("Exp", [write("Sub", [outputs, largest], shape=wide)], shape=wide)
        total = write.reduce("ReduceSum", powers, column)
        weighted = write("MatMul", [powers, rows], shape=deep)
        if not self._first:
            ahead = write("Greater", [here, self.largest], dtype=ir.DataType.BOOL, shape=column)
            word = write("Where", [ahead, word, self.best], dtype=_INT, shape=column)
            shrink = write("Exp", [write("Sub", [self.largest, largest], shape=column)], shape=column)
            total = write("Add", [write("Mul", [self.total, shrink], shape=column), total], shape=column)
            weighted = write("Add", [write("Mul", [self.sum, shrink], shape=deep), weighted], shape=deep)
        self.largest, self.total, self.sum, self.best, self._first = largest, total, weighted, word, False


class _Writer:
    """Makes nodes with names, types and shapes, in order."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self.nodes = graph, list[ir.Node]()
        self._numbers: Iterator[int] = count()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def __call__(
        self,
        operator: str,
        inputs: list[ir.Value],
        *,
        dtype: ir.DataType = _FLOAT,
        shape: tuple[object, ...] | ir.Shape | None = None,
        **attributes: int | tuple[int, ...],
    ) -> ir.Value:
        """A node's output."""
        name = f"vocabulary.{operator}.{next(self._numbers)}"
        node = ir.node(operator, inputs, attributes, name=name)
        output = node.outputs[0]
        output.name, output.type = f"{name}.output", ir.TensorType(dtype)
        if shape is not None:
            output.shape = ir.Shape(shape)  # type: ignore[arg-type]
        self.nodes.append(node)
        return output

    def constant(self, array: np.ndarray | np.generic) -> ir.Value:
        """An initializer, made once for each value."""
        array = np.asarray(array)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"vocabulary.constant.{len(self._constants)}"
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def reduce(self, operator: str, value: ir.Value, shape: tuple[object, ...]) -> ir.Value:
        """Over the second axis, which is kept."""
        return self(operator, [value, self.constant(np.array([1]))], keepdims=1, shape=shape)

    def rows(self, table: ir.Value, piece: tuple[int, int], after: list[ir.Value]) -> ir.Value:
        """The rows of one piece, which wait for the values in `after`: all pieces could be read at the start,
        and ONNX Runtime would."""
        first, last = piece
        axis = self.constant(np.array([0]))
        for value in after:
            gate = Gate(self._graph, value, f"piece.{first}")
            axis = gate(axis)
            self.nodes += gate.nodes
        ends = [self.constant(np.array([first])), self.constant(np.array([last]))]
        return self("Slice", [table, *ends, axis], shape=(last - first, _sizes(table)[1]))


def _shape(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...] | None:
    return None if value.shape is None else tuple(value.shape)


def _sizes(value: ir.Value) -> tuple[int, int]:
    """Of a weight."""
    assert value.shape is not None
    rows, columns = value.shape.numpy()
    return rows, columns
