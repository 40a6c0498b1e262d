"""What does a SavedModel ask TensorFlow to do, and does it keep to itself?

    saved_graph.check("model/saved_model")                  # ValueError, with the operation, where it does not
    saved_graph.signatures("model/saved_model")["recommend"]["inputs"]["user_id"]["tensor"]

A graph is a program: TensorFlow's own advice (SECURITY.md) is to run only what one trusts. An operation may read and
write files, call back into Python or open connections, and loading alone runs some. A list of what is forbidden is soon
got round: besides ReadFile, WriteFile and PyFunc, a graph can write a file by PrintV2, Save or a summary, and read one
by WholeFileReaderV2. So this is a list of what is allowed: arithmetic, shapes, look-ups and variables. An architecture
that needs another operation adds it to `ALLOWED`, if it touches nothing but its inputs and the model's variables.

Needs: nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import saved_model_pb2

NAMES = """
    Abs Add AddN AddV2 All Any ArgMax ArgMin AsString BatchMatMulV2 BatchMatMulV3 BiasAdd Bitcast BitwiseAnd BitwiseOr
    BitwiseXor BroadcastTo Cast Ceil ClipByValue Concat ConcatV2 Const Cos Cumsum Div DivNoNan Einsum Elu Equal Erf Exp
    ExpandDims Fill Fingerprint Floor FloorDiv FloorMod Gather GatherNd GatherV2 Greater GreaterEqual Identity IdentityN
    InvertPermutation IsFinite IsInf IsNan L2Loss LeakyRelu LeftShift Less LessEqual Log Log1p LogSoftmax LogicalAnd
    LogicalNot LogicalOr LowerBound MatMul MatrixBandPart Max Maximum Mean Min Minimum Mul MulNoNan Neg NoOp NotEqual
    OneHot OnesLike Pack Pad PadV2 PartitionedCall Placeholder PlaceholderWithDefault Pow PreventGradient Prod
    RaggedGather RaggedTensorToTensor Range Rank ReadVariableOp RealDiv Reciprocal Relu Relu6 Reshape ResourceGather
    ResourceGatherNd ReverseV2 RightShift Round Rsqrt ScatterNd SegmentMean SegmentSum Select SelectV2 Selu Shape ShapeN
    Sigmoid Sign Sin Size Slice Softmax Softplus Softsign Split SplitV Sqrt Square SquaredDifference Squeeze
    StatefulPartitionedCall StopGradient StridedSlice StringJoin StringToHashBucketFast Sub Sum Tanh TensorScatterAdd
    TensorScatterMax TensorScatterMin TensorScatterUpdate Tile TopK TopKV2 Transpose Unique UniqueV2 Unpack
    UnsortedSegmentMax UnsortedSegmentSum UpperBound VarHandleOp VarIsInitializedOp Where ZerosLike
"""
ALLOWED = frozenset(NAMES.split())
# What every SavedModel has to write and read its own variables, in functions that nothing else may call.
SAVER = {"SaveV2", "RestoreV2", "MergeV2Checkpoints", "ShardedFilename", "AssignVariableOp", "StaticRegexFullMatch"}
SAVER |= {"DisableCopyOnRead"}


def check(folder: str | Path) -> None:
    """Refuse a SavedModel whose graph may reach out of itself.

    Raises:
      ValueError: an operation that is not in `ALLOWED`, files among its assets, or no SavedModel; names it.
    """
    for graph in _read(folder).meta_graphs:
        if graph.asset_file_def:
            raise ValueError(f"{folder}: it names the file {graph.asset_file_def[0].filename!r}, expected none. {_WHY}")
        saver, top = graph.saver_def, {node.name: node for node in graph.graph_def.node}
        own = {each.partition(":")[0] for each in (saver.save_tensor_name, saver.restore_op_name)} - {""}
        functions = {function.signature.name: function for function in graph.graph_def.library.function}
        trusted = {call for name in own & top.keys() for call in _calls(top[name])}
        called = {call for name, node in top.items() if name not in own for call in _calls(node)}
        for name, function in functions.items():
            if name not in trusted:
                called |= {call for node in function.node_def for call in _calls(node)}
        for name, function in functions.items():
            allowed = ALLOWED | SAVER if name in trusted - called else ALLOWED
            _refuse(folder, function.node_def, allowed, f"function {name}")
        _refuse(folder, top.values(), ALLOWED, "graph")


_WHY = "It could run code, or read and write files, with your rights."


def _refuse(folder, nodes, allowed: frozenset[str], where: str) -> None:
    for node in nodes:
        if node.op not in allowed:
            raise ValueError(
                f"{folder}: operation {node.op} ({node.name}, in {where}) is not known to keep to its inputs and the "
                f"model's variables. {_WHY} If it is harmless, add it to saved_graph.ALLOWED."
            )


def _calls(node) -> Iterator[str]:
    for attribute in node.attr.values():
        if attribute.HasField("func"):
            yield attribute.func.name
        yield from (each.name for each in attribute.list.func)


def signatures(folder: str | Path) -> dict[str, dict]:
    """Signature -> {"inputs", "outputs"} as in artifact.Signature, with the names of tensors for TF_SessionRun.

    Raises:
      ValueError: no SavedModel.
    """
    [graph] = _read(folder).meta_graphs
    return {
        name: {"inputs": _tensors(found.inputs), "outputs": _tensors(found.outputs)}
        for name, found in sorted(graph.signature_def.items())
        if not name.startswith("__")
    }


def _tensors(found) -> dict:
    names = {types_pb2.DT_INT32: "int32", types_pb2.DT_INT64: "int64", types_pb2.DT_STRING: "string"}
    names[types_pb2.DT_FLOAT] = "float32"
    return {
        name: {
            "tensor": tensor.name,
            "dtype": names[tensor.dtype],
            "shape": [None if dim.size < 0 else dim.size for dim in tensor.tensor_shape.dim],
        }
        for name, tensor in sorted(found.items())
    }


def _read(folder: str | Path):
    path = Path(folder) / "saved_model.pb"
    try:
        found = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    except Exception as error:  # of protobuf, of the file system
        raise ValueError(f"{path}: no SavedModel: {error}") from error
    if not found.meta_graphs:
        raise ValueError(f"{path}: no SavedModel: it has no graph")
    return found
