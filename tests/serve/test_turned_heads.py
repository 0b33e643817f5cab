"""vLLM on folders of `compress --rotate heads` against Hugging Face on what these export."""

from types import SimpleNamespace

import pytest
import tiny
import torch
import turning
from compare import check, generate, job_of
from compressing import run_small
from families import LATENT_ATTENTION, TEXT, save_model
from transformers import AutoModelForCausalLM

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.export import export_dense
from ria_vllm.offline.transforms import rotation

pytestmark = pytest.mark.slow

# vLLM's attention for latent keys and values on CPUs takes these widths only. No layer has experts.
LATENT = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64, "num_key_value_heads": 4, "first_k_dense_replace": 2,
}  # fmt: skip
# Family -> (changes of the model's configuration, options of compress, engine arguments).
WAYS = {
    "llama": ({}, {"reconstruct": "short"}, {}),
    "qwen2": ({}, {"weights": "int8"}, {}),
    "phi3": ({}, {}, {}),
    "deepseek-v3": (LATENT, {}, LATENT_ATTENTION),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Family -> (the exported model, the report of compress, what vLLM said)."""
    folder, models, jobs = tmp_path_factory.mktemp("turned"), {}, []
    (folder / "text.txt").write_text(TEXT * 50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation, "learned", lambda heads, pattern, seed: turning.random_rotations(heads, seed))
        for family, (changes, options, engine) in WAYS.items():
            source = save_model(folder / family / "in", family, vocab_size=tiny.VOCAB, **changes)
            out, dense = folder / family / "out", folder / family / "dense"
            report, _ = run_small(source, out, folder / "text.txt", rotate="heads", **options)
            export_dense(Reader(out), dense, 1 << 40)
            models[family] = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval(), report
            jobs.append(job_of(out, {"engine": engine}))
    results = generate(folder / "run", jobs)
    return {family: SimpleNamespace(model=models[family][0], report=models[family][1], results=result)
            for family, result in zip(models, results, strict=True)}  # fmt: skip


@pytest.mark.parametrize("family", WAYS)
def test_logprobs(family, runs):
    attention, run = turning.FAMILIES[family], runs[family]
    rotated = {name for name, record in run.report["linears"].items() if "rotated" in record}
    assert rotated == {attention.names(index)[1] for index in attention.layers}
    check(run.model, run.results)
