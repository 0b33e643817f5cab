"""Trains a pruned model in several processes, of which each calls `main` with a kind.

Kinds are fsdp, ddp or accelerate; fsdp-one (one group for the whole model), fsdp-bf16 (computes in bfloat16) or
fsdp-accumulated (gradients of two backward passes, summed before they are shared). Every rank checks after every
backward and every step that nothing outside the masks has changed, saves to OUT/new, writes and reads
OUT/ria_trained.safetensors, and then fails to save to OUT/new again. Rank 0 writes the gathered weights to
OUT/state.safetensors.

Or it is fsdp1-original (with `use_orig_params`), which is refused, or failures: what is wrong on one rank is raised on
both.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from sparse_llama import TOKENS, load, loss_of, masks
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ria_vllm.errors import RiaError
from ria_vllm.training import keep_sparse, save

STEPS = 3


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(model, kind="fsdp") -> None:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if kind == "fsdp-bf16" else MixedPrecisionPolicy()
    for layer in [] if kind == "fsdp-one" else model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def fails(work, message: str) -> None:
    try:
        work()
    except RiaError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"no error: {message}")


def failures(folder: Path, out: Path) -> None:
    rank = dist.get_rank()
    for where in (0, 1):  # a whole weight on the first rank, a shard on the second
        model = load(folder)
        if where == 1:
            sharded(model)
        weight = model.model.layers[1].mlp.up_proj.weight
        if rank == where:
            with torch.no_grad():
                (weight.to_local() if isinstance(weight, DTensor) else weight).add_(1)
        fails(lambda: keep_sparse(model), "layers.1.mlp.up_proj.weight: not zero everywhere")
    model = load(folder)
    for layer in model.model.layers:
        fully_shard(layer)
    keep_sparse(model)
    if rank == 0:
        model.model.norm.to("meta")
    fails(lambda: save(model, out / "new", like=folder), "model.norm.weight: its weights are not in memory")


def flattened(model) -> None:
    """FSDP1 is refused, before it has changed anything."""
    keep_sparse(model)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)

    def step():
        loss_of(wrapped).backward()
        optimizer.step()

    fails(step, "use FSDP2")


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
    wrapped = model if kind.startswith("fsdp") else torch.nn.parallel.DistributedDataParallel(model)
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


def main(folder: Path, out: Path, kind: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model, kept = load(folder), masks(folder)
    if kind == "fsdp1-original":
        return flattened(model)
    if kind == "failures":
        return failures(folder, out)
    if kind.startswith("fsdp"):
        sharded(model, kind)
    keep_sparse(model)  # before or after sharding
    optimizer = lambda p: MovesEverything(p, lr=0.1, momentum=0.9, weight_decay=0.1)  # noqa: E731
    model, optimizer = prepared(model, optimizer, kind)
    if kind != "ddp":
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = TOKENS[step : step + 4][rank::size]
        if kind == "fsdp-accumulated":
            model.set_requires_gradient_sync(False)
            (loss_of(model, batch[:1]) / 2).backward()
            model.set_requires_gradient_sync(True)
            (loss_of(model, batch[1:]) / 2).backward()
        else:
            loss_of(model, batch).backward()
        check(model, kept, lambda parameter: parameter.grad)
        optimizer.step()
        check(model, kept, lambda parameter: parameter)
    state = {name.removeprefix("module."): whole(tensor).contiguous() for name, tensor in model.state_dict().items()}
    saved = save(model, out / "new", like=folder)
    assert (saved is None) == (rank > 0)
    dist.barrier()
    try:
        save(model, out / "new", like=folder)
    except RiaError as error:
        assert "exists already" in str(error)
    else:
        assert kind == "ddp" and rank > 0  # nothing is gathered there, so the first rank is alone
    if rank == 0:
        save_file(state, out / "state.safetensors")
    dist.destroy_process_group()
