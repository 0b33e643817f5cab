"""The checkpoint's tensors on their way into vLLM's model.

vLLM's models may rename, fuse or rearrange them by rules of their own. Whether each layer then has what the files say
shows when it is proved, see `ria_vllm.serve.proving.layers`.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from vllm.model_executor import model_loader

from ria_vllm.compressed_tensors.packed_forms import Translation
from ria_vllm.errors import RiaError
from ria_vllm.format.proofs import PROOF_SUFFIX
from ria_vllm.serve.load.layerwise import Reloads

# Scales of the key-value cache, which are stored beside a linear and belong to attention.
CACHE_SCALES = ("k_scale", "v_scale", "output_scale")

# Where vLLM reads files.
LOADERS = Path(model_loader.__file__).parent

Taker = Callable[[str, torch.Tensor], None]
"""Loads a tensor, whose last part of the name comes first, in place of the model."""


class WeightStream:
    """Stands before `model.load_weights`.

    Attributes:
        proofs: matrix -> its proof, which somebody has sent beside the weights.
    """

    def __init__(self) -> None:
        self.proofs: dict[str, torch.Tensor] = {}

    def attach(
        self,
        model: torch.nn.Module,
        before_reload: Callable[[bool], None],
        after_load: Callable[[], None] = lambda: None,
        loaded: bool = False,
        takers: Mapping[str, Taker | None] = MappingProxyType({}),
        translation: Translation | None = None,
        after_reload: Callable[[Sequence[str]], None] = lambda left_out: None,
        check_files: Callable[[], None] = lambda: None,
        arrivals: Mapping[str, Callable[[str], None]] = MappingProxyType({}),
        embeddings: bool = True,
        prove: Callable[[Mapping[str, torch.Tensor] | None, bool], None] = lambda sent, first: None,
        watch_files: Callable[[str, torch.Tensor], None] | None = None,
    ) -> None:
        """Stand between vLLM's loaders and `model`, now and on every reload.

        Args:
            before_reload: raises a RiaError if the weights must not be loaded into this model. Its argument is whether
                vLLM reads them from the model's files.
            after_load: raises a RiaError if the model's files lack weights. It comes after the first load from them.
            loaded: the model has weights already: dummies.
            takers: linears, or whole names of tensors, that the model must not see -> who takes their tensors; None if
                nobody here needs them.
            translation: of tensors that are stored in a form that no layer takes. It comes before everything else.
            after_reload: raises a RiaError if a reload from files has left layers out, whose paths it is given.
            check_files: raises a RiaError if the model's files are not those that it was built for. It comes before the
                first tensor of the first load by one of vLLM's loaders, which then has downloaded the files, and after
                the last one, because it opens one file after the other.
            arrivals: linears -> called with the last part of the name of each of their tensors; raises a RiaError if
                the linear's layer will not take it.
            embeddings: see `Reloads`.
            prove: raises a RiaError if layers do not compute what the model's files say, once all weights are packed.
                If somebody has sent the weights, its first argument are the proofs that came with them; the second is
                whether this was the first load.
            watch_files: called with each tensor that comes from a file, and its name.
        """
        load = model.load_weights
        complete = False  # the last load was one of all files
        elsewhere = {name for name, taker in takers.items() if taker is None}

        def load_checked(weights: Iterable[tuple[str, torch.Tensor]], *args: object, **kwargs: object) -> object:
            nonlocal loaded, complete
            complete = False
            first, all_files = not loaded, are_files(weights)
            if packed and not reloads.is_on:
                raise RiaError(
                    "weights arrive outside of a reload, when all layers are packed. Load them with vLLM's "
                    "reload_weights or its weight transfer, or start the server again."
                )
            # vLLM's loaders read files lazily. A list is a piece of what a trainer sends; it comes from no file.
            from_files = not isinstance(weights, list | tuple)
            if loaded:
                before_reload(from_files)
            elif all_files:
                weights = checked(weights, check_files)
            loaded = True
            if from_files:
                weights = once(weights)
            if translation is not None:
                weights = translation.translate(weights, from_files, elsewhere)
            watch = watch_files if from_files else None
            result = load(self.passed(weights, takers, arrivals, watch), *args, **kwargs)
            if first and all_files:
                check_files()
            if first and from_files:
                after_load()
            complete = all_files
            return result

        @functools.wraps(load)
        def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: object, **kwargs: object) -> object:
            try:
                return load_checked(weights, *args, **kwargs)
            except BaseException:
                self.proofs.clear()
                reloads.give_up()
                raise

        def finish_reload(left_out: Sequence[str]) -> None:
            if translation is not None:
                translation.finish()
            if complete:
                after_reload(left_out)
            finish(first=False)

        def finish(first: bool) -> None:
            """Prove what has come from files, or with proofs."""
            nonlocal complete
            from_files, complete = complete, False
            sent = dict(self.proofs)
            self.proofs.clear()
            if from_files or sent:
                prove(None if from_files else sent, first)

        packed = False
        process = getattr(model, "process_weights_after_loading", None)

        def process_weights_after_loading() -> None:
            """vLLM calls this when all layers of a model are packed."""
            nonlocal packed
            packed = True
            if process is not None:
                process()
            finish(first=True)

        reloads = Reloads(model, torch.get_default_dtype(), finish_reload, embeddings, self.proofs.clear)
        model.load_weights = load_weights
        model.process_weights_after_loading = process_weights_after_loading
        model.ria_reloads = reloads

    def passed(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        takers: Mapping[str, Taker | None],
        arrivals: Mapping[str, Callable[[str], None]],
        watch: Callable[[str, torch.Tensor], None] | None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The same weights, but those that `takers` take.

        Raises:
            RiaError: one of `arrivals` refuses a tensor.
        """
        for name, tensor in weights:
            module, _, part = name.rpartition(".")
            if name.endswith(PROOF_SUFFIX):
                self.proofs[module] = tensor.to("cpu", copy=True)
                continue
            if watch is not None:
                watch(name, tensor)
            if (module in takers or name in takers) and part not in CACHE_SCALES:
                take = takers[name] if name in takers else takers[module]
                if take is not None:
                    take(part, tensor)
                continue
            if module in arrivals:
                arrivals[module](part)
            yield name, tensor


def are_files(weights: Iterable[tuple[str, torch.Tensor]]) -> bool:
    """Whether they are what a loader of vLLM reads from files, and not what somebody sends, perhaps lazily, too."""
    return inspect.isgenerator(weights) and Path(weights.gi_code.co_filename).is_relative_to(LOADERS)


def checked(
    weights: Iterable[tuple[str, torch.Tensor]], check: Callable[[], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights; `check` is called when the first one is there."""
    done = False
    for one in weights:
        if not done:
            check()
            done = True
        yield one


def once(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights, each of which comes from one file.

    Raises:
        RiaError: vLLM has read a second tensor of the same name, which would replace the first.
    """
    seen: set[str] = set()
    for name, tensor in weights:
        if name in seen:
            raise RiaError(
                f"{name} is in two of the weight files that vLLM loads. Remove the files that do not belong to the "
                "model, or get all files of one run."
            )
        seen.add(name)
        yield name, tensor
