"""What a model family's decoder layer looks like: the only place that knows architectures.

Families listed here get folds (`ria_vllm.schema.Fold`), shared permutations and two components a
layer. Every other causal LM with nn.Linear layers is pruned too: linears that read the same tensor share a permutation,
nothing is folded, and the whole layer is one component.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.schema import Fold, Producer

# Linears that vLLM serves as one: all of a set are pruned, or none.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# vLLM's mixer gives its linears no quantization method. (That of Mamba 2 does.)
MAMBA_1 = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")


@dataclass(frozen=True)
class Heads:
    """Attention heads behind an output projection's input channels."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Group:
    """Linears of a layer that read the same input and so may share a permutation. Names are relative to the layer.

    heads: the input is what these attention heads put out; the permutation must keep to them.
    """

    linears: tuple[str, ...]
    heads: Heads | None = None


@dataclass(frozen=True)
class Component:
    """A part of a layer that takes the residual stream to the residual stream.

    stages: groups whose statistics are gathered together; a later stage sees what an earlier one pruned.
    ends_before: the submodule whose input is the stream that this component leaves (None: the end of the layer).
    silenced: the submodule that ran before this component and has to add nothing to the stream it starts from.
    additive: the stream after the component is the one before it plus the output of the last stage's one linear.
    """

    name: str
    stages: tuple[tuple[Group, ...], ...]
    ends_before: str | None = None
    silenced: str | None = None
    additive: bool = False

    @property
    def linears(self) -> list[str]:
        return [name for stage in self.stages for group in stage for name in group.linears]


@dataclass(frozen=True)
class Topology:
    """Components of every decoder layer, folds with layer-relative names, linears that must stay dense (and why)."""

    components: tuple[Component, ...]
    folds: tuple[Fold, ...] = ()
    dense: Mapping[str, str] = field(default_factory=dict)

    @property
    def linears(self) -> list[str]:
        return [name for component in self.components for name in component.linears]

    def absolute_folds(self, layers: str) -> list[Fold]:
        """The folds with full names; `layers` is the path of the list of decoder layers."""
        prefix = f"{layers}.{{i}}."
        return [
            fold.model_copy(
                update={
                    "consumer": prefix + fold.consumer,
                    "producers": [p.model_copy(update={"name": prefix + p.name}) for p in fold.producers],
                }
            )
            for fold in self.folds
        ]


def decoder_layers(model: nn.Module, num_hidden_layers: int) -> str:
    """The path of the list of decoder layers.

    Raises:
        RiaError: there is no such list with linears in it.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_hidden_layers and linears_of(module):
            return path
    raise RiaError(
        f"{type(model).__name__}: no list of {num_hidden_layers} decoder layers with nn.Linear in it, so there is nothing "
        "to prune. (GPT-2 and its kin use Conv1D, which cannot be pruned here.)"
    )


def linears_of(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]


def describe(config: Any, layer: nn.Module, inputs: Iterable[tuple[str, int]]) -> Topology:
    """The topology of `layer`.

    Args:
        config: the text model's configuration.
        layer: one decoder layer; its weights may be on the meta device.
        inputs: (linear, identity of the tensor it read), in the order of the calls of one forward pass.
    """
    known = FAMILIES.get(config.model_type)
    topology = known(config) if known else None
    if topology is None or set(topology.linears) != set(linears_of(layer)):
        return _unknown(layer, inputs)
    return topology


def fused_with(name: str, linears: Iterable[str]) -> list[str]:
    """The linears of the same layer that vLLM fuses with `name`, itself included."""
    parent, _, leaf = name.rpartition(".")
    for fused in FUSED:
        if leaf in fused:
            siblings = {f"{parent}.{other}" if parent else other for other in fused}
            return [other for other in linears if other in siblings]
    return [name]


def _heads(config: Any) -> Heads:
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return Heads(num_heads, num_kv_heads, head_dim)


def _attention_fold(consumer: str, producer: Producer, heads: Heads) -> Fold:
    return Fold(
        consumer=consumer,
        producers=[producer],
        coupling="heads",
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
    )


def _two_components(
    attention: Iterable[Group], mlp: Iterable[Group], between: str, additive: bool = True
) -> tuple[Component, ...]:
    return (
        Component("attention", tuple((group,) for group in attention), ends_before=between, additive=additive),
        Component("mlp", tuple((group,) for group in mlp), silenced="self_attn", additive=additive),
    )


def _llama(config: Any, between: str = "post_attention_layernorm", additive: bool = True) -> Topology:
    heads = _heads(config)
    attention = (
        Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Group(("self_attn.o_proj",), heads),
    )
    mlp = (Group(("mlp.gate_proj", "mlp.up_proj")), Group(("mlp.down_proj",)))
    folds = (
        _attention_fold("self_attn.o_proj", Producer(name="self_attn.v_proj"), heads),
        Fold(
            consumer="mlp.down_proj",
            producers=[Producer(name="mlp.gate_proj"), Producer(name="mlp.up_proj")],
            coupling="elementwise",
        ),
    )
    return Topology(_two_components(attention, mlp, between, additive), folds)


def _gemma(config: Any) -> Topology:
    # Norms stand between the last linears and the stream.
    return _llama(config, between="pre_feedforward_layernorm", additive=False)


def _phi3(config: Any) -> Topology:
    heads = _heads(config)
    queries, keys = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    width = config.intermediate_size
    values = Producer(name="self_attn.qkv_proj", rows=(queries + keys, queries + 2 * keys))
    halves = [Producer(name="mlp.gate_up_proj", rows=rows) for rows in ((0, width), (width, 2 * width))]
    attention = (Group(("self_attn.qkv_proj",)), Group(("self_attn.o_proj",), heads))
    mlp = (Group(("mlp.gate_up_proj",)), Group(("mlp.down_proj",)))
    folds = (
        _attention_fold("self_attn.o_proj", values, heads),
        Fold(consumer="mlp.down_proj", producers=halves, coupling="elementwise"),
    )
    return Topology(_two_components(attention, mlp, "post_attention_layernorm"), folds)


def _opt(config: Any) -> Topology:
    num_heads = config.num_attention_heads
    heads = Heads(num_heads, num_heads, config.hidden_size // num_heads)
    attention = (
        Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        Group(("self_attn.out_proj",), heads),
    )
    mlp = (Group(("fc1",)), Group(("fc2",)))
    folds = (
        _attention_fold("self_attn.out_proj", Producer(name="self_attn.v_proj"), heads),
        Fold(consumer="fc2", producers=[Producer(name="fc1")], coupling="elementwise"),
    )
    if config.do_layer_norm_before:
        return Topology(_two_components(attention, mlp, "final_layer_norm"), folds)
    # The norm after attention would be applied twice to a stream that starts between the two parts.
    return Topology((Component("layer", tuple((group,) for group in attention + mlp)),), folds)


def _unknown(layer: nn.Module, inputs: Iterable[tuple[str, int]]) -> Topology:
    experts = [name.rpartition(".")[0] for name, _ in layer.named_modules() if name.rpartition(".")[2] == "experts"]
    dense = {
        name: "belongs to a mixture of experts"
        for name in linears_of(layer)
        if any(name.startswith(f"{block}.") for block in experts)
    }
    for mixer, module in layer.named_modules():
        if type(module).__name__ in MAMBA_1:
            names = [name for name in linears_of(layer) if name.startswith(f"{mixer}.")]
            dense |= dict.fromkeys(names, "vLLM serves the linears of a Mamba-1 mixer dense only")
    readers: dict[int, list[str]] = {}
    for name, tensor in inputs:
        if name not in dense:
            readers.setdefault(tensor, []).append(name)
    called = {name for names in readers.values() for name in names}
    dense |= {name: "takes no part in a forward pass" for name in linears_of(layer) if name not in called | set(dense)}
    stage = tuple(Group(tuple(dict.fromkeys(names))) for names in readers.values())
    return Topology((Component("layer", (stage,)),), dense=dense)


# Mistral, Qwen2 (qkv biases) and Qwen3 (norms on q and k heads) share Llama's blocks; Gemma norms after them too.
FAMILIES = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma": _llama,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "phi3": _phi3,
    "opt": _opt,
}
