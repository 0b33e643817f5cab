"""Where the pruned linears of a folder are in transformers' model: which of its parameters are trained."""

from typing import Any

from ria_vllm.checkpoint.placement import Placement
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.format.stacks import LayerExperts, layers_of_experts
from ria_vllm.hf.experts_layout import experts_modules
from ria_vllm.offline.model.run.names import Names


def places_of(model: Any, reader: Reader, names: Names) -> dict[str, Placement]:
    """Parameter of the model -> the pruned linears in it: one, or those of all experts of a layer.

    Args:
        model: may be on the meta device.
        names: of the model, with the tensors of `reader.dense_tensors()`.

    Raises:
        RiaError: a pruned linear shares a parameter with others in a way that is not known.
    """
    parameters = {name for name, _ in model.named_parameters()}
    stacks = _stacks(model, reader, names)
    in_stack = {linear: parameter for parameter, stack in stacks.items() for linear in stack.names}
    found: dict[str, Placement] = {}
    for name in reader.sparse_names:
        inside = in_stack.get(name) or names.inside.get(f"{name}.weight", "")
        if inside in stacks:
            found[inside] = stacks[inside]
        elif inside in parameters and f"{name}.weight" not in names.converted:
            found[inside] = Placement(((name,),))
        else:
            raise RiaError(
                f"{reader.folder}: {name}: transformers' {type(model).__name__} has no weight of its own for it (it "
                "merges several), so it cannot be trained. Distillation takes models whose linears are apart, and "
                "experts of folders that `ria-vllm compress` wrote."
            )
    return found


def _stacks(model: Any, reader: Reader, names: Names) -> dict[str, Placement]:
    """Parameter of the model -> the linears of all experts of a layer that are stacked in it.

    `reader.dense_tensors` has made sure that none of them is missing.
    """
    modules, found = experts_modules(model), {}
    for layer in layers_of_experts(reader.schema, reader.sparse_names):
        path = names.inside.get(_tensor_of_downs(layer), "").rpartition(".")[0]
        layout = modules.get(path)
        if layout is None or (layout.num_experts, set(layout.kinds)) != (layer.num_experts, set(layer.linears)):
            raise RiaError(
                f"{reader.folder}: {layer.module}: transformers' {type(model).__name__} does not hold these "
                f"{layer.num_experts} experts in a way that ria-vllm knows, so they cannot be trained. Install the "
                "version of transformers that the model was compressed with."
            )
        for parameter, kinds in layout.parameters.items():
            found[f"{path}.{parameter}"] = layer.placement(kinds, layout.interleaved, layout.transposed)
    return found


def _tensor_of_downs(layer: LayerExperts) -> str:
    """The tensor of the dense model that holds the first expert's down projection."""
    stacked = next((tensor for tensor, stack in layer.stacked.items() if "down" in stack.linears), None)
    return stacked or f"{layer.linear(0, 'down')}.weight"
