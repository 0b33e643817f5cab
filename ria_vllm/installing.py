"""How ria-vllm and the vLLM that it needs are installed, in the words of README.md."""

FOR_GPUS = 'pip install ".[cuda]"'
FOR_CPUS = (
    "pip install uv",  # it finds torch's CPU builds, which PyPI lacks
    'uv pip install --torch-backend cpu ".[cpu]"',
    "uv pip install --no-deps ./packaging/vllm-metadata",
    "uv pip uninstall torchaudio torchcodec",
)
IN_A_LINE = (
    f"in a clone of ria-vllm's repository run {FOR_GPUS}, or without a GPU {FOR_CPUS[1]} (README.md there has the "
    "other steps)"
)
