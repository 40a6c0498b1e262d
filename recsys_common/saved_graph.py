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
# What a SavedModel has to write and to read its own variables: one function each, at a path that the caller gives.
SAVE = {"SaveV2", "MergeV2Checkpoints", "ShardedFilename", "StaticRegexFullMatch", "DisableCopyOnRead"}
SAVE |= {"Const", "Identity", "NoOp", "Pack", "ReadVariableOp", "Select", "StringJoin"}
RESTORE = {"RestoreV2", "AssignVariableOp", "Const", "Identity", "NoOp"}
PATHS = {"SaveV2": [0], "RestoreV2": [0], "ShardedFilename": [0], "MergeV2Checkpoints": [0, 1]}  # inputs that are paths
ENDINGS = {b".part", b"_temp/part"}  # what TensorFlow's own save function appends to the path


def check(folder: str | Path) -> None:
    """Refuse a SavedModel whose graph may reach out of itself.

    Raises:
      ValueError: an operation that is not in `ALLOWED`, files among its assets, a save or restore function with a path
        of its own, no graph of objects, two graphs, or no SavedModel; names it.
    """
    found = _read(folder)
    if others := sorted({each.name for each in Path(folder).glob("saved_model.*")} - {"saved_model.pb"}):
        raise ValueError(f"{folder}: it has {others[0]}, which TensorFlow may read in place of saved_model.pb. {_WHY}")
    graph = found.meta_graphs[0]
    if len(found.meta_graphs) != 1 or not graph.HasField("object_graph_def"):
        raise ValueError(f"{folder}: expected one graph with a graph of objects, as tf.saved_model.save writes. {_WHY}")
    if graph.asset_file_def:
        raise ValueError(f"{folder}: it names the file {graph.asset_file_def[0].filename!r}, expected none. {_WHY}")
    trusted, named = _saver(graph), _named(graph)
    for function in graph.graph_def.library.function:
        name = function.signature.name
        if name in trusted.keys() - named and "api_implements" not in function.attr:  # by which functions are swapped
            allowed, arguments = trusted[name]
            _refuse(folder, function.node_def, allowed, f"function {name}")
            _refuse_paths(folder, function, arguments)
        else:
            _refuse(folder, function.node_def, ALLOWED, f"function {name}")
    _refuse(folder, graph.graph_def.node, ALLOWED, "graph")


def _saver(graph) -> dict[str, tuple[set[str], set[str]]]:
    """Function -> operations that it may have, its arguments that are paths; of those that write or read variables.

    They are called by the two nodes that the graph names for it, with the path that the caller gives, and nothing else
    takes what these nodes give.
    """
    saver, library = graph.saver_def, {each.signature.name: each for each in graph.graph_def.library.function}
    taken = {_node(each) for node in graph.graph_def.node for each in node.input}
    for signature in graph.signature_def.values():
        for tensor in [*signature.inputs.values(), *signature.outputs.values()]:
            if tensor.WhichOneof("encoding") != "name":
                return {}  # sparse or composite: it names several
            taken.add(_node(tensor.name))
    for collection in graph.collection_def.values():
        taken |= {_node(each) for each in collection.node_list.value}
    trusted = {}
    for tensor, allowed in ((saver.save_tensor_name, SAVE), (saver.restore_op_name, RESTORE)):
        for node in graph.graph_def.node:
            if node.name != _node(tensor) or node.name in taken:
                continue
            for name in set(_calls(node)) & library.keys() - trusted.keys():
                # Another string is data: the graph of objects is stored as one.
                pairs = zip(library[name].signature.input_arg, node.input, strict=False)
                paths = {argument.name for argument, each in pairs if _node(each) == _node(saver.filename_tensor_name)}
                trusted[name] = allowed, paths
    return trusted


def _named(graph) -> set[str]:
    """Functions that run by another way than the two nodes of the saver."""
    own = {_node(graph.saver_def.save_tensor_name), _node(graph.saver_def.restore_op_name)}
    library, objects = graph.graph_def.library, graph.object_graph_def
    nodes = [node for node in graph.graph_def.node if node.name not in own]
    nodes += [node for function in library.function for node in function.node_def]
    named = {call for node in nodes for call in _calls(node)} | {*objects.concrete_functions}
    for each in objects.nodes:
        named |= {*each.function.concrete_functions, each.bare_concrete_function.concrete_function_name}
    for each in library.gradient:
        named |= {each.function_name, each.gradient_func}
    return named | {each.gradient_func for each in library.registered_gradients}


def _refuse_paths(folder, function, arguments: set[str]) -> None:
    """Refuse a function that writes or reads at another path than these arguments say."""
    nodes = {node.name: node for node in function.node_def}

    def ending(tensor: str) -> bool:
        node = nodes.get(_node(tensor))
        if node is not None and node.op == "Select":
            return all(ending(each) for each in node.input[1:3])
        return node is not None and node.op == "Const" and {*node.attr["value"].tensor.string_val} <= ENDINGS

    def given(tensor: str) -> bool:
        node = nodes.get(_node(tensor))
        if node is None:
            return tensor in arguments
        data = [each for each in node.input if not each.startswith("^")]
        if node.op == "StringJoin":
            return given(data[0]) and all(map(ending, data[1:])) and not node.attr["separator"].s
        return node.op in ("Identity", "Pack", "ShardedFilename") and all(map(given, data[: _PARTS.get(node.op)]))

    for node in function.node_def:
        if not all(given(node.input[place]) for place in PATHS.get(node.op, [])):
            raise ValueError(
                f"{folder}: operation {node.op} ({node.name}, in function {function.signature.name}) has a path of its "
                f"own, expected the one that the caller gives. {_WHY}"
            )


_PARTS = {"Identity": 1, "ShardedFilename": 1}  # inputs that make the path; of Pack all


def _node(tensor: str) -> str:
    return tensor.removeprefix("^").partition(":")[0]


_WHY = "It could run code, or read and write files, with your rights."


def _refuse(folder, nodes, allowed: frozenset[str] | set[str], where: str) -> None:
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
