"""Schemes, in the words of llm-compressor and vLLM: bits of weights and of activations."""

SCHEMES: dict[str, dict[str, str]] = {
    "BF16": {"weights": "float", "activations": "none"},
    "W8A16": {"weights": "int8", "activations": "none"},
    "W8A8": {"weights": "int8", "activations": "int8"},
    "W4A16": {"weights": "int4", "activations": "none"},
    "W4A8": {"weights": "int4", "activations": "int8"},
    "FP8": {"weights": "fp8", "activations": "fp8"},
}
"""Scheme -> what the kept weights are stored as, and to what linears round their inputs. BF16 is the model's own dtype,
whatever it is."""
