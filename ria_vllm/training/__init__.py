"""Training a compressed model by anybody's trainer: only kept weights change, and the result is saved compressed."""

from ria_vllm.training.beside_adapters import BesideAdapters, read_trained, write_trained
from ria_vllm.training.keep import keep_sparse
from ria_vllm.training.saving import Saved, save

__all__ = ["BesideAdapters", "Saved", "keep_sparse", "read_trained", "save", "write_trained"]
