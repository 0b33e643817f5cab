"""What a running engine is told to load, in the worker, as trainers' weight transfers do it."""

import random
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from ria_vllm.training import proofs


class FromFolder(WeightTransferEngine):
    """Sends the tensors of a folder, see `load`. vLLM's own engines need GPUs."""

    def init_transfer_engine(self, init_info: Any) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: Any) -> None:
        found, rank = tensors(update_info["send"]), torch.distributed.get_rank()
        found = [one for one in found if re.search(update_info.get("part", ""), one[0])]
        if update_info.get("shuffled"):
            random.Random(1).shuffle(found)
        if "broken" in update_info and update_info.get("rank", rank) == rank:
            at = max(i for i, (name, _) in enumerate(found) if name.endswith(update_info["broken"]))
            found[at] = found[at][0], torch.zeros(3, 5)
        found += [(name, torch.zeros(shape)) for name, shape in update_info.get("more", {}).items()]
        if "proofs" in update_info:
            found += proofs(update_info["proofs"])
        self.model.load_weights(found[update_info["piece"] :: update_info["pieces"]])

    def receive_weights(self, update_info: Any) -> None:
        pass

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("folder", FromFolder)


class Worker:
    """As vLLM's --worker-extension-cls, it has this module imported where the engine is made."""


def tensors(folder: str) -> list[tuple[str, torch.Tensor]]:
    return [item for path in sorted(Path(folder).glob("*.safetensors")) for item in load_file(path).items()
            if path.name.startswith("model")]  # fmt: skip


def load(worker: Any, step: dict[str, Any]) -> str | None:
    """Take a step: {"reload": folder}, or {"send": folder, "pieces": how many}, perhaps with "part": what names must
    match, "shuffled", "broken": how the name of a tensor ends that has another shape (on "rank" only, if that is
    given), "more": name -> shape of a tensor that comes last, "proofs": the folder whose proofs come, too, or "left":
    it is not finished.

    Returns:
        The error that has refused it; None if it was done.
    """
    worker = getattr(worker, "worker", worker)  # vLLM has wrapped it
    try:
        if "reload" in step:
            worker.reload_weights(weights_path=step["reload"])
            return None
        model = worker.model_runner.get_model()
        config = worker.vllm_config.weight_transfer_config = WeightTransferConfig(backend="folder")
        worker.weight_transfer_engine = FromFolder(config, worker.vllm_config, worker.device, model)
        worker.start_weight_update()
        for piece in range(step["pieces"]):
            worker.update_weights(step | {"piece": piece})
        if step.get("left"):
            return "left before it was finished"
        worker.finish_weight_update()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
