"""Training a compressed model by anybody's trainer: only kept weights change, and the result is saved compressed."""

from ria_vllm.training.keep import keep_sparse
from ria_vllm.training.saving import Saved, save

__all__ = ["Saved", "keep_sparse", "save"]
