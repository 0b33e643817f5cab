"""What a model family's decoder layer looks like. This is the only file that describes architectures.

Families listed here get folds (`ria_vllm.schema.Fold`), shared permutations and two sublayers per layer. Every other
causal LM with nn.Linear layers is pruned as well: linears that read the same tensor share a permutation, nothing is
folded, and the whole layer counts as one sublayer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.experts import experts_modules
from ria_vllm.schema import Fold, Producer

# Linears that vLLM fuses into one: all of a set are pruned, or none. In unknown families the same goes for all linears
# of a module that read the same tensor: w1 and w3, in_proj_qkv and in_proj_z, q_a_proj and kv_a_proj_with_mqa.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# vLLM's mixer passes no quantization method to its linears. (Its Mamba-2 mixer does.)
MAMBA_1 = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")

# Linears that choose experts. vLLM passes them no quantization method.
ROUTERS = ("router", "gate", "shared_expert_gate")

# Other linears to which vLLM passes no quantization method, or whose weights it reads directly: in latent attention, in
# DeepSeek's sparse attention and compressors, in Qwen's hyper-connections.
DENSE_ONLY = {
    "kv_b_proj", "weights_proj", "compressor", "o_a_proj",
    "input_mix_weight_down", "input_mix_weight_up", "block_inject_weight",
}  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """The attention heads that an output projection's input channels come from."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Group:
    """Linears of a layer that read the same input and so may share a permutation. Names are relative to the layer.

    heads: the input is the output of these attention heads, so the permutation must stay within them.
    experts: the module of routed experts whose gate and up projections belong to the group, too. Their down
        projections are pruned in the same stage, expert by expert.
    """

    linears: tuple[str, ...]
    heads: Heads | None = None
    experts: str | None = None


@dataclass(frozen=True)
class Sublayer:
    """A part of a layer that maps the residual stream to the residual stream: attention, MLP, or the whole layer.

    stages: groups whose statistics are gathered together; a later stage sees what the earlier ones pruned.
    ends_before: the submodule whose input is the stream after this sublayer; None: the layer's output is.
    zeroed: the attention module that comes before this sublayer in the layer, and whose output has to be zero when this
        sublayer is run by itself.
    additive: the stream after the sublayer is the one before it plus the output of the last stage's only linear.
    """

    name: str
    stages: tuple[tuple[Group, ...], ...]
    ends_before: str | None = None
    zeroed: str | None = None
    additive: bool = False

    @property
    def linears(self) -> list[str]:
        return [name for stage in self.stages for group in stage for name in group.linears]


@dataclass(frozen=True)
class Topology:
    """What all decoder layers have in common; names are relative to the layer.

    dense: linears that must stay dense -> why.
    together: sets of linears, besides those in `FUSED`, of which all are pruned or none.
    """

    sublayers: tuple[Sublayer, ...]
    folds: tuple[Fold, ...] = ()
    dense: Mapping[str, str] = field(default_factory=dict)
    together: tuple[frozenset[str], ...] = ()

    @property
    def linears(self) -> list[str]:
        return [name for sublayer in self.sublayers for name in sublayer.linears]

    def fused_with(self, name: str, linears: Iterable[str]) -> list[str]:
        """Those of a layer's `linears` that have to be pruned or dense together with `name`, in their order."""
        linears = list(linears)
        sets = [*self.together, *fused_sets(linears)]
        found, grown = {name}, True
        while grown:
            wider = found.union(*(names for names in sets if found & names))
            found, grown = wider, wider != found
        return [linear for linear in linears if linear in found]

    def absolute_folds(self, written: Callable[[int, str], str], layers: int) -> list[Fold]:
        """The folds under the names in the checkpoint.

        Args:
            written: (layer number, name relative to the layer) -> name in the checkpoint.
            layers: the number of layers.
        """
        names = {part.name for fold in self.folds for part in fold.producers} | {fold.consumer for fold in self.folds}
        patterns = {name: _pattern([written(index, name) for index in range(layers)]) for name in names}
        return [
            fold.model_copy(
                update={
                    "consumer": patterns[fold.consumer],
                    "producers": [p.model_copy(update={"name": patterns[p.name]}) for p in fold.producers],
                }
            )
            for fold in self.folds
            if None not in (patterns[fold.consumer], *(patterns[p.name] for p in fold.producers))
        ]


def fused_sets(linears: Iterable[str]) -> list[set[str]]:
    """The sets of linears in the modules of these `linears` that vLLM is known to fuse (see `FUSED`)."""
    parents = {linear.rpartition(".")[0] for linear in linears}
    return [{f"{parent}.{leaf}" if parent else leaf for leaf in fused} for parent in parents for fused in FUSED]


def _pattern(names: Sequence[str]) -> str | None:
    """The one name with `{i}` for the layer's number that gives `names`, one per layer; None if there is none."""
    parts = names[0].split(".")
    for position in [position for position, part in enumerate(parts) if part == "0"]:
        pattern = ".".join([*parts[:position], "{i}", *parts[position + 1 :]])
        if all(pattern.replace("{i}", str(index)) == name for index, name in enumerate(names)):
            return pattern
    return None


def decoder_layers(model: nn.Module, num_hidden_layers: int) -> str:
    """The path of the list of decoder layers in a model.

    Raises:
        RiaError: there is no such list with linears in it.
    """
    for path, module in model.named_modules():
        inside_another = any(part.isdigit() for part in path.split("."))
        if not isinstance(module, nn.ModuleList) or len(module) != num_hidden_layers or inside_another:
            continue
        if linears_of(module):
            return path
    raise RiaError(
        f"{type(model).__name__}: no list of {num_hidden_layers} decoder layers with nn.Linear in it, so there is "
        "nothing to prune. (GPT-2 and similar models use Conv1D, which this tool cannot prune.)"
    )


def linears_of(module: nn.Module) -> list[str]:
    """The names of the linears in a module, relative to it."""
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]


def describe(config: Any, layer: nn.Module, inputs: Iterable[tuple[str, int]]) -> Topology:
    """The topology of `layer`.

    Args:
        config: the text model's configuration.
        layer: one decoder layer; its weights may be on the meta device.
        inputs: (linear, identity of the tensor that it read), in the order of the calls in one forward pass.
    """
    known = FAMILIES.get(config.model_type)
    topology = known(config) if known else None
    if topology is None or set(topology.linears) != set(linears_of(layer)):
        return _unknown(layer, inputs)
    return topology


def served_dense(layer: nn.Module) -> dict[str, str]:
    """The linears of a layer that vLLM can only serve dense, by their names relative to it -> why."""
    linears = linears_of(layer)
    experts = [name for name, _ in layer.named_modules() if name.rpartition(".")[2] == "experts"]
    dense: dict[str, str] = {}
    for mixer, module in layer.named_modules():
        if type(module).__name__ in MAMBA_1:
            names = [name for name in linears if name.startswith(f"{mixer}.")]
            dense |= dict.fromkeys(names, "vLLM serves the linears of a Mamba-1 mixer dense only")
    for name in linears:
        parts = name.split(".")
        if DENSE_ONLY & set(parts) or name.endswith("indexer.wk"):
            dense[name] = "vLLM serves it dense only"
        elif any(name.startswith(f"{module}.") for module in experts):
            dense[name] = "belongs to a mixture of experts"
        elif "router" in parts or (experts and set(parts) & set(ROUTERS)):
            dense[name] = "chooses experts"
    return dense


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


def _two_sublayers(
    attention: Iterable[Group], mlp: Iterable[Group], between: str, additive: bool = True
) -> tuple[Sublayer, ...]:
    return (
        Sublayer("attention", tuple((group,) for group in attention), ends_before=between, additive=additive),
        Sublayer("mlp", tuple((group,) for group in mlp), zeroed="self_attn", additive=additive),
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
    return Topology(_two_sublayers(attention, mlp, between, additive), folds)


def _gemma(config: Any) -> Topology:
    # Norms come between the last linears and the stream.
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
    return Topology(_two_sublayers(attention, mlp, "post_attention_layernorm"), folds)


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
        return Topology(_two_sublayers(attention, mlp, "final_layer_norm"), folds)
    # Not split: run by itself, the MLP would apply the norm after attention once more.
    return Topology((Sublayer("layer", tuple((group,) for group in attention + mlp)),), folds)


def _unknown(layer: nn.Module, inputs: Iterable[tuple[str, int]]) -> Topology:
    dense = served_dense(layer)
    experts = experts_modules(layer)
    readers: dict[int, list[str]] = {}
    called: set[str] = set()
    for name, tensor in inputs:
        if name not in dense and name not in called:  # a linear that is called again counts for its first input
            readers.setdefault(tensor, []).append(name)
            called.add(name)
    dense |= {name: "takes no part in a forward pass" for name in linears_of(layer) if name not in called | set(dense)}
    mixtures = [next((name for name in names if name in experts), None) for names in readers.values()]
    groups = [tuple(name for name in names if name not in experts) for names in readers.values()]
    siblings: dict[tuple[int, str], set[str]] = {}
    for number, names in enumerate(groups):
        for name in names:
            siblings.setdefault((number, name.rpartition(".")[0]), set()).add(name)
    stage = tuple(Group(names, experts=mixture) for names, mixture in zip(groups, mixtures, strict=True))
    return Topology((Sublayer("layer", (stage,)),), dense=dense, together=tuple(map(frozenset, siblings.values())))


# Mistral, Qwen2 (with qkv biases) and Qwen3 (with norms on q and k heads) have Llama's blocks. Gemma 2 and 3 also have
# norms after them.
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
