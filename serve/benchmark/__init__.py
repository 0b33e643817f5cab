"""`ria-vllm bench`: compares dense and sparse under load, by `vllm serve` and `vllm bench`. No process outlives it."""
