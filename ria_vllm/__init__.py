"""ria-vllm: prune language models to 2:4 with RIA and channel permutation, and serve them with vLLM."""

__version__ = "0.1.0"

from ria_vllm import hf

hf.install()
