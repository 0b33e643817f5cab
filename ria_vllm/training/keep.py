"""Keeps pruned weights at zero while any optimizer trains the model.

Two things are done to each pruned weight, wherever its trainer keeps it by then:

- Its gradient is zeroed outside the mask as soon as it has been accumulated. So the norm that gradients are clipped by,
  momenta and second moments are those of a model that has only the kept weights.
- After each step of an optimizer the weight itself is zeroed outside the mask. Some optimizers move every weight
  whatever its gradient (Muon mixes rows and columns), and some state is older than the masks.

Names, classes and the number of parameters stay as they are, so checkpoints of trainers are ordinary ones. They have
the model's own names and shapes, not those of the dense model's files: trainers go back to a checkpoint by
`load_state_dict`, which converts nothing, unlike `from_pretrained`, and only warns about tensors that it does not find.
One with the names of the files is refused.

The weight is looked up anew at each step: FSDP2 and `to("meta")` put another parameter into its place. A mask has a bit
for each weight, beside it; if the weight is sharded (DTensor), the whole mask is on the CPU, and its shard beside the
weight's.
"""

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ria_vllm.checkpoint.companions import companions
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.hf.inputs import round_inputs
from ria_vllm.hf.placement import ORIGIN_ATTRIBUTE, Origin
from ria_vllm.training.adapters import clean_name, has_adapters
from ria_vllm.training.kept_weight import KeptWeight
from ria_vllm.training.masks import holder, mask_of, origin_of
from ria_vllm.training.ranks import is_first, together

ATTRIBUTE = "_ria_kept"
_LOST = (
    "The next step would lose what it holds there. A merged adapter leaves values there (by rounding even after "
    "`unmerge_adapter`), and so do PiSSA and checkpoints of the dense model or with other masks. Train the weight "
    "before anything else changes it, or train only the adapter (`requires_grad_(False)`)."
)


def keep_sparse(model: nn.Module, like: str | Path | None = None) -> None:
    """From now on, optimizers change only the kept weights of the model's pruned linears.

    Copies of the model made by `copy.deepcopy` are kept sparse, too. Where torch.distributed is initialized, all ranks
    must call this; what one of them finds, all raise.

    `save_pretrained` then writes the model's own names and shapes. `load_state_dict` raises RiaError for a checkpoint
    with those of the dense model's files. A forward pass and a step raise it if a pruned linear was replaced by another
    module, an optimizer's first step with a weight, and the first after `load_state_dict`, if that is not zero outside
    its mask by then, and a step that trains such a weight if the model has adapters of PEFT.

    Args:
        model: what `from_pretrained` made of a compressed folder, wrapped or sharded or not.
        like: the compressed folder, needed only if the model was loaded from a dense one, such as a trainer's
            checkpoint.

    Raises:
        RiaError: the folder is not there any more, or does not belong to the model; a weight outside a mask is not
            zero; a trainer has flattened the weights (FSDP1, DeepSpeed ZeRO-3).
    """
    together(lambda: _keep_sparse(model, like))


def _in_int8(model: nn.Module, reader: Reader) -> list[str]:
    """The weights of dense linears that the folder has in int8, in a model that was not loaded from it.

    Raises:
        RiaError: one has another name there.
    """
    names = [f"{name}.weight" for name in reader.schema.int8_linears]
    if lost := sorted(set(names) - {name for name, _ in model.named_parameters()}):
        raise RiaError(
            f"{reader.folder}: {lost[0]} has another name in the model, so its inputs would not be rounded. Load the "
            "folder itself instead of a dense one."
        )
    return names


def _keep_sparse(model: nn.Module, like: str | Path | None) -> None:
    base, origin = origin_of(model, like)
    if getattr(base, ATTRIBUTE, None) is not None:
        return
    reader = Reader(origin.folder)
    companions(origin.folder)  # which `save` copies: its errors should not come after the training
    weights = []
    seen: dict[int, KeptWeight] = {}
    for name, placement in origin.placements.items():
        module, leaf = holder(base, name)
        mask = placement.join(lambda linear: mask_of(reader, linear))
        weight = KeptWeight(name, module, leaf, mask)
        parameter = weight.parameter()
        twin = seen.setdefault(id(parameter), weight)
        if not torch.equal(twin.dropped, weight.dropped):
            raise RiaError(f"{name}: one parameter with {twin.name}, but pruned differently. Untie them first.")
        # Other ranks may have no weights yet (FSDP's cpu_ram_efficient_loading).
        if is_first() or isinstance(parameter, DTensor):
            weight.check_zeros(origin.folder)
        weights.append(weight)
    rounded = reader.schema.input_dtype
    if rounded is not None and getattr(base, ORIGIN_ATTRIBUTE, None) is None:
        # As loading the folder itself would have done.
        round_inputs(base, [*origin.placements, *_in_int8(base, reader)], origin.folder, rounded)
    kept = KeptWeights(weights, base, origin)
    kept.mask_gradients()
    setattr(base, ATTRIBUTE, kept)
    setattr(base, ORIGIN_ATTRIBUTE, origin)  # known now, if it was found by `like`
    base._weight_conversions = []  # what `save_pretrained` undoes
    base.register_forward_pre_hook(kept.before_forward)
    base.register_load_state_dict_post_hook(kept.after_load_state_dict)


class KeptWeights:
    """All of a model's, known to the hooks on optimizers as long as the model exists.

    Args:
        base: the model.
        origin: of its masks, and of its weights.

    Attributes:
        checked: for each optimizer the names of the weights that were found to be zero outside their masks before its
            first step that trained them, since the last `load_state_dict`.
    """

    def __init__(self, weights: list[KeptWeight], base: nn.Module, origin: Origin):
        self.weights, self.origin = weights, origin
        self.checked: weakref.WeakKeyDictionary[torch.optim.Optimizer, set[str]] = weakref.WeakKeyDictionary()
        self.base = weakref.ref(base)
        self._watch()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"base": self.base(), "checked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, made by `copy.deepcopy` or in another process: its model is kept sparse, too."""
        self.__dict__.update(state | {"base": weakref.ref(state["base"]), "checked": weakref.WeakKeyDictionary()})
        self._watch()

    def _watch(self) -> None:
        _ALIVE.add(self)
        if not _HANDLES:
            _HANDLES.append(register_optimizer_step_pre_hook(_before_step))
            _HANDLES.append(register_optimizer_step_post_hook(_after_step))

    @torch.compiler.disable
    def before_forward(self, *_: Any) -> None:
        """Whatever the parameters are by now: their gradients get masked."""
        self.check_modules()
        self.mask_gradients()

    def after_load_state_dict(self, base: nn.Module, keys: Any) -> None:
        """Whatever was loaded, perhaps the checkpoint of another model: the next step is again the first one.

        Raises:
            RiaError: the checkpoint lacks tensors under the model's names, and has them under those of files.
        """
        self._check_names(base, keys)
        self.checked.clear()

    def _check_names(self, base: nn.Module, keys: Any) -> None:
        """Refuse a checkpoint with the names of files, which `load_state_dict` does not know."""
        if not (keys.unexpected_keys and keys.missing_keys and self.origin.conversions):
            return
        missing = sorted(map(clean_name, keys.missing_keys))
        names = [name for name, _ in base.named_parameters()]
        # What wraps the model puts a prefix before all names.
        prefixes = {key.removesuffix(name) for key in missing for name in names if f".{key}".endswith(f".{name}")}
        for key in map(clean_name, keys.unexpected_keys):
            if any(self._converts(key.removeprefix(prefix)) for prefix in prefixes if key.startswith(prefix)):
                raise RiaError(
                    f"{missing[0]}: not in the checkpoint, which has {key} instead, so training would go on from other "
                    "weights than it holds. Load it by `from_pretrained`, and call keep_sparse(model, like=OUT), with "
                    "the compressed folder."
                )

    def _converts(self, name: str) -> bool:
        """Whether `from_pretrained` gives a tensor of this name in a file to the model under another one."""
        return any(entry.rename_source_key(name)[0] != name for entry in self.origin.conversions)

    def check_modules(self) -> None:
        """Check that the model still has the modules of its pruned weights.

        Raises:
            RiaError: another one is in the place of one of them.
        """
        base = self.base()
        present = set() if base is None else set(base.modules())
        for weight in self.weights:
            if base is not None and weight.module not in present:
                raise RiaError(
                    f"{weight.name}: its module was replaced or removed after keep_sparse, so the weight is not kept "
                    "sparse any more. Leave the modules in place (mixed precision with fp8 replaces them), or call "
                    "keep_sparse after that."
                )

    def mask_gradients(self) -> None:
        for weight in self.weights:
            weight.hook(weight.parameter())

    def in_optimizer(self, optimizer: torch.optim.Optimizer) -> list[tuple[KeptWeight, torch.Tensor]]:
        """The weights that this optimizer changes, and their parameters.

        Raises:
            RiaError: one has another shape by now.
        """
        changed = _changed_by(optimizer)
        each = {id(weight.module._parameters.get(weight.leaf)): weight for weight in self.weights}
        return [(weight, weight.parameter()) for number, weight in each.items() if number in changed]

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Mask gradients, which may have come from elsewhere than a backward pass with hooks, or been changed after it.

        Raises:
            RiaError: a pruned weight is in another module by now; or is trained though the model has adapters of PEFT,
                or though it holds something outside its mask.
        """
        base = self.base()
        if base is not None and not _changed_by(optimizer).isdisjoint(map(id, base.parameters())):
            self.check_modules()  # not all trainers call the whole model
        found = self.in_optimizer(optimizer)
        trained = [weight for weight, parameter in found if parameter.requires_grad]
        if trained and base is not None and has_adapters(base):
            raise RiaError(
                f"{trained[0].name}: trained beside an adapter of PEFT, whose checkpoints hold only the adapter, so it "
                "would be lost. Train only the adapter (freeze the model by `requires_grad_(False)`), or only kept "
                "weights."
            )
        checked = self.checked.setdefault(optimizer, set())
        for weight in trained:
            if weight.name not in checked:
                weight.check_zeros(self.origin.folder, _LOST)
                checked.add(weight.name)
        for weight, parameter in found:
            weight.mask_gradient(parameter)
            weight.hook(parameter)


def _changed_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """The `id` of each parameter that an optimizer has."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


_ALIVE: "weakref.WeakSet[KeptWeights]" = weakref.WeakSet()
_HANDLES: list[Any] = []


@torch.no_grad()
def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for kept in list(_ALIVE):
        kept.before_step(optimizer)


@torch.no_grad()
def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for kept in list(_ALIVE):
        for weight, parameter in kept.in_optimizer(optimizer):
            if parameter.requires_grad:
                weight.zero_outside(parameter)
