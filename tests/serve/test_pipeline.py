"""From a dense model to vLLM's logprobs, by the commands that users give. The oracle is transformers on the export."""

from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from compare import check, differences, generate, prompts
from gguf_files import save_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.cli import group

pytestmark = pytest.mark.slow

TEXTS = ["The capital of France is", "Water boils at a temperature of one hundred degrees, and ice"]


def ria_vllm(*arguments: object) -> None:
    done = CliRunner().invoke(group, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output[-5000:]


def save_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, dtype="bfloat16",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name -> (the exported model, the prompts, vLLM's results by dtype), from the dense folder on."""
    folder = tmp_path_factory.mktemp("pipeline")
    plans = {
        # To update kept weights takes twice as long as all the rest here, and the small model has it.
        "smollm2": (
            save_smollm2(folder / "gguf", 8),
            ("--samples", 2, "--seq-len", 128, "--reconstruct", "none"),
            ("float32",),
        ),
        "int8": (
            save_llama(folder / "llama"),
            ("--samples", 4, "--seq-len", 64, "--scheme", "W8A16"),
            ("float32", "bfloat16"),
        ),
    }
    given, jobs = {}, []
    for name, (model, options, dtypes) in plans.items():
        sparse, dense = folder / f"{name}-sparse", folder / f"{name}-dense"
        ria_vllm("compress", model, "-o", sparse, *options)
        ria_vllm("verify", sparse)
        assert {*Reader(sparse).int8_names} == ({"model.embed_tokens", "lm_head"} if name == "int8" else set())
        ria_vllm("export", sparse, "-o", dense)
        tokenizer = AutoTokenizer.from_pretrained(dense) if name == "smollm2" else None
        given[name] = [tokenizer(text).input_ids for text in TEXTS] if tokenizer else prompts()
        jobs += [{"model": str(sparse), "prompts": given[name], "tokens": 8, "engine": {"dtype": d}} for d in dtypes]
    answers = iter(generate(folder / "run", jobs))
    return {
        name: (
            AutoModelForCausalLM.from_pretrained(folder / f"{name}-dense", dtype=torch.float32),
            given[name],
            {dtype: next(answers) for dtype in dtypes},
        )
        for name, (_, _, dtypes) in plans.items()
    }


def test_a_real_model(made):
    """The same float32 sums in another order, through 8 layers; a wrong permutation is off by whole units."""
    model, given, answers = made["smollm2"]
    assert differences(model, answers["float32"], given).max() < 1e-3


def test_int8_weights(made):
    """Integers stay what they are, with bfloat16 and with float32 activations."""
    model, _, answers = made["int8"]
    # the export rounds its weights to bfloat16, serving does not
    assert differences(model, answers["float32"]).max() < 0.02
    check(model, answers["bfloat16"], half=True)
