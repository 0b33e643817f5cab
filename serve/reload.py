"""A running server keeps the weights that it was started with: whatever would replace or drop them is refused."""

import functools
from collections.abc import Callable
from typing import Any

from ria_vllm.errors import RiaError

WAY_OUT = "Write the weights as a folder (`compress`, or `ria_vllm.training.save`), and start a server on that folder."


def refuse_other_weights(worker: Any) -> None:
    """Have a class of vLLM's workers refuse other weights, before anything is changed, for a model of ours."""
    _replace(worker, "reload_weights", _refuse)
    _replace(worker, "start_weight_update", _refuse)
    _replace(worker, "start_draft_weight_update", _refuse)
    _replace(worker, "sleep", _sleep)


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


def _is_ours(worker: Any) -> bool:
    """Whether the worker's model is ours, or the draft beside it."""
    draft = getattr(worker.model_runner, "get_draft_model", lambda: None)
    return any(hasattr(model, "ria_served") for model in (worker.get_model(), draft()))


def _refuse(function: Callable[..., Any], worker: Any, *arguments: Any, **named: Any) -> Any:
    if _is_ours(worker):
        raise RiaError(f"{function.__name__}: a running server of a pruned model takes no other weights. {WAY_OUT}")
    return function(worker, *arguments, **named)


def _sleep(sleep: Callable[..., Any], worker: Any, level: int = 1) -> Any:
    if level == 2 and _is_ours(worker):
        raise RiaError(
            "sleep level 2 drops all weights, and a running server of a pruned model takes no others. Use level 1, or "
            "stop the server."
        )
    return sleep(worker, level)
