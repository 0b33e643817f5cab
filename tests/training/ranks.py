"""Trains a pruned model in several processes: `torchrun ranks.py FOLDER OUT KIND`.

KIND is fsdp, ddp or accelerate, or fsdp1 or fsdp1-original (with `use_orig_params`), which are refused. Every rank
checks after every backward and every step that nothing outside the masks has changed, saves to OUT/new, and then fails
to save there again. Rank 0 writes the gathered weights to OUT/state.safetensors.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from sparse_llama import TOKENS, load, loss_of, masks
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from ria_vllm.errors import RiaError
from ria_vllm.training import keep_sparse, save

STEPS = 3


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(model) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


def flattened(model, original: bool) -> None:
    """FSDP1 is refused, before it has changed anything."""
    keep_sparse(model)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    try:
        loss_of(wrapped).backward()
        optimizer.step()
    except RiaError as error:
        assert "use FSDP2" in str(error)
    else:
        raise AssertionError("FSDP1 was not refused")


def prepared(model, optimizer, kind):
    if kind == "accelerate":  # what its Accelerator calls on GPUs; on CPUs it has no FSDP
        from accelerate import FullyShardedDataParallelPlugin
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True,
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )  # fmt: skip
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", device=torch.device("cpu"),
            is_main_process=dist.get_rank() == 0,
        )  # fmt: skip
        model = fsdp2_prepare_model(accelerator, model)
        return model, optimizer(model.parameters())
    wrapped = model if kind == "fsdp" else torch.nn.parallel.DistributedDataParallel(model)
    return wrapped, optimizer(wrapped.parameters())


def check(model, kept, what) -> None:
    found = {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}
    for name, mask in kept.items():
        tensor = whole(what(found[name])).detach()
        assert not tensor[~mask].any() and tensor[mask].any(), name


class MovesEverything(torch.optim.SGD):
    """Plain SGD, after which everything moves a little (sharded or not)."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.add_(0.01)


def main(folder: str, out: str, kind: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model, kept = load(Path(folder)), masks(Path(folder))
    if kind.startswith("fsdp1"):
        return flattened(model, kind.endswith("original"))
    if kind == "fsdp":
        sharded(model)
    keep_sparse(model)  # before or after sharding
    optimizer = lambda p: MovesEverything(p, lr=0.1, momentum=0.9, weight_decay=0.1)  # noqa: E731
    model, optimizer = prepared(model, optimizer, kind)
    if kind != "ddp":
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, TOKENS[step : step + 4][rank::size]).backward()
        check(model, kept, lambda parameter: parameter.grad)
        optimizer.step()
        check(model, kept, lambda parameter: parameter)
    state = {name.removeprefix("module."): whole(tensor).contiguous() for name, tensor in model.state_dict().items()}
    saved = save(model, Path(out) / "new", like=folder)
    assert (saved is None) == (rank > 0)
    dist.barrier()
    try:
        save(model, Path(out) / "new", like=folder)
    except RiaError as error:
        assert "exists already" in str(error)
    else:
        assert kind == "ddp" and rank > 0  # nothing is gathered there, so the first rank is alone
    if rank == 0:
        save_file(state, Path(out) / "state.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
