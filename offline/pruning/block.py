"""Block-wise reconstruction: train the weights that stay so that a whole component gives what the dense one gave.

A component is attention or MLP of one decoder layer with its residual connection, fed by the pruned model before it.
(See "A free lunch in LLM compression: revisiting retraining after pruning", arXiv 2510.14444.)
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ria_vllm.errors import RiaError

# Weights of a linear that take their step at a time.
PIECE = 1 << 20


def train_block(
    forward: Callable[[torch.Tensor], torch.Tensor],
    params: Mapping[str, torch.nn.Parameter],
    masks: Mapping[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    passes: int = 8,
    lr: float = 1e-3,
    seed: int = 0,
    betas: tuple[float, float] = (0.9, 0.999),
    dtype: torch.dtype = torch.bfloat16,
    where: str = "",
) -> list[float]:
    """Masked Adam under a cosine schedule, one step a micro-batch, in bf16 autocast or in float32.

    A token's loss is its squared error over its own squared norm: in a plain mean square a few tokens with a thousand
    times the others' norm would be all that is learned.

    With half of the weights masked this takes 10 bytes a weight (12 in float32), and the gradient of one linear at a
    time.

    Args:
        forward: [..., hidden] -> [..., hidden], the residual stream after the component; multiplies with `params`
            (under autocast, if `dtype` is bfloat16). What else it computes with is float32.
        params: the linears' weights, of any floating dtype; float32 and zero outside their masks when this returns.
        masks: bool, one for every parameter and shaped as it, True = may change.
        inputs, targets: micro-batches of one device and count; sequences that load an item when asked serve as well.
        seed: of the order in which micro-batches come.
        dtype: of the products, bfloat16 or float32.
        where: what an error begins with.

    Returns:
        The mean loss of every pass.

    Raises:
        RiaError: micro-batches that do not pair up, or a loss that is not finite.
    """
    if len(inputs) != len(targets) or not len(inputs):
        found = f"{len(inputs)} inputs and {len(targets)} targets"
        raise RiaError(f"{where}{found}: block training needs as many of both, and some.")
    order = torch.Generator().manual_seed(seed)
    step, steps = 0, passes * len(inputs)
    trained = [_Trained(p, masks[name], lr, betas, dtype) for name, p in params.items()]
    losses = []
    try:
        for _ in range(passes):
            total = 0.0
            for i in torch.randperm(len(inputs), generator=order).tolist():
                for weight in trained:
                    weight.set_lr(lr * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
                loss = _relative_error(forward, inputs[i], targets[i], dtype)
                loss.backward()
                step += 1
                total += loss.item()
            losses.append(total / len(inputs))
            if not math.isfinite(losses[-1]):
                found = f"loss {losses[-1]} in pass {len(losses)}"
                raise RiaError(f"{where}block training diverged ({found}). Give --reconstruct admm.")
    finally:
        while trained:
            trained.pop().finish()
    return losses


class _Trained:
    """A weight in training: in `dtype` where the component reads it, and what the mask keeps in float32 for Adam.

    Autocast would multiply with the same values, rounded to bf16. The step is taken as soon as the gradient is there,
    so that no two linears' gradients are alive at once, and piece by piece, so that what it makes on the way is small.
    """

    def __init__(
        self,
        parameter: torch.nn.Parameter,
        mask: torch.Tensor,
        lr: float,
        betas: tuple[float, float],
        dtype: torch.dtype,
    ):
        self.parameter, self.required_grad = parameter, parameter.requires_grad
        # By index, as selecting by a mask of random bits is ten times as slow.
        index = mask.flatten().nonzero().flatten().to(torch.int32 if mask.numel() < 2**31 else torch.int64)
        self.index = index.split(PIECE)
        flat = parameter.data.reshape(-1)
        self.kept = [torch.nn.Parameter(flat.index_select(0, part).float()) for part in self.index]
        self.optimizer = torch.optim.Adam(self.kept, lr=lr, betas=betas, foreach=False)
        parameter.data = parameter.data.mul_(mask).to(dtype).contiguous()
        parameter.requires_grad_(True)
        self.hook = parameter.register_post_accumulate_grad_hook(self._step)

    def set_lr(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    def finish(self) -> None:
        """The parameter in float32, as it was trained."""
        self.hook.remove()
        self.parameter.requires_grad_(self.required_grad)
        self.parameter.grad = None
        self.optimizer.state.clear()
        self.parameter.data = torch.zeros_like(self.parameter.data, dtype=torch.float32)
        self._write()

    def _step(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad.reshape(-1)
        for kept, part in zip(self.kept, self.index, strict=True):
            kept.grad = gradient.index_select(0, part).float()
        del gradient
        parameter.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._write()

    def _write(self) -> None:
        flat = self.parameter.data.view(-1)
        for kept, part in zip(self.kept, self.index, strict=True):
            flat.scatter_(0, part.long(), kept.data.to(flat.dtype))


def _relative_error(
    forward: Callable, inputs: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = forward(inputs.float())
    targets = targets.float()
    return ((outputs.float() - targets).square().sum(-1) / targets.square().sum(-1).clamp(min=1e-12)).mean()
