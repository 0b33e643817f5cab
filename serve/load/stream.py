"""The checkpoint's tensors on their way into vLLM's model.

vLLM's models may rename, fuse or rearrange them by rules of their own. Whether each layer then has what the files say
shows when it is proved, see `ria_vllm.serve.proving.layers`.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from vllm.model_executor import model_loader

from ria_vllm.compressed_tensors.packed_forms import Translation
from ria_vllm.errors import RiaError
from ria_vllm.format.proofs import PROOF_SUFFIX
from ria_vllm.serve.load.file_proofs import FileProofs
from ria_vllm.serve.load.layerwise import Reloads

# Scales of the key-value cache, which are stored beside a linear and belong to attention.
CACHE_SCALES = ("k_scale", "v_scale", "output_scale")

# By how the names of a linear's tensors end: those that store its weight, in any form that a layer loads.
WEIGHT_PARTS = ("weight", "compressed", "bitmask", "weight_scale", "integers")

# Where vLLM reads files.
LOADERS = Path(model_loader.__file__).parent

Taker = Callable[[str, torch.Tensor], None]
"""Loads a tensor, whose last part of the name comes first, in place of the model."""

Weights = Iterable[tuple[str, torch.Tensor]]
"""Names and tensors, as `model.load_weights` takes them."""


def _nothing(*_: object) -> None:
    """What a hook does that nobody set."""


@dataclass(frozen=True)
class Hooks:
    """What happens around the loads of a model. Each raises a RiaError to refuse.

    Attributes:
        before_reload: called before weights replace others; its argument is whether they come from the model's files.
        after_load: do the files lack weights? Called after the first load from them.
        prove: do layers compute what the files say? Called once all weights are packed. If somebody has sent them, the
            first argument are the proofs that came with them, perhaps none; the second is whether this was the first
            load.
        file_proofs: sees each tensor that comes from a file.
        forms: linears of our layers -> how the names of the tensors that store their weights end.
        takers: linears, or whole names of tensors, that the model must not see -> who takes their tensors; None if
            nobody here needs them.
        translation: of tensors that are stored in a form that no layer takes. It comes before everything else.
        loaded: the model has weights already: dummies.
        embeddings: see `Reloads`.
    """

    before_reload: Callable[[bool], None] = _nothing
    after_load: Callable[[], None] = _nothing
    prove: Callable[[Mapping[str, torch.Tensor] | None, bool], None] = _nothing
    file_proofs: FileProofs | None = None
    forms: Mapping[str, Collection[str]] = field(default_factory=dict)
    takers: Mapping[str, Taker | None] = field(default_factory=dict)
    translation: Translation | None = None
    loaded: bool = False
    embeddings: bool = True


class WeightStream:
    """Stands between vLLM's loaders and a model, at the start and in every reload.

    Attributes:
        proofs: matrix -> its proof, which somebody has sent beside the weights.
        seen: the names of the tensors that have come in this load or reload.
        loaded: the model has weights.
        packed: they are packed.
        from_files: those that have come last are of all files, and not proved yet.
    """

    def __init__(self, model: torch.nn.Module, hooks: Hooks):
        self.hooks = hooks
        self.proofs: dict[str, torch.Tensor] = {}
        self.seen: set[str] = set()
        self.loaded = hooks.loaded
        self.packed = self.from_files = False
        self._load = model.load_weights
        self._process = getattr(model, "process_weights_after_loading", _nothing)
        self.reloads = Reloads(model, self._after_reload, hooks.embeddings, self._forget, hooks.loaded)

        @functools.wraps(self._load)
        def load_weights(weights: Weights, *args: object, **kwargs: object) -> object:
            return self._load_weights(weights, *args, **kwargs)

        model.load_weights = load_weights
        model.process_weights_after_loading = self._when_packed
        model.ria_reloads = self.reloads

    def _load_weights(self, weights: Weights, *args: object, **kwargs: object) -> object:
        try:
            return self._load_checked(weights, *args, **kwargs)
        except BaseException:
            self._forget()
            self.reloads.give_up()
            raise

    def _forget(self) -> None:
        self.proofs.clear()
        self.seen.clear()
        if self.hooks.file_proofs is not None:
            self.hooks.file_proofs.forget()

    def _load_checked(self, weights: Weights, *args: object, **kwargs: object) -> object:
        hooks, first, all_files = self.hooks, not self.loaded, are_files(weights)
        self.from_files = False
        if self.packed and not self.reloads.is_on:
            raise RiaError(
                "weights arrive outside of a reload, or after one that was refused or in which the model has computed. "
                "Load them with vLLM's reload_weights or its weight transfer, or start the server again."
            )
        # vLLM's loaders read files lazily. A list is a piece of what a trainer sends; it comes from no file.
        lazy = not isinstance(weights, list | tuple)
        if self.loaded:
            hooks.before_reload(lazy)
        self.loaded = True
        weights = self._once(weights, all_files or first)
        if hooks.translation is not None:
            weights = hooks.translation.translate(weights, lazy)
        result = self._load(self._passed(weights, hooks.file_proofs if lazy else None), *args, **kwargs)
        if not self.reloads.is_on:
            self.seen.clear()
        if first and lazy:
            hooks.after_load()
        self.from_files = all_files or (first and lazy)  # a loader of another package reads the model's files, too
        self.reloads.from_files = self.from_files
        return result

    def _once(self, weights: Weights, from_files: bool) -> Weights:
        """The same weights, each of which comes once.

        Raises:
            RiaError: there is a second tensor of the same name, which would replace the first, or be dropped by vLLM.
        """
        for name, tensor in weights:
            if name in self.seen and from_files:
                raise RiaError(
                    f"{name} is in two of the weight files that vLLM loads. Remove the files that do not belong to the "
                    "model, or get all files of one run."
                )
            if name in self.seen:
                raise RiaError(f"{name} was sent twice in one reload, and only one would count. Send it once.")
            self.seen.add(name)
            yield name, tensor

    def _passed(self, weights: Weights, file_proofs: FileProofs | None) -> Weights:
        """The same weights, but proofs, and those that somebody takes in place of the model."""
        takers, forms = self.hooks.takers, self.hooks.forms
        for name, tensor in weights:
            module, _, part = name.rpartition(".")
            if name.endswith(PROOF_SUFFIX):
                self.proofs[module] = tensor.to("cpu", copy=True)
                continue
            if file_proofs is not None:
                file_proofs.see(name, tensor)
            if (module in takers or name in takers) and part not in CACHE_SCALES:
                take = takers[name] if name in takers else takers[module]
                if take is not None:
                    take(part, tensor)
                continue
            if module in forms and part in WEIGHT_PARTS and part not in forms[module]:
                # Some of vLLM's models drop what they have no place for, and the layer would keep its old weights.
                raise RiaError(
                    f"{name}: this server has the linear stored as {', '.join(forms[module])}. Send these tensors, as "
                    "the folder that it serves has them, or start a server of the new weights."
                )
            yield name, tensor

    def _when_packed(self) -> None:
        """vLLM calls this when all layers of a model are packed."""
        self.packed = True
        self._process()
        self._prove(first=True)

    def _after_reload(self) -> None:
        if self.hooks.translation is not None:
            self.hooks.translation.finish()
        self._prove(first=False)

    def _prove(self, first: bool) -> None:
        """Prove what has come."""
        from_files, self.from_files = self.from_files, False
        sent = dict(self.proofs)
        self.proofs.clear()
        if from_files or sent or not first:  # else these are dummies
            self.hooks.prove(None if from_files else sent, first)


def are_files(weights: Weights) -> bool:
    """Whether they are what a loader of vLLM reads from files, and not what somebody sends, perhaps lazily, too."""
    return inspect.isgenerator(weights) and Path(weights.gi_code.co_filename).is_relative_to(LOADERS)
