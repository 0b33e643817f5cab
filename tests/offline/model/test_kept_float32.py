"""What transformers keeps in float32 in narrower models, such as the biases by which routers choose experts."""

from pathlib import Path

import pytest
import torch
from compressing import check_complete, digests, edit_weights, edited, interrupted_after_a_layer, run_small
from moe import save_moe
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.run.compress import Settings

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUTERS = [f"model.layers.{index}.mlp.gate" for index in range(2)]
BIASES = 1 + torch.arange(1, 7) / 1000  # bfloat16 has 1 and 1.0078


@pytest.fixture(scope="module")
def deepseek(make_model, tmp_path_factory) -> Path:
    """A model in bfloat16 whose router has biases in float32, as DeepSeek-V3 is published. Do not write into it."""

    def change(tensors):
        for router in ROUTERS:
            tensors[f"{router}.e_score_correction_bias"] = BIASES.clone()
            tensors[f"{router}.weight"] *= 0.01  # so that scores are as close to each other as the biases

    place = tmp_path_factory.mktemp("deepseek") / "model"
    folder = make_model(place, "deepseek-v3", dtype=BF16, first_k_dense_replace=0)
    edit_weights(folder, change)
    return folder


def loaded(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with all that `StreamedModel` loads."""
    streamed = StreamedModel(folder, AutoConfig.from_pretrained(folder), CPU, dtype)
    streamed.load_base()
    for index in range(len(streamed.layers)):
        streamed.load_layer(index)
    return streamed.model


@pytest.mark.parametrize(
    ("family", "dtype"), [("deepseek-v3", BF16), ("nemotron-h", BF16), ("gpt_oss", BF16), ("gpt_oss", FP16)], ids=str
)
def test_each_tensor_is_as_in_transformers(family, dtype, make_model, tmp_path):
    """Nemotron-H also has Mamba's A_log, D and dt_bias. gpt-oss keeps its norms, but in float16 models only."""
    make = make_model if "-" in family else save_moe
    folder = make(tmp_path / "model", family)
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    kept = {name for name, tensor in wanted.items() if tensor.dtype == FP32}
    assert bool(kept) == (dtype != BF16 or family != "gpt_oss")
    found = {name: tensor for name, tensor in loaded(folder, dtype).state_dict().items() if not tensor.is_meta}
    assert kept <= found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0, msg=name)


def test_what_is_written_has_the_dtypes_of_the_files(deepseek, text, tmp_path):
    """Also after an interruption."""
    run_small(deepseek, tmp_path / "out", text, compute_dtype="bfloat16")
    reader = check_complete(deepseek, tmp_path / "out")
    files = load_file(deepseek / "model.safetensors")
    assert {name: reader.tensor(name).dtype for name in reader.dense_names} == {
        name: files[name].dtype for name in reader.dense_names
    }
    with interrupted_after_a_layer():
        run_small(deepseek, tmp_path / "again", text, compute_dtype="bfloat16")
    run_small(deepseek, tmp_path / "again", text, Settings(resume=True), compute_dtype="bfloat16")
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_a_model_that_may_run_in_float32_only(deepseek, text, tmp_path):
    """As DeepSeek-V4, whose norms transformers keeps in float32, in front of linears in bfloat16."""
    source = edited(deepseek, tmp_path / "in", lambda tensors: None, head_dim=64)  # runs in no dtype
    message = "cannot run DeepseekV3ForCausalLM as config.json describes it"
    for dtype, advice in {"bfloat16": ", at least in bfloat16: try --compute-dtype float32", "float32": ""}.items():
        with pytest.raises(RiaError, match=rf"{message}{advice} \("):
            run_small(source, tmp_path / "out", text, compute_dtype=dtype)
