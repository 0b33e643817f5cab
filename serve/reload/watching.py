"""The functions of vLLM's that reload weights, wrapped so that `Reloads` sees what happens to our models."""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import layerwise

from ria_vllm.errors import RiaError
from ria_vllm.serve.reload.arrived import check_arrived
from ria_vllm.serve.reload.layerwise import Reloads, keep


def watch_reloads() -> None:
    """Have the reloads of our models begin, pack and end as `Reloads` says."""
    begin = layerwise.initialize_layerwise_reload
    for module in holders(begin):
        _replace(module, begin.__name__, _begin)
    _replace(layerwise, "_layerwise_process", _pack)
    _replace(layerwise, "finalize_layerwise_processing", _end)


def watch_worker(worker: Any) -> None:
    """Watch what a class of vLLM's workers does with the weights of our models."""
    _replace(worker, "sleep", _sleep)
    _replace(worker, "reload_weights", _reload_weights)
    _replace(worker, "start_weight_update", _start_update)
    _replace(worker, "start_draft_weight_update", _start_update)


def holders(function: Callable[..., Any]) -> list[ModuleType]:
    """The modules that have imported a function by its name: which ones do depends on vLLM's version."""
    named = function.__name__
    return [module for module in list(sys.modules.values()) if getattr(module, "__dict__", {}).get(named) is function]


def _replace(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Have `around` called with a function of vLLM's and its arguments in place of this function."""
    function = getattr(owner, name)
    if hasattr(function, "ria_wrapped"):
        return

    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        return around(function, *arguments, **named)

    wrapper.__dict__["ria_wrapped"] = function
    setattr(owner, name, wrapper)


def _reloads_of(model: torch.nn.Module) -> Reloads | None:
    return getattr(model, "ria_reloads", None)


def _begin(begin: Callable[..., None], model: torch.nn.Module) -> None:
    reloads = _reloads_of(model)
    if reloads is None:
        begin(model)
    else:
        reloads.begin(begin)


def _pack(pack: Callable[..., None], layer: torch.nn.Module, info: Any) -> None:
    former = layer.__dict__.get("ria_former")
    if former is not None:
        check_arrived(layer.__dict__["ria_path"], layer, info)
        keep(former, layer)
    pack(layer, info)
    if former is not None:
        layer.__dict__["ria_renewed"] = True


def _end(end: Callable[..., None], model: torch.nn.Module, model_config: Any) -> None:
    reloads = _reloads_of(model)
    if reloads is None:
        end(model, model_config)
    else:
        reloads.end(functools.partial(end, model, model_config))


def _sleep(sleep: Callable[..., None], worker: Any, level: int = 1) -> None:
    """A model computes nothing after sleep level 2, which drops all weights, until these have come again."""
    reloads = _reloads_of(worker.get_model()) if level == 2 else None
    if reloads is not None:
        if getattr(worker.model_config, "sleep_preserve_parameter_names", None):
            raise RiaError("sleep_preserve_parameter_names: not for a model that ria-vllm serves. Leave it out.")
        reloads.give_up()
    sleep(worker, level)
    if reloads is not None:
        reloads.lose()


def _reload_weights(reload: Callable[..., None], worker: Any, *arguments: Any, **named: Any) -> None:
    """A worker still names the files that are served after it has refused others."""
    reloads, config = _reloads_of(worker.get_model()), worker.model_config
    if reloads is None:
        reload(worker, *arguments, **named)
        return
    if False in (named.get("is_checkpoint_format"), *arguments[2:3]):
        raise RiaError(
            "is_checkpoint_format=False: a model that ria-vllm serves takes weights as a folder has them. Leave it out."
        )
    before = {name: one for name, one in vars(config).items() if name in ("model", "revision", "model_weights")}
    served = reloads.served
    try:
        reload(worker, *arguments, **named)
    except BaseException:
        if reloads.served == served:  # else what follows has failed
            vars(config).update(before)
        raise


def _start_update(start: Callable[[Any], None], worker: Any) -> None:
    """An update of weights begins although the one before has no end: it was refused, here or by another rank, or the
    model has computed since. vLLM would wait for its end for ever. One that goes on still keeps others out, as in vLLM:
    of two trainers at once, the server would have weights of both."""
    reloads = _reloads_of(worker.get_model())
    if getattr(worker, "_weight_update_active", False) and reloads is not None and not reloads.goes_on:
        worker.weight_transfer_engine.reset_weight_update_target()
        worker._weight_update_active = False
    start(worker)
