"""vLLM's layer-by-layer reload: afterwards a model has the weights that it should have, or those of before.

vLLM packs each layer as soon as its tensors have arrived, and replaces the old weights by the result. It does not take
care of

- layers that share their weights with another: the head of a model with tied embeddings gets no tensor of its own, and
  on CPUs keeps what it has packed; Mamba-2's mixer keeps what the convolution held before it was packed;
- layers that get a part of their tensors: the rest is memory that nobody has written;
- reloads that fail, on one rank or on all, or are left by who began them: some layers have new weights and others old
  ones by then, and the tensors that wait for others would go into the next reload;
- models that have lost their weights, because the server has slept at level 2, or never had any but dummies. These
  compute nothing until they have got all weights.

vLLM has no hooks for this, see `ria_vllm.serve.reload.watching`.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS

from ria_vllm.errors import RiaError
from ria_vllm.serve.load.completeness import EMPTY, stored_method
from ria_vllm.serve.reload.agreement import PROVED, SERVED, WAY_OUT, Agreement
from ria_vllm.serve.reload.arrived import left_out, tied_layers
from ria_vllm.serve.reload.former import Former

# Of reloads. All ranks begin the same ones of a model.
_NUMBERS = {True: itertools.count(1), False: itertools.count(1)}


class Reloads:
    """The reloads of one model. During one, each layer has `ria_path`, its path; `ria_renewed`, whether it has new
    weights; and `ria_former`, where those that it had are kept.

    Args:
        model: as vLLM built it, with all layers.
        after: called when a reload has ended. It may raise a RiaError, which refuses the reload.
        embeddings: the model has embeddings and a head of its own. A draft may have its target's.
        before: called before a reload begins.
        dummies: the model was started with dummy weights.

    Attributes:
        number: of the last reload, the same on all ranks.
        served: number of the last reload whose weights are served; 0: there was none.
        from_files: what has come last in the present one are all files of a model.
        stopped: the model refuses to compute, because its weights are gone, or were dummies.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        after: Callable[[], None],
        embeddings: bool = True,
        before: Callable[[], None] = lambda: None,
        dummies: bool = False,
    ):
        self.model = model
        self.after = after
        self.embeddings = embeddings
        self.before = before
        self.dummies = dummies
        self.number = self.served = 0
        self.from_files = False
        self.stopped: _Guard | None = None
        self._on: tuple[Former, _Guard, Agreement] | None = None
        self._at_once: list[tuple[str, torch.Tensor]] = []
        config = get_current_vllm_config_or_none()
        self._ranks_of_engine = 1 if config is None else config.parallel_config.world_size
        self._refused = None if config is None else _reason_against_reloads(config)
        _leave_in_place(model)

    @property
    def lacks_weights(self) -> bool:
        """Whether the model needs all weights in one reload."""
        return self.dummies or self.stopped is not None

    @property
    def is_on(self) -> bool:
        """Whether a reload has begun and not ended."""
        return self._on is not None

    @property
    def goes_on(self) -> bool:
        """Whether one is on that no rank has refused."""
        return self._on is not None and not self._on[2].is_refused()

    def begin(self, begin: Callable[[torch.nn.Module], None]) -> None:
        """Begin a reload, by vLLM's `begin`. One that was left by whoever began it is given up first.

        Raises:
            RiaError: vLLM cannot reload this model.
        """
        self.give_up()
        self.before()
        if any(getattr(layer, "is_amx_bmm_enabled", False) for layer in self.model.modules()):
            raise RiaError(
                "vLLM cannot reload latent attention that it has packed for AMX, because it has emptied kv_b_proj. "
                "Start the server again, or with --dtype float32."
            )
        if self._refused is not None:
            raise RiaError(self._refused)
        self.number, self.from_files = next(_NUMBERS[self.embeddings]), False
        former = Former(self.model, keeps=not self.lacks_weights)
        # vLLM writes these at once.
        self._at_once = [
            (path, tensor)
            for path, one in self.model.named_modules()
            for name in SKIP_TENSORS
            if isinstance(tensor := getattr(one, name, None), torch.Tensor)
        ]
        former.keep(tensor for _, tensor in self._at_once)
        agreement = Agreement.about(self.number, self.embeddings, self._ranks_of_engine)
        self._on = former, _Guard(self.model, self._interrupt), agreement
        for path, layer in self.model.named_modules():
            layer.__dict__.update(ria_path=path, ria_renewed=False, ria_former=former)
            if (method := stored_method(layer)) is not None:
                method.forget()
        for _, tensor in self._at_once if self.lacks_weights else ():
            if tensor.is_floating_point():
                tensor.data.fill_(EMPTY)  # it has to come, too
        begin(self.model)

    def give_up(self) -> None:
        """Refuse the reload that is on, if any, on all ranks, and put the weights of before back."""
        if self._on is None:
            return
        (former, guard, agreement), self._on = self._on, None
        guard.undo()
        try:
            former.put_back()
            for layer in self.model.modules():
                layerwise.get_layerwise_info(layer).reset()
        except BaseException:
            self.lose()
            raise
        finally:
            if self.lacks_weights:
                self.lose()
            agreement.refuse()

    def _interrupt(self, late: bool) -> None:
        """The model computes in the middle of a reload: whoever began it is gone, or another rank has refused it."""
        self.give_up()
        if self.stopped is not None:
            self._refuse(late)
        if late:
            raise RiaError(
                "the model was asked while its weights were being replaced. Pause requests for that time: start again."
            )

    def lose(self) -> None:
        """All weights are gone."""
        if self.stopped is None:
            self.stopped = _Guard(self.model, self._refuse)

    @staticmethod
    def _refuse(late: bool) -> None:
        raise RiaError(
            "this server has no weights: sleep level 2 has dropped them, or it was started with dummies, and a reload "
            f"has failed. {WAY_OUT}"
        )

    def end(self, end: Callable[[], None]) -> None:
        """End a reload, by vLLM's `end`.

        Raises:
            RiaError: a layer got a part of its weights only; the reload was given up before; or see `after` and
                `Agreement`.
        """
        if self._on is None:
            raise RiaError(f"this reload was refused, or the model has computed since it began. {WAY_OUT}")
        former, guard, agreement = self._on
        try:
            lacking = []
            if self.lacks_weights or self.from_files:
                lacking = left_out(self.model, self.embeddings, others=self.lacks_weights)
            if self.lacks_weights:
                lacking += [path for path, one in self._at_once if one.numel() and bool((one == EMPTY).all())]
            tied = tied_layers(self.model)
            for layer in self.model.modules():
                renewed = layer.__dict__.get("ria_renewed") or layerwise.get_layerwise_info(layer).load_numel > 0
                layer.__dict__["ria_renewed"] = renewed
                if hasattr(layer, "process_weights_after_loading"):  # attention, which `end` packs
                    keep(former, layer)
            end()
            for layer in tied:
                layer.quant_method.process_weights_after_loading(layer)
            if lacking:
                raise RiaError(
                    f"vLLM's layer {lacking[0]} did not get all of its weights in this reload, and those that it has "
                    f"are of another model, dummies, or lost. {WAY_OUT}"
                )
            agreement.reach(PROVED)
            self.after()
            agreement.reach(SERVED)
        except BaseException:
            self.give_up()
            raise
        for layer in self.model.modules():
            layer.__dict__.pop("ria_former", None)
        guard.undo()
        self._on, self.dummies, self.served = None, False, self.number
        if self.stopped is not None:
            self.stopped.undo()
            self.stopped = None
        agreement.leave()


def _reason_against_reloads(config: VllmConfig) -> str | None:
    """Why a reload in this engine could end with weights of two models; None if it could not."""
    if config.parallel_config.data_parallel_size > 1 and config.model_config.is_moe:
        return (
            "a reload with --data-parallel-size: the engines share the experts of this model, and nothing shows that "
            "all of them take the same weights. Start the server again."
        )
    transfer = config.weight_transfer_config
    if transfer is not None and transfer.backend == "sharded_rdt":  # it packs layers by a way of its own
        return "sharded_rdt: this weight transfer is not for models that ria-vllm serves. Use nccl or ipc."
    return None


def keep(former: Former, layer: torch.nn.Module) -> None:
    """Keep what a layer computes with, before it is packed anew."""
    for tensors in layerwise.get_layerwise_info(layer).kernel_tensors or ():
        former.keep(tensors.values())


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


class _Guard:
    """Has a function called before a model computes, until this is undone.

    Args:
        before: called with False before anything is computed; with True after CUDA graphs were replayed, for which
            nobody calls the model, and before there are logits. Then it has to raise.
    """

    def __init__(self, model: torch.nn.Module, before: Callable[[bool], None]):
        def refuse(*_: Any, **__: Any) -> None:
            before(True)

        self.model = model
        self.hook = model.register_forward_pre_hook(lambda *_: before(False))
        names = [name for name in ("compute_logits", "compute_logits_local") if hasattr(model, name)]
        self.before = {name: model.__dict__.get(name) for name in names}
        model.__dict__.update(dict.fromkeys(names, refuse))

    def undo(self) -> None:
        self.hook.remove()
        for name, before in self.before.items():
            del self.model.__dict__[name]
            if before is not None:
                self.model.__dict__[name] = before
