"""What `ria-vllm verify OUT --served URL` asks a server's workers: whether they compute what its files say."""

from typing import Any

import torch
from vllm.config import set_current_vllm_config

from ria_vllm.errors import RiaError


def prove(worker: Any) -> dict[str, Any]:
    """A method of vLLM's workers, which POST /collective_rpc calls where VLLM_SERVER_DEV_MODE=1.

    Returns:
        {"digest": that of the proofs, None if the files have none, "matrices": how many have been proved, "problem":
        what is wrong, or None}, all of this rank.
    """
    prove_model = getattr(worker.get_model(), "ria_prove", lambda: (None, 0))
    try:
        with set_current_vllm_config(worker.vllm_config), torch.inference_mode():
            digest, matrices = prove_model()
    except RiaError as error:
        return {"digest": None, "matrices": 0, "problem": str(error)}
    return {"digest": digest, "matrices": matrices, "problem": None}
