"""How does the numeric part of a model become ONNX, with tables of any size? As files that ONNX Runtime maps.

    about = onnx_export.export(folder, "user_embedding", function, {"user": tf.TensorSpec([None], tf.int32)})
    onnxruntime.InferenceSession(folder / "user_embedding.onnx").run(["embedding"], {"user": rows})

What takes strings, hashes or looks ids up stays outside: ONNX has no such operators, and onnxruntime-extensions 0.15
hashes strings to other buckets than TensorFlow. tf2onnx would copy each table into the graph, which ends at 2 GB. So
variables become inputs, tf2onnx converts the graph around them, and then the inputs become initializers whose content
is `<variable>.f32`, raw float32 beside the .onnx file. (ONNX Runtime reads none outside of its folder.) tf2onnx reports
success even where an operator was not converted; hence the checker and a session at the end.

Needs: embeddings.py
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2

from recsys_common.embeddings import read_rows

OPSET = 18  # the highest that tf2onnx 1.17 knows
SLICE = 1 << 23  # bytes of a table that are in memory at once
BFLOAT16, FLOAT32 = types_pb2.DT_BFLOAT16, types_pb2.DT_FLOAT


def export(folder: str | Path, name: str, function: Callable, specs: dict[str, tf.TensorSpec]) -> dict:
    """Write `<name>.onnx` and a file for each variable that it reads.

    Args:
      folder: is there.
      function: dict of tensors -> dict of tensors, with the operations of TensorFlow that ONNX has too.
      specs: what it takes.

    Returns:
      {"file", "opset", "inputs", "outputs"} as in artifact.Onnx; the file without a folder.

    Raises:
      ValueError: an operation that ONNX does not have, or that reads a variable in another way than whole or by rows.
    """
    import onnx
    import onnxruntime
    from tf2onnx import convert

    folder = Path(folder)
    traced = tf.function(lambda **given: function(given), autograph=False).get_concrete_function(
        **{key: tf.TensorSpec(spec.shape, spec.dtype, key) for key, spec in specs.items()}
    )
    graph, variables = _with_inputs_for_variables(traced)
    tables = {key: variable for key, variable in variables.items() if variable.dtype.is_floating}
    names = {tensor.name: key for key, tensor in traced.structured_outputs.items()}
    names |= {f"{key}:0": key for key in [*specs, *tables]}
    loggers = [logging.getLogger(each) for each in ("tf2onnx", "tensorflow")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel("CRITICAL")  # what went wrong is found below
    try:
        proto, _ = convert.from_graph_def(
            graph,
            name,
            input_names=[f"{key}:0" for key in [*specs, *tables]],
            output_names=[tensor.name for tensor in traced.structured_outputs.values()],
            opset=OPSET,
            tensors_to_rename=names,
        )
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
    for given in [each for each in proto.graph.input if each.name in tables]:
        proto.graph.input.remove(given)
        variable = tables[given.name]
        file = given.name.removeprefix("variables/") + ".f32"
        write_float32(folder / file, variable)
        tensor = onnx.TensorProto(name=given.name, data_type=onnx.TensorProto.FLOAT, dims=variable.shape.as_list())
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", file), ("offset", 0), ("length", 4 * variable.shape.num_elements())):
            tensor.external_data.add(key=key, value=str(value))
        proto.graph.initializer.append(tensor)
    _in_one_order(proto.graph, tables)
    path = folder / f"{name}.onnx"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(path))
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"{path.name}: tf2onnx made a file that is no ONNX model of opset {OPSET}: {error}") from error
    return {"file": path.name, "opset": OPSET, "inputs": _about(specs), "outputs": _about(traced.structured_outputs)}


def _in_one_order(graph, tables: dict) -> None:
    """Sort and name nodes, values and constants by the way from the outputs back to the inputs.

    tf2onnx goes by the order of sets, which is another one in each process.
    """
    made = {output: node for node in graph.node for output in node.output}
    nodes, done, stack = [], set(), [made[output.name] for output in graph.output][::-1]
    while stack:
        node = stack[-1]
        waiting = [made[each] for each in node.input if each in made and made[each].output[0] not in done]
        if not waiting and node.output[0] not in done:
            nodes.append(type(node).FromString(node.SerializeToString()))
            done.add(node.output[0])
        stack[-1:] = [node, waiting[0]] if waiting else []
    names = {each.name: each.name for each in [*graph.input, *graph.output]} | {key: key for key in tables}
    for number, node in enumerate(nodes):
        node.name = f"{node.op_type}_{number}"
        for part in (node.input, node.output):
            part[:] = [each and names.setdefault(each, f"value_{len(names)}") for each in part]
    constants = [each for each in graph.initializer if each.name in names]
    for each in constants:
        each.name = names[each.name]
    constants = [type(each).FromString(each.SerializeToString()) for each in sorted(constants, key=lambda x: x.name)]
    for field, content in (("node", nodes), ("initializer", constants), ("value_info", [])):
        graph.ClearField(field)
        getattr(graph, field).extend(content)


def _about(tensors: dict) -> dict:
    return {k: {"tensor": k, "dtype": v.dtype.name, "shape": v.shape.as_list()} for k, v in tensors.items()}


def write_float32(path: Path, variable: tf.Variable) -> None:
    """A variable as raw float32, little-endian, row after row; never a second copy of a table in memory."""
    rows = variable.shape[0] if variable.shape.rank > 1 else 0
    size = max(1, SLICE * rows // (4 * max(variable.shape.num_elements(), 1)))
    with open(path, "wb") as stream:
        for begin in range(0, rows, size):
            block = read_rows(variable, begin, min(begin + size, rows))
            stream.write(np.ascontiguousarray(tf.cast(block, tf.float32).numpy(), "<f4").data)
        if not rows:
            stream.write(tf.cast(variable, tf.float32).numpy().astype("<f4").tobytes())


def _with_inputs_for_variables(traced):
    """The graph with each captured variable as an input of its values, float32 throughout; and the variables."""
    graph, variables, constants = traced.graph.as_graph_def(), {}, {}
    by_handle = {id(variable.handle): variable for variable in traced.variables}
    place = {}  # name of the placeholder -> name of the input
    for outer, inner in traced.graph.captures:
        if id(outer) in by_handle:
            variable = by_handle[id(outer)]
            key = "variables/" + variable.name.partition(":")[0].replace("/", ".")
            key = key if key not in variables else f"{key}.{len(variables)}"
            place[inner.op.name], variables[key] = key, variable
        else:
            constants[inner.op.name] = outer
    kept, by_rows = [], set()
    for node in graph.node:
        inputs = [each.partition(":")[0] for each in node.input]
        key = place.get(inputs[0]) if inputs else None
        if node.name in place:
            variable = variables[place[node.name]]
            node.name = place[node.name]
            node.attr.clear()
            node.attr["dtype"].type = FLOAT32
            node.attr["shape"].shape.CopyFrom(variable.shape.as_proto())
        elif node.name in constants:
            node.op = "Const"
            node.attr.clear()
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(constants[node.name].numpy()))
            node.attr["dtype"].type = constants[node.name].dtype.as_datatype_enum
        elif key and node.op == "ReadVariableOp":
            node.op, node.input[:] = "Identity", [key]
            node.attr.clear()
            node.attr["T"].type = FLOAT32
        elif key and node.op == "ResourceGather" and not node.attr["batch_dims"].i:
            index = node.attr["Tindices"].type
            node.op, node.input[:] = "GatherV2", [key, node.input[1], f"{node.name}/axis"]
            node.attr.clear()
            node.attr["Tparams"].type, node.attr["Tindices"].type = FLOAT32, index
            node.attr["Taxis"].type = types_pb2.DT_INT32
            axis = tf.compat.v1.NodeDef(name=f"{node.name}/axis", op="Const")
            axis.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.int32(0)))
            axis.attr["dtype"].type = types_pb2.DT_INT32
            kept.append(axis)
            by_rows.add(key)
        elif found := [each for each in inputs if each in place]:
            variable = place[found[0]]
            raise ValueError(f"{node.name}: {node.op} takes the variable {variable}; ONNX gets one whole or by rows")
        for attribute in node.attr.values():
            if attribute.type == BFLOAT16:  # stored so; computed in float32
                attribute.type = FLOAT32
        kept.append(node)
    for node in kept:
        if node.name in by_rows:  # Of an input of known shape TensorFlow's optimizer makes one to try, as large as that
            node.attr["shape"].shape.dim[0].size = -1
    result = tf.compat.v1.GraphDef(versions=graph.versions, library=graph.library)
    result.node.extend(kept)
    return result, variables
