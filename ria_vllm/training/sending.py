"""What a trainer sends to a running server beside the weights of a saved folder, so that the server can check them."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.format.proofs import PROOF_SUFFIX


def proofs(folder: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(NAME.proof, float32 [out, 2]) of each matrix NAME of a folder that `save` has written, see
    `ria_vllm.format.proofs`.

    A server that gets them in the same reload as the folder's tensors refuses weights that compute something else.

    Raises:
        RiaError: the folder is not compressed, or has no proofs, or not its own.
    """
    reader = Reader(folder)
    if reader.schema.proofs is None:
        raise RiaError(f"{reader.folder}: an older version wrote it, without proofs. Save the model again.")
    for name, proof in reader.proofs().items():
        yield f"{name}{PROOF_SUFFIX}", proof
