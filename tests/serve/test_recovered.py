"""A model that is 2:4 already, from `compress` to vLLM: what a server answers is what transformers does."""

import pytest
import torch
from compare import check, differences, generate, job_of
from compressing import run_small
from families import text  # noqa: F401
from recovered import save_recovered
from transformers import AutoModelForCausalLM

import ria_vllm  # noqa: F401  (teaches from_pretrained to read the folders)
from ria_vllm.format.schemes import SCHEMES

pytestmark = pytest.mark.slow
PROMPTS = [torch.randint(2, 258, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 17, 33)]


def test_a_recovered_model_is_served(text, tmp_path):  # noqa: F811
    source = save_recovered(tmp_path / "in")
    for scheme in ("BF16", "W4A8"):
        run_small(source, tmp_path / scheme, text, reconstruct="short", **SCHEMES[scheme])
    copied, rounded = generate(
        tmp_path / "run", [job_of(tmp_path / scheme, {"prompts": PROMPTS}) for scheme in ("BF16", "W4A8")]
    )
    check(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), copied, given=PROMPTS)
    off = differences(AutoModelForCausalLM.from_pretrained(tmp_path / "W4A8", dtype=torch.float32), rounded, PROMPTS)
    # A sum in another order may round an input to the next step.
    assert off.median() < 1e-4 and off.max() < 0.2
