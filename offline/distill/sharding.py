"""Models divided among processes by FSDP2: each has some rows of all weights, and of the student's optimizer state.

The embedding and the head, which are not trained, stay whole in every process: the loss calls the head chunk by chunk
outside of what FSDP sees.
"""

import torch
from torch import nn

from ria_vllm.offline.distill.teacher.two_part import TwoPart


def shard(model: TwoPart, device: torch.device) -> None:
    """Divide all weights but those of the embedding and the head among the processes of the default group.

    Args:
        model: on the CPU, or on `device`.
        device: of this process. The layers move there one at a time, so it never holds the whole model.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    of_layers = {tensor for layer in model.layers for tensor in (*layer.parameters(), *layer.buffers())}
    for tensor in (*model.model.parameters(), *model.model.buffers()):
        if tensor not in of_layers:
            tensor.data = tensor.data.to(device)
    whole = {
        parameter
        for module in (model.model.get_input_embeddings(), model.model.get_output_embeddings())
        for parameter in module.parameters()
    }
    for layer in model.layers:
        fully_shard(layer.to(device), mesh=mesh, ignored_params=whole)
    fully_shard(model.base, mesh=mesh, ignored_params=whole)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process has; all of it if it is not divided."""
    found = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found.detach()


def rows_here(parameter: nn.Parameter) -> slice:
    """Which rows that is."""
    if not hasattr(parameter, "to_local"):
        return slice(0, len(parameter))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, first = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return slice(first[0], first[0] + shape[0])


def gathered(values: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """The whole of a tensor of which each process has some rows, as `parameter` is divided. All processes must call.

    Args:
        values: the rows of this process, [rows, ...].
    """
    if not hasattr(parameter, "to_local"):
        return values
    from torch.distributed.tensor import DTensor

    shape = torch.Size((len(parameter), *values.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(values, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)
    return whole.full_tensor()
