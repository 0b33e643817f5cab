"""Whether the routed experts of an MoE layer compute what the checkpoint says, one expert at a time.

An expert is no matrix: between its products is an activation. But the proofs of gate and up, G r and U r, say what
comes out of it, h, and the proof of the transposed down projection, D^T s, says what D makes of any h:
s (D h) = (D^T s) h. So the layer's kernel gets r under a few scales, each routed to a single expert, and what comes out
is multiplied by s.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from ria_vllm.format.proofs import TRANSPOSED
from ria_vllm.serve.experts.method import Sparse24MoEMethod
from ria_vllm.serve.experts.packing import activation_of
from ria_vllm.serve.kernels.reference_experts import activate

# Powers of two, for int8 rounds r under any of them exactly; the activation bends differently for each.
SCALES = (2.0**-7, 2.0**-9, 2.0**-5, 2.0**-11)
# How many standard deviations of all rounding errors together a product may be off.
SURE = 6.0


def proved_experts(model: torch.nn.Module) -> Iterator["ProvedExperts"]:
    """The pruned experts of all layers of a model."""
    for path, layer in model.named_modules():
        if isinstance(layer, RoutedExperts) and isinstance(layer.quant_method, Sparse24MoEMethod):
            yield ProvedExperts(path, layer)


@dataclass(frozen=True)
class ProvedExperts:
    """Pruned experts of a layer on this rank; see `ria_vllm.serve.proving.layers.Proved`."""

    path: str
    layer: RoutedExperts

    @property
    def method(self) -> Sparse24MoEMethod:
        return self.layer.quant_method

    @property
    def matrices(self) -> list[str]:
        """Those of this rank's experts."""
        kinds = self.method.experts.patterns
        return [self.method.experts.linear(kind, expert) for expert in self._experts for kind in kinds]

    @property
    def _experts(self) -> list[int]:
        return [expert for expert, _ in self.method._local_experts(self.layer)]

    def can_be_proved(self, stored: Mapping[str, torch.Tensor]) -> bool:
        """Whether the proofs tell what comes out: not with biases between the products, which no proof has."""
        downs = [self.method.experts.linear("down", expert) + TRANSPOSED for expert in self._experts]
        known = all(name in stored for name in (*self.matrices, *downs))
        return known and activation_of(self.layer) is not None and not self.method.moe.has_bias and self._can_be_asked

    @property
    def _can_be_asked(self) -> bool:
        """Whether the kernel takes tokens outside of a step of the engine. vLLM's own may wait for other ranks."""
        method, moe = self.method, self.method.moe
        alone = moe.dp_size == 1 and moe.pcp_size == 1 and not moe.is_sequence_parallel
        return self.layer.ria_experts is not None or (alone and not method.is_monolithic)

    def problem(self, vector: Callable[[int], torch.Tensor], stored: Mapping[str, torch.Tensor]) -> str | None:
        """What is wrong with the experts, in a sentence; None if they compute what the proofs say."""
        method, dtype = self.method, self.method.moe.in_dtype
        r = vector(method.sizes.hidden)
        device = next(tensor.device for tensor in self.layer.parameters() if tensor.numel())
        x = torch.cat([(scale * r)[None] for scale in SCALES]).to(device, dtype)
        ones = torch.ones(len(SCALES), 1, device=device)
        wrong = []
        for expert in self._experts:
            ids = torch.full((len(SCALES), 1), expert, dtype=torch.int32, device=device)
            y = method.apply(self.layer, x.clone(), ones.clone(), ids, None, None).cpu().double()
            wanted, limit = self._expected(expert, stored, y)
            if not bool(((y @ r.double() - wanted).abs() <= limit).all()):
                wrong.append(expert)
        if not wrong:
            return None
        how = "vLLM's own kernel" if self.layer.ria_experts is None else str(self.layer.ria_experts.choice)
        return (
            f"{method.experts.name} ({how}): {len(wrong)} of {len(self._experts)} experts, the first of which is "
            f"{wrong[0]}, do not compute what the checkpoint says"
        )

    def _expected(
        self, expert: int, stored: Mapping[str, torch.Tensor], y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(s y, how far it may be off), both float64 [scales], of what this rank adds.

        Args:
            y: float64 [scales, H], for the rounding of it.
        """
        method, experts = self.method, self.method.experts
        here = slice(method.sizes.rank * method.sizes.here, (method.sizes.rank + 1) * method.sizes.here)
        order = method.orders.rows[expert]
        mine = torch.arange(method.sizes.intermediate) if order is None else torch.from_numpy(order).long()
        mine = mine[here]
        scales = torch.tensor(SCALES, dtype=torch.float64)[:, None]
        kinds = [kind for kind in ("gate", "up") if kind in experts.patterns]
        first = [stored[experts.linear(kind, expert)][mine].double() for kind in kinds]
        activation, eps = activation_of(self.layer), torch.finfo(method.moe.in_dtype).eps
        products = [scales * one[:, 0] for one in first]
        h = activate(activation, torch.cat(products, 1))
        down = stored[experts.linear("down", expert) + TRANSPOSED][mine].double()

        # Each number is rounded, and so may be each weight, independently: variances add up.
        variance = (eps * h) ** 2
        for i, one in enumerate(first):
            off = [*products]
            off[i] = off[i] + eps * scales * (one[:, 0].abs() + one[:, 1])
            variance += (activate(activation, torch.cat(off, 1)) - h) ** 2
        if method.scheme.activations is not None:  # h is rounded by its largest
            variance += (h.abs().amax(1, keepdim=True) / 254) ** 2
        total = ((down[:, 0] * variance.sqrt()) ** 2 + (eps * down[:, 1] * h) ** 2).sum(1)
        total += (127 * eps / 2) ** 2 * (y**2).sum(1)
        return h @ down[:, 0], SURE * total.sqrt()
