"""What a running engine is told to load, in the worker, as vLLM's reloads and trainers' weight transfers do it."""

from collections import deque
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


class FromFolder(WeightTransferEngine):
    """Sends the tensors of a folder. vLLM's own engines need GPUs."""

    def init_transfer_engine(self, init_info: Any) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: Any) -> None:
        self.model.load_weights(update_info["tensors"])

    def receive_weights(self, update_info: Any) -> None:
        pass

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


def tensors(folder: str) -> list[tuple[str, torch.Tensor]]:
    return [item for path in sorted(Path(folder).glob("*.safetensors")) for item in load_file(path).items()
            if path.name.startswith("model")]  # fmt: skip


def load(worker: Any, step: dict[str, Any]) -> str | None:
    """Take a step: {"reload": folder}, or {"send": folder, "pieces": how many}, perhaps with "broken": how the name of
    a tensor ends that has another shape (on "rank" only, if that is given), or "left": it is not finished.

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
        found = tensors(step["send"])
        if "broken" in step and step.get("rank", torch.distributed.get_rank()) == torch.distributed.get_rank():
            at = max(i for i, (name, _) in enumerate(found) if name.endswith(step["broken"]))
            found[at] = found[at][0], torch.zeros(3, 5)
        pieces = deque(found[i :: step["pieces"]] for i in range(step["pieces"]))
        for piece in pieces:
            worker.update_weights({"tensors": piece})
        if step.get("left"):
            return "left before it was finished"
        worker.finish_weight_update()
    except Exception as error:
        worker._weight_update_active = False  # vLLM does so after errors in pieces, but not after one at the end
        return f"{type(error).__name__}: {error}"
    return None
