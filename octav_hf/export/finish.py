"""Post-process a recorded graph: store weights, name nodes, and avoid one slow fusion of ONNX Runtime."""

import ast
from typing import Any

from .recorded_modules import INT4, INT8


def finish(model: Any) -> None:
    """Finish the graph of an ``onnx_ir.Model`` in place."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    _store_as_int4(model.graph)
    _separate_weights(model.graph)
    _keep_layer_norms(model.graph)
    _name_by_module(model.graph)
    # The recorded metadata contains file paths of this machine.
    ClearMetadataAndDocStringPass()(model)
    model.graph.metadata_props.clear()


def _store_as_int4(graph: Any) -> None:
    """Store weights of at most 4 bits as INT4, followed by a Cast to INT8, which runtimes compute once when loading."""
    import ml_dtypes
    import onnx_ir as ir

    for name, value in list(graph.initializers.items()):
        if name.rpartition(".")[2] != INT4:
            continue
        narrow = ir.Value(name=f"{name}.packed", shape=value.shape, type=ir.TensorType(ir.DataType.INT4))
        narrow.const_value = ir.tensor(value.const_value.numpy().astype(ml_dtypes.int4), name=narrow.name)
        cast = ir.node("Cast", [narrow], {"to": ir.DataType.INT8}, name=f"{name}.cast")
        graph.register_initializer(narrow)
        cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = name, ir.DataType.INT8, value.shape
        value.replace_all_uses_with(cast.outputs[0])
        del graph.initializers[name]
        graph.insert_before(graph[0], cast)


def _separate_weights(graph: Any) -> None:
    """Give each matmul its own copy of an INT8 weight: ``session.x64quantprecision=1`` fails for shared weights."""
    import onnx_ir as ir

    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if weight is None or weight.name.rpartition(".")[2] != INT8:
            continue
        for number, (user, index) in enumerate(list(node.outputs[0].uses())[1:], 2):
            copied = ir.Value(name=f"{weight.name}_{number}", shape=weight.shape, type=weight.type)
            copied.const_value = ir.tensor(weight.const_value.numpy(), name=copied.name)
            graph.register_initializer(copied)
            again = ir.node(
                node.op_type, [copied, *node.inputs[1:]], node.attributes, metadata_props=node.metadata_props
            )
            again.outputs[0].dtype, again.outputs[0].shape = node.outputs[0].dtype, node.outputs[0].shape
            again.outputs[0].name = f"{copied.name}.values"
            graph.insert_after(node, again)
            user.replace_input_with(index, again.outputs[0])


def _keep_layer_norms(graph: Any) -> None:
    """Replace the Add before a LayerNormalization with Sum.

    ONNX Runtime 1.32 fuses Add and LayerNormalization into SkipLayerNormalization, which on a CPU takes ten times as
    long as both: a third of MiniLM's time.
    """
    for node in graph:
        before = node.inputs[0].producer() if node.op_type == "LayerNormalization" else None
        if before is not None and before.op_type == "Add":
            before.op_type = "Sum"


def _name_by_module(graph: Any) -> None:
    """Name nodes after their modules."""
    counts: dict[str, int] = {}
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))
        name = f"{scopes[-2] if len(scopes) > 1 else ''}/{node.op_type}"
        counts[name] = counts.get(name, 0) + 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
