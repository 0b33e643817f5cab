"""vLLM's layer-by-layer reload: afterwards a model has the weights that it should have, or it computes nothing.

vLLM packs each layer as soon as its tensors have arrived, and replaces the old weights by the result. It does not take
care of

- layers that share their weights with another: the head of a model with tied embeddings gets no tensor of its own, and
  on CPUs keeps what it has packed; Mamba-2's mixer keeps what the convolution held before it was packed;
- layers that get a part of their tensors: the rest is memory that nobody has written;
- reloads that fail, or are left by who began them: their tensors would go into the next one;
- models that such a reload has left with new weights in some layers and old ones in others;
- models that have lost their weights, because the server has slept at level 2, or never had any but dummies.

vLLM has no hooks for this, so `watch_reloads`, `watch_reloads_of` and `watch_sleep` wrap five of its functions.
"""

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.distributed.distributed_c10d import _get_default_store
from vllm.config import set_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, get_numel_loaded
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

from ria_vllm.errors import RiaError
from ria_vllm.serve.load.completeness import EMPTY, dense_layers

_ORIGINAL = "ria_original"
# Seconds that a rank waits for others when it has its new weights.
PATIENCE = 300


def watch_reloads() -> None:
    """Have the reloads of our models begin, pack and end as `Reloads` says."""
    begin, pack, end = (
        _original(function)
        for function in (
            layerwise.initialize_layerwise_reload,
            layerwise._layerwise_process,
            layerwise.finalize_layerwise_processing,
        )
    )

    @functools.wraps(begin)
    def initialize_layerwise_reload(model: torch.nn.Module) -> None:
        reloads = getattr(model, "ria_reloads", None)
        if reloads is None:
            begin(model)
        else:
            reloads.begin(begin)

    @functools.wraps(pack)
    def _layerwise_process(layer: torch.nn.Module, info: LayerReloadingInfo) -> None:
        path = layer.__dict__.get("ria_path")
        if path is not None and info.kernel_tensors is not None:
            check_arrived(path, layer, info)
        pack(layer, info)
        if path is not None:
            layer.__dict__["ria_renewed"] = True

    @functools.wraps(end)
    def finalize_layerwise_processing(model: torch.nn.Module, model_config: Any) -> None:
        reloads = getattr(model, "ria_reloads", None)
        if reloads is None or not reloads.is_on:
            end(model, model_config)
        else:
            reloads.end(functools.partial(end, model, model_config))

    for wrapper, original in (
        (initialize_layerwise_reload, begin), (_layerwise_process, pack), (finalize_layerwise_processing, end)
    ):  # fmt: skip
        setattr(wrapper, _ORIGINAL, original)
    for module in holders(layerwise.initialize_layerwise_reload):
        module.initialize_layerwise_reload = initialize_layerwise_reload
    layerwise._layerwise_process = _layerwise_process
    layerwise.finalize_layerwise_processing = finalize_layerwise_processing


def watch_sleep(worker: Any) -> None:
    """Have the models of a class of vLLM's workers compute nothing after sleep level 2, which drops all weights, until
    these have come again."""
    sleep = _original(worker.sleep)

    @functools.wraps(sleep)
    def watched(self: Any, level: int = 1) -> None:
        reloads = getattr(self.get_model(), "ria_reloads", None) if level == 2 else None
        if reloads is not None and getattr(self.model_config, "sleep_preserve_parameter_names", None):
            raise RiaError("sleep_preserve_parameter_names: not for a model that ria-vllm serves. Leave it out.")
        sleep(self, level)
        if reloads is not None:
            reloads.lose()

    setattr(watched, _ORIGINAL, sleep)
    worker.sleep = watched


def watch_reloads_of(worker: Any) -> None:
    """Have a class of vLLM's workers load the former files again after a reload from files that has failed, if these
    are unchanged. A trainer's weights are in no files, and ranks do not fail together, so then nothing is computed."""
    reload = _original(worker.reload_weights)

    @functools.wraps(reload)
    def watched(self: Any, *arguments: Any, **named: Any) -> Any:
        reloads, config = getattr(self.get_model(), "ria_reloads", None), self.model_config
        before = {name: one for name, one in vars(config).items() if name in ("model", "revision", "model_weights")}
        whole = reloads is not None and not reloads.lacks_weights
        try:
            return reload(self, *arguments, **named)
        except Exception as error:
            if reloads is None:
                raise
            alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
            with set_current_vllm_config(self.vllm_config):
                if not reloads.stopped and reloads.can_go_back():
                    raise  # the new ones are served: what follows them has failed
                vars(config).update(before)  # vLLM leaves the refused ones there
                if not (whole and reloads.stopped and alone and reloads.can_go_back()):
                    raise
            reload(self)
            raise RiaError(f"{error} The server has its weights of {config.model} again.") from error

    setattr(watched, _ORIGINAL, reload)
    worker.reload_weights = watched


def holders(function: Callable[..., Any]) -> list[ModuleType]:
    """The modules that have imported a function by its name: which ones do depends on vLLM's version."""
    named = function.__name__
    return [module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get(named) is function]


def _original(function: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(function, _ORIGINAL, function)


class Reloads:
    """The reloads of one model. During one, each layer has `ria_path`, its path, and `ria_renewed`, whether it has new
    weights.

    Args:
        model: as vLLM built it, with all layers.
        dtype: of its activations.
        after: called when a reload has ended, with the paths of the layers that got nothing, see `left_out`. It may
            raise a RiaError, which makes the model compute nothing.
        embeddings: the model has embeddings and a head of its own. A draft may have its target's.
        before: called before a reload begins.
        dummies: the model was started with dummy weights.

    Attributes:
        number: of the last reload, the same on all ranks.
        stopped: the model refuses to compute, because its weights are those of two models, or gone.
        can_go_back: whether the files are those whose weights the model had last, as a whole.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        dtype: torch.dtype,
        after: Callable[[Sequence[str]], None],
        embeddings: bool = True,
        before: Callable[[], None] = lambda: None,
        dummies: bool = False,
    ):
        self.model = model
        self.dtype = dtype
        self.after = after
        self.embeddings = embeddings
        self.before = before
        self.dummies = dummies
        self.number = 0
        self.stopped: _Stopped | None = None
        self.can_go_back: Callable[[], bool] = lambda: False
        self._kept: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        _leave_in_place(model)

    @property
    def lacks_weights(self) -> bool:
        """Whether the model needs all weights in one reload."""
        return self.dummies or self.stopped is not None

    @property
    def is_on(self) -> bool:
        """Whether a reload has begun and not ended."""
        infos = map(layerwise.get_layerwise_info, self.model.modules())
        return any(info.can_load() and info.kernel_tensors is not None for info in infos)

    def begin(self, begin: Callable[[torch.nn.Module], None]) -> None:
        """Begin a reload, by vLLM's `begin`. One that was left by whoever began it is given up first."""
        self.give_up()
        self.before()
        self.number += 1
        for path, layer in self.model.named_modules():
            layer.__dict__["ria_path"], layer.__dict__["ria_renewed"] = path, False
            if (method := _ours(layer)) is not None:
                method.forget()
        # vLLM writes these at once, in the model that still serves.
        at_once = [
            (path, getattr(one, name, None)) for path, one in self.model.named_modules() for name in SKIP_TENSORS
        ]
        self._kept = [(path, one.data, one.data.clone()) for path, one in at_once if isinstance(one, torch.Tensor)]
        for _, tensor, _ in self._kept if self.lacks_weights else ():
            if tensor.is_floating_point():
                tensor.fill_(EMPTY)  # it has to come, too
        begin(self.model)

    def give_up(self) -> None:
        """End a reload without the tensors that wait for others. Where layers are new already, nothing is computed
        until a whole reload has succeeded."""
        if not self.is_on:
            return
        for layer in self.model.modules():
            info = layerwise.get_layerwise_info(layer)
            info.loaded_weights.clear()
            info.load_numel = min(info.load_numel, 0)
        try:
            _original(layerwise.finalize_layerwise_processing)(self.model, SimpleNamespace(dtype=self.dtype))
        finally:
            self._put_back()
            self._stop_if_renewed()

    def _put_back(self) -> None:
        """Undo what vLLM wrote at once."""
        for _, tensor, before in self._kept:
            tensor.copy_(before)
        self._kept = []

    def lose(self) -> None:
        """All weights are gone."""
        if self.stopped is None:
            self.stopped = _Stopped(self.model)

    def end(self, end: Callable[[], None]) -> None:
        """End a reload, by vLLM's `end`.

        Raises:
            RiaError: a layer got a part of its weights only, or layers keep those of a reload that had failed; or see
                `after` and `_wait_for_ranks`.
        """
        left = left_out(self.model, self.embeddings)
        lacking = left_out(self.model, self.embeddings, others=True)
        if self.lacks_weights:
            lacking += [path for path, tensor, _ in self._kept if tensor.numel() and bool((tensor == EMPTY).all())]
        tied = tied_layers(self.model)
        for layer in self.model.modules():  # attention is packed elsewhere
            layer.__dict__["ria_renewed"] = (
                layer.__dict__.get("ria_renewed") or layerwise.get_layerwise_info(layer).load_numel > 0
            )
        try:
            end()
            for layer in tied:
                layer.quant_method.process_weights_after_loading(layer)
            if self.lacks_weights and lacking:
                raise RiaError(
                    f"vLLM's layer {lacking[0]} did not get all of its weights in this reload, and those that it has "
                    f"are of another model, dummies, or lost. {WAY_OUT}"
                )
            self._wait_for_ranks()
            self.after(left)
        except BaseException:
            self.give_up()
            self._put_back()  # if vLLM had ended the reload already
            self._stop_if_renewed()
            raise
        self._kept, self.dummies = [], False
        if self.stopped is not None:
            self.stopped.undo()
            self.stopped = None

    def _wait_for_ranks(self) -> None:
        """Wait until all tensor-parallel ranks have got as far as this one: none may serve what another has refused.

        Raises:
            RiaError: one has not.
        """
        if not torch.distributed.is_initialized() or (group := get_tp_group()).world_size == 1:
            return
        # Not a barrier: after one that a rank has missed, a group is of no use any more.
        store, name = _get_default_store(), f"ria-vllm reload/{group.ranks[0]}/{self.number}"
        store.set(f"{name}/{group.rank}", "")
        try:
            store.wait([f"{name}/{rank}" for rank in group.ranks], timedelta(seconds=PATIENCE))
        except RuntimeError as error:
            raise RiaError(
                f"another rank has refused this reload, or takes more than {PATIENCE} seconds longer. {WAY_OUT}"
            ) from error

    def _stop_if_renewed(self) -> None:
        """Have the model refuse to compute if some of its layers have new weights, or may have on another rank."""
        alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
        renewed = any(layer.__dict__.get("ria_renewed") for layer in self.model.modules())
        if renewed or not alone:
            self.lose()


def watch_packing(
    layer: torch.nn.Module,
    before: Callable[[torch.nn.Module], Any],
    after: Callable[[torch.nn.Module, Any], None] = lambda layer, found: None,
) -> None:
    """Have functions called with a layer each time that its method packs what was loaded: one before, and then one that
    gets what that returned, too."""
    pack = layer.quant_method.process_weights_after_loading

    def process(layer: torch.nn.Module) -> None:
        found = before(layer)
        pack(layer)
        after(layer, found)

    layer.quant_method.process_weights_after_loading = process


def _leave_in_place(model: torch.nn.Module) -> None:
    """Have weights stay where they are that something reads through a buffer, instead of by their layer's method."""
    buffers = {buffer.untyped_storage().data_ptr() for buffer in model.buffers()} - {0}
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and weight.untyped_storage().data_ptr() in buffers:
            watch_packing(layer, lambda one: one.weight.data, lambda one, data: setattr(one.weight, "data", data))


WAY_OUT = "Reload or send all weights of one model, or start the server again."


class _Stopped:
    """A model that raises a RiaError instead of computing."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.hook = model.register_forward_pre_hook(self._refuse)
        # CUDA graphs are replayed without a call of the model.
        names = [name for name in ("compute_logits", "compute_logits_local") if hasattr(model, name)]
        self.before = {name: model.__dict__.get(name) for name in names}
        model.__dict__.update(dict.fromkeys(names, self._refuse))

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise RiaError(
            "a reload of weights has failed when some layers had their new ones already, or sleep level 2 has dropped "
            f"all, so the answers would be those of no model. {WAY_OUT}"
        )

    def undo(self) -> None:
        self.hook.remove()
        for name, before in self.before.items():
            del self.model.__dict__[name]
            if before is not None:
                self.model.__dict__[name] = before


def check_arrived(path: str, layer: torch.nn.Module, info: LayerReloadingInfo) -> None:
    """Check, before a layer is packed in a reload, that each of its parameters was loaded as a whole. Linears and
    experts that are pruned know better what belongs to them, and check that themselves.

    Raises:
        RiaError: something is missing.
    """
    if _ours(layer) is not None:
        return
    numbers: dict[str, int] = defaultdict(int)
    seen: set[tuple[str, str]] = set()
    for name, arguments in info.loaded_weights:
        # Two names of the checkpoint may be one of the model's.
        others = {key: value for key, value in arguments.arguments.items() if not isinstance(value, torch.Tensor)}
        if (piece := (name, repr(others))) not in seen:
            seen.add(piece)
            parameter = layer._parameters.get(name)
            loader = layerwise._get_original_loader(layer._buffers[name] if parameter is None else parameter)
            numbers[name] += get_numel_loaded(loader, arguments)[0]
    for name, parameter in layer._parameters.items():
        if parameter is None or name in SKIP_TENSORS:
            continue  # what did not come keeps its old values
        wanted = _numbers_of(parameter)
        if isinstance(layer, VocabParallelEmbedding):
            wanted = min(wanted, 1)  # rows of padding are not in any file
        elif name.startswith(("w13_", "w2_")) and layer.moe_config.hidden_dim != layer.moe_config.hidden_dim_unpadded:
            wanted = min(wanted, 1)  # the same
        if numbers[name] < wanted:
            raise RiaError(
                f"vLLM's layer {path}: {numbers[name]} of the {wanted} numbers in its {name} came in this reload. A "
                "reload replaces all weights of each layer that it has any of: send all of them together."
            )


def _numbers_of(tensor: torch.Tensor) -> int:
    """How many numbers of a parameter are loaded; a parameter that takes none says so."""
    return getattr(tensor, "weight_loader_numel", tensor.numel())


def _ours(layer: torch.nn.Module) -> Any:
    """The method of a layer with stored weights, `Sparse24LinearMethod` or `Sparse24MoEMethod`; None for others."""
    method = getattr(layer, "quant_method", None)
    return method if hasattr(method, "forget") else None


def tied_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The embeddings and heads that get their weights from another layer in a reload that is about to end."""
    loaded = _loaded(model)
    found = []
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if not isinstance(getattr(layer, "quant_method", None), UnquantizedEmbeddingMethod) or info.load_numel > 0:
            continue
        weight = None if info.kernel_tensors is None else info.kernel_tensors[0].get("weight")
        if weight is not None and weight.data_ptr() in loaded:
            found.append(layer)
    return found


def left_out(model: torch.nn.Module, embeddings: bool = True, others: bool = False) -> list[str]:
    """Paths of the dense layers that lack something, and got nothing in a reload that is about to end.

    vLLM will give them what they had, and warns only. Weights that are tied to loaded ones are not among them.

    Args:
        embeddings: the model has embeddings and a head of its own.
        others: also layers of other kinds, such as norms. Not all of them are in all files.
    """
    dense, loaded, found = {path for path, _ in dense_layers(model, embeddings)}, _loaded(model), []
    for path, layer in model.named_modules():
        info = layerwise.get_layerwise_info(layer)
        if not info.can_load() or info.kernel_tensors is None or info.load_numel > 0:
            continue
        of_its_kind = path in dense or (others and not isinstance(layer, VocabParallelEmbedding))
        wanted = [name for name, tensor in info.restore_metadata[0].items() if _numbers_of(tensor)]
        tied = any(tensor.data_ptr() in loaded for tensor in info.kernel_tensors[0].values())
        if wanted and not tied and of_its_kind:
            found.append(path)
    return found


def _loaded(model: torch.nn.Module) -> set[int]:
    """Where the tensors are that layers have got, or will get when the reload ends."""
    loaded: set[int] = set()
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if not info.can_load() or info.load_numel > 0:
            tensors = layer._parameters if info.kernel_tensors is None else info.kernel_tensors[0]
            loaded |= {tensor.data_ptr() for tensor in tensors.values() if tensor is not None}
    return loaded - {0}  # what a kernel has packed is in no place
