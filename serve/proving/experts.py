"""Whether the routed experts of an MoE layer compute what the checkpoint says, one expert at a time.

An expert is no matrix: between its products is an activation. But the proofs of gate and up, G r and U r, say what
comes out of it, h, and the proof of the transposed down projection, D^T s, says what D makes of any h:
s (D h) = (D^T s) h. So the layer's kernel gets r under a few scales, each routed to a single expert, and what comes out
is multiplied by s. Biases are those that the layer was given.

Proofs that were made on the way from the files, see `ria_vllm.serve.load.file_proofs`, are of a part of r and s, so the
rest of both is zero.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import log2

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from ria_vllm.format.formats import FP8
from ria_vllm.format.proofs import TRANSPOSED
from ria_vllm.format.stacks import LayerExperts
from ria_vllm.format.weight_scheme import WeightScheme
from ria_vllm.serve.experts.dense import DenseExpertsMethod
from ria_vllm.serve.experts.loading import ExpertSizes
from ria_vllm.serve.experts.method import Sparse24MoEMethod
from ria_vllm.serve.experts.packing import activation_of, rows_of_w13
from ria_vllm.serve.kernels.routing import activate
from ria_vllm.serve.load.file_proofs import PLAIN, FileProofs, channels_of, rows_of
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.experts_matching import layers_of
from ria_vllm.serve.proving.proved import watch_packing

Vector = Callable[[int], torch.Tensor]

# Powers of two, for int8 rounds r under any of them exactly; the activation bends differently for each.
SCALES = (2.0**-7, 2.0**-9, 2.0**-5, 2.0**-11)
# How many standard deviations of all rounding errors together a product may be off.
SURE = 6.0


def proved_experts(config: RiaConfig, model: torch.nn.Module) -> Iterator["ProvedExperts"]:
    """The routed experts of all layers of a model."""
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, RoutedExperts)}
    dense: dict[str, list[LayerExperts]] = {}
    for experts in config.dense_experts().values():
        paths = layers_of(model, experts, layers) or []
        if len(paths) == 1:
            dense.setdefault(paths[0], []).append(experts)
    for path, layer in layers.items():
        method = layer.quant_method
        if isinstance(method, Sparse24MoEMethod):
            yield ProvedExperts(path, layer, method.experts, method.scheme)
        else:
            found = dense.get(path, []) if isinstance(method, DenseExpertsMethod) else []
            if len(found) == 1 and not layer.moe_config.has_bias:
                yield ProvedExperts(path, layer, found[0], PLAIN)
            else:
                yield GivenExperts.watched(path, layer)


@dataclass(frozen=True)
class ProvedExperts:
    """Experts of a layer on this rank; see `ria_vllm.serve.proving.proved.Proved`."""

    path: str
    layer: RoutedExperts
    experts: LayerExperts
    scheme: WeightScheme

    @property
    def is_stored(self) -> bool:
        """Whether one of our methods serves them."""
        return isinstance(self.layer.quant_method, Sparse24MoEMethod)

    @cached_property
    def matrices(self) -> list[str]:
        """Those of this rank's experts."""
        return [self.experts.linear(kind, expert) for expert in self._here for kind in self.experts.patterns]

    @cached_property
    def _here(self) -> list[int]:
        return self.layer.expert_map_manager.get_local_expert_ids()

    @cached_property
    def _sizes(self) -> ExpertSizes:
        return ExpertSizes.of(self.layer.moe_config)

    @property
    def given(self) -> Mapping[str, torch.Tensor]:
        """`FileProofs.found_of_experts` of what the layer held before it was packed."""
        return {}

    def can_be_proved(self, stored: Mapping[str, torch.Tensor]) -> bool:
        """Whether the proofs tell what comes out."""
        if self._biases is None or activation_of(self.layer) is None:
            return False
        ends = {kind: TRANSPOSED if kind == "down" else "" for kind in self.experts.patterns}
        wanted = (self.experts.linear(kind, e) + end for e in self._here for kind, end in ends.items())
        return all(name in stored for name in wanted) and self._can_be_asked

    @property
    def _biases(self) -> Mapping[tuple[str, int], torch.Tensor] | None:
        """(kind, expert) -> its bias [out]; None if they have biases that nobody has seen."""
        if not self.layer.moe_config.has_bias:
            return {}
        found = self.layer.quant_method.loader.biases if self.is_stored else {}
        return (
            found if all((kind, expert) in found for kind in self.experts.patterns for expert in self._here) else None
        )

    @property
    def _can_be_asked(self) -> bool:
        """Whether the kernel takes tokens outside of a step of the engine. vLLM's own may wait for other ranks."""
        method, moe = self.layer.quant_method, self.layer.moe_config
        alone = moe.dp_size == 1 and moe.pcp_size == 1 and not moe.is_sequence_parallel
        alone &= not moe.moe_parallel_config.enable_eplb  # which moves experts
        ours = self.is_stored and self.layer.ria_experts is not None
        return ours or (alone and not method.is_monolithic and moe.hidden_dim == moe.hidden_dim_unpadded)

    def problem(self, vector: Vector, stored: Mapping[str, torch.Tensor], whole: bool) -> str | None:
        """What is wrong with the experts, in a sentence; None if they compute what the proofs say.

        Args:
            vector: r, float32, of so many channels.
            whole: the proofs are of all channels and rows, as checkpoints have them.
        """
        method, dtype = self.layer.quant_method, self.layer.moe_config.in_dtype
        device = next(tensor.device for tensor in self.layer.parameters() if tensor.numel())
        # Kernels read float32, whatever the default is while a model is loaded.
        ones = torch.ones(len(SCALES), 1, dtype=torch.float32, device=device)
        wrong: list[int] = []
        for expert in self._here:
            r, s, scales = self._asked(expert, vector(self._sizes.hidden), whole)
            x = (scales * r).to(device, dtype)
            ids = torch.full((len(SCALES), 1), expert, dtype=torch.int32, device=device)
            y = method.apply(self.layer, x, ones.clone(), ids, None, None).cpu().double() * s.abs().bool()
            wanted, limit = self._expected(expert, stored, y, s, scales.double())
            if not bool((((y @ s - wanted).abs() <= limit) | limit.isinf()).all()):
                wrong.append(expert)
        if not wrong:
            return None
        ours = self.layer.ria_experts if self.is_stored else None
        how = "vLLM's own kernel" if ours is None else str(ours.choice)
        return (
            f"{self.experts.name} ({how}): {len(wrong)} of {len(self._here)} experts, the first of which is "
            f"{wrong[0]}, do not compute what the checkpoint says"
        )

    def _asked(self, expert: int, r: torch.Tensor, whole: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(r of the input, float32 [H]; s of the output, float64 [H]; scales of r, float32 [scales, 1])."""
        scales = torch.tensor(SCALES)[:, None]
        if whole:
            return r, r.double(), scales
        here, rows = channels_of(expert, len(r), self.scheme), rows_of(len(r))
        x, s = torch.zeros_like(r), torch.zeros_like(r)
        x[here], s[rows] = r[here], r[rows]
        # Few channels make small products, where an activation that multiplies does not tell gate from up.
        return x, s.double(), scales * 2.0 ** round(log2(len(r) / (here.stop - here.start)) / 2)

    def _expected(
        self,
        expert: int,
        stored: Mapping[str, torch.Tensor],
        y: torch.Tensor,
        s: torch.Tensor,
        scales: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(s y, how far it may be off), both float64 [scales], of what this rank adds.

        Args:
            y: float64 [scales, H], for the rounding of it.
            s: float64 [H].
            scales: float64 [scales, 1].
        """
        sizes, experts, biases = self._sizes, self.experts, self._biases
        p = self.layer.quant_method.permutations.rows[expert] if self.is_stored else None
        mine = torch.arange(sizes.intermediate) if p is None else torch.from_numpy(p).long()
        mine = mine[sizes.rank * sizes.here : (sizes.rank + 1) * sizes.here]
        kinds = [kind for kind in ("gate", "up") if kind in experts.patterns]
        first = [stored[experts.linear(kind, expert)][mine].double() for kind in kinds]
        added = [biases[kind, expert].double()[mine] if biases else torch.zeros(len(mine)) for kind in kinds]
        activation, unit = activation_of(self.layer), torch.finfo(self.layer.moe_config.in_dtype)
        assert activation is not None  # see `can_be_proved`
        # GPUs may multiply float32 with the mantissa of TF32, which is that of float16.
        tf32 = unit.dtype == "float32" and next(self.layer.parameters()).device.type == "cuda"
        eps = torch.finfo(torch.float16).eps if tf32 else unit.eps
        sums = torch.finfo(torch.float32).eps * torch.tensor([sizes.hidden, sizes.here]).sqrt()
        products = [scales * one[:, 0] + bias for one, bias in zip(first, added)]
        h = activate(activation, torch.cat(products, 1))
        down = stored[experts.linear("down", expert) + TRANSPOSED][mine].double()

        # Each number is rounded, and so may be each weight, independently: variances add up. Sums in float32 are off by
        # a unit, and by the root of the number of terms.
        variance = (eps * h) ** 2
        for i, (one, bias) in enumerate(zip(first, added)):
            off = [*products]
            rounded = eps * (one[:, 0].abs() + one[:, 1]) + sums[0] * one[:, 1]
            off[i] = off[i] + scales * rounded + eps * bias.abs()
            variance += (activate(activation, torch.cat(off, 1)) - h) ** 2
        if self.scheme.input_dtype is not None:  # h is rounded by its largest
            variance += (h.abs().amax(1, keepdim=True) / 254) ** 2
        packed = self.layer.ria_experts if self.is_stored else None
        if packed is not None and packed.choice.config.weight_format == FP8:  # kernels round h to 4 bits
            variance += (h / 32) ** 2
        total = ((down[:, 0] * variance.sqrt()) ** 2 + ((eps + sums[1]) * down[:, 1] * h) ** 2).sum(1)
        total += (127 * eps / 2) ** 2 * (y**2).sum(1)
        wanted = h @ down[:, 0]
        if biases and not sizes.rank:  # the ranks' outputs are added, the bias counts once
            bias = biases["down", expert].double()
            wanted, total = wanted + bias @ s, total + ((eps * bias * s) ** 2).sum()
        # Nothing is known of what float16 cannot hold: h, or a channel of y, of which the columns of D say how large.
        too_large = (h.abs() * down[:, 1].clamp(min=1)).sum(1) > unit.max / 4
        return wanted, (SURE * total.sqrt()).masked_fill(too_large, torch.inf)


@dataclass(frozen=True)
class GivenExperts(ProvedExperts):
    """Dense experts of this rank against what their layer held before it was packed.

    Their biases, or tensors that stack them, pass through vLLM's model alone, which has a way of its own to store each
    of them. So no proof tells what they should be; but that they compute what they were given can be shown.
    """

    @classmethod
    def watched(cls, path: str, layer: RoutedExperts) -> "GivenExperts":
        kinds = ("gate", "up", "down") if layer.moe_config.is_act_and_mul else ("up", "down")
        names = {kind: f"{path}.{{e}}.{kind}" for kind in kinds}
        found = cls(path, layer, LayerExperts(path, layer.moe_config.num_experts, names), PLAIN)
        watch_packing(layer, found.see)
        return found

    def see(self, layer: RoutedExperts) -> None:
        experts, biases = self.experts, {}
        made = FileProofs(lambda _: None, {name: (kind, e) for name, kind, e in experts.linears()}, others=False)
        here = self._sizes.here
        rows = rows_of_w13(layer, here, layer.w13_weight.shape[1], layer.w13_weight.device)
        places = dict(zip((kind for kind in experts.patterns if kind != "down"), rows))
        for expert in self._here:
            at = layer.expert_map_manager.map_global_to_local(expert)
            for kind in experts.patterns:
                weight, place = (layer.w2_weight, slice(None)) if kind == "down" else (layer.w13_weight, places[kind])
                part = weight.data[at][place]
                made.see(f"{experts.linear(kind, expert)}.weight", part[:, :here] if kind == "down" else part)
                if layer.moe_config.has_bias:
                    bias = layer.w2_bias if kind == "down" else layer.w13_bias
                    biases[kind, expert] = bias.data[at][place].to("cpu", copy=True)
        layer.__dict__["ria_given"] = made.found_of_experts, biases

    @property
    def given(self) -> Mapping[str, torch.Tensor]:
        found, _ = self.layer.__dict__.get("ria_given", ({}, {}))
        return found if self._can_be_asked and activation_of(self.layer) is not None else {}

    def can_be_proved(self, stored: Mapping[str, torch.Tensor]) -> bool:
        return False

    @cached_property
    def matrices(self) -> list[str]:
        return []  # by what name they are stored is not known

    @cached_property
    def _sizes(self) -> ExpertSizes:
        sizes = ExpertSizes.of(self.layer.moe_config)
        return replace(sizes, intermediate=sizes.here, rank=0, ranks=1)

    @property
    def _biases(self) -> Mapping[tuple[str, int], torch.Tensor]:
        return self.layer.__dict__["ria_given"][1]
