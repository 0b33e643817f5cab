"""Models that are published quantized only: each is pruned, run and copied as its plain twin is, bit by bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressing import run_small
from damage import rewrite
from moe import save_moe
from quantized_sources import fp8_pair, from_fp8, mxfp4_pair, save_pair, to_fp8
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.model.files.source_tensors import SourceTensors
from ria_vllm.offline.model.run.hf import load_model
from ria_vllm.offline.model.run.streaming import StreamedModel

CPU = torch.device("cpu")
# Two blocks of 128 rows or columns, the second one smaller; one layer with experts and one without.
UNEVEN = {
    "hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 128, "first_k_dense_replace": 1,
    "q_lora_rank": 64, "kv_lora_rank": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """kind -> (the quantized folder, its plain twin). Do not write into them."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            dense = tmp_path_factory.mktemp(kind) / "dense"
            if kind == "gpt_oss":
                made[kind] = mxfp4_pair(save_moe(dense, kind, torch.bfloat16))
            else:
                made[kind] = fp8_pair(save_moe(dense, kind, torch.bfloat16, **UNEVEN))
        return made[kind]

    return get


KINDS = ("gpt_oss", "deepseek_v3")
FROM = {"gpt_oss": "mxfp4", "deepseek_v3": "fp8"}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    """Bit by bit, those of permutations too."""
    mine, wanted = tensors(one), tensors(other)
    assert mine.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert mine[name].dtype == tensor.dtype and mine[name].shape == tensor.shape
        assert torch.equal(mine[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt_oss", {"reconstruct": "admm"}),
        ("gpt_oss", {"weights": "int8", "activations": "int8"}),
        ("deepseek_v3", {}),
        ("deepseek_v3", {"ignore": ("experts",)}),
    ],
    ids=str,
)
def test_compressed_as_the_plain_twin_is(kind, options, pair, text, tmp_path):
    quantized, plain = pair(kind)
    report, _ = run_small(quantized, tmp_path / "out", text, **options)
    expected, _ = run_small(plain, tmp_path / "twin", text, **options)
    assert_same_tensors(tmp_path / "out", tmp_path / "twin")
    assert report["linears"] == expected["linears"] and report["dense"] == expected["dense"]
    assert report["recipe"]["dequantized_from"] == FROM[kind] and "dequantized_from" not in expected["recipe"]
    config, twin = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "twin"))
    mine, wanted = (content.pop("quantization_config", None) for content in (config, twin))
    assert config == twin
    for words in filter(None, (mine, wanted)):
        del words["recipe"]
    assert mine == wanted
    if "pattern" not in options:
        assert list(Reader(tmp_path / "out").problems()) == []
        assert Reader(tmp_path / "out").schema.recipe["dequantized_from"] == FROM[kind]
        assert f"| dequantized_from | `{FROM[kind]}` |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("kind", "compute_dtype"), [("gpt_oss", None), ("deepseek_v3", "float32")])
def test_loaded_whole_as_the_plain_twin_is(kind, compute_dtype, pair):
    """As `eval` and `distill --teacher` load it. transformers itself refuses blocks of different sizes."""
    one, other = (load_model(str(folder), CPU, compute_dtype) for folder in pair(kind))
    assert one.dtype == other.dtype and not hasattr(one.config, "quantization_config")
    mine, wanted = one.state_dict(), other.state_dict()
    assert mine.keys() == wanted.keys() and all(torch.equal(mine[name], wanted[name]) for name in wanted)
    tokens = torch.arange(2, 60)[None]
    with torch.no_grad():
        assert torch.equal(one(tokens).logits, other(tokens).logits)


def test_a_quantized_model_of_the_hub_is_loaded_from_the_hubs_cache(pair, monkeypatch):
    quantized, plain = pair("deepseek_v3")
    asked = []

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        asked.append(name)
        return str(quantized)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("ria_vllm.offline.model.run.hf.read_config", lambda name: AutoConfig.from_pretrained(quantized))
    state = load_model("some/model", CPU).state_dict()
    wanted = load_file(plain / "model.safetensors")["lm_head.weight"]
    assert asked == ["some/model"] and torch.equal(state["lm_head.weight"], wanted)


PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_fp8_with_a_scale_for_each_tensor(suffix, tiny, text, tmp_path):
    """As Ministral 3 and AutoFP8 write it, with scales of inputs, which are left out."""
    dense = tmp_path / "dense"
    shutil.copytree(tiny("llama"), dense)
    rewrite(dense / "model.safetensors", lambda t: t.update({name: one.bfloat16() for name, one in t.items()}))

    def there(weight):
        parts = to_fp8(weight, tuple(weight.shape), suffix)
        return {"": parts[""], suffix: parts[suffix].view(())}

    def back(parts):
        return from_fp8({"": parts[""], suffix: parts[suffix].reshape(1, 1)}, tuple(parts[""].shape), suffix)

    quantized, plain = save_pair(
        dense, lambda name, one: ".layers." in name and one.dim() == 2, there, back, PER_TENSOR, dtype="bfloat16"
    )
    file = quantized / "model-00002-of-00002.safetensors"
    scale = "model.layers.0.mlp.up_proj.weight" + suffix
    inputs = "model.layers.0.mlp.up_proj." + ("activation_scale" if suffix == "_scale_inv" else "input_scale")
    rewrite(file, lambda t: t.update({inputs: torch.ones(()), "model.layers.0.self_attn.k_scale": torch.ones(1)}))
    assert scale in load_file(file)
    run_small(quantized, tmp_path / "out", text)
    run_small(plain, tmp_path / "twin", text)
    assert_same_tensors(tmp_path / "out", tmp_path / "twin")


def test_stacks_of_experts_with_a_scale_for_gate_and_up_each(text, tmp_path):
    """As Mistral 4's, with scales of inputs, in a Gemma 4, which has parameters that are called scales."""
    dense = save_moe(tmp_path / "dense", "gemma4_text", torch.bfloat16)

    def parts_of(weight):
        return 2 if weight.dim() == 3 and weight.shape[1] == 256 else 1

    def there(weight):
        block = (weight.shape[-2] // parts_of(weight), weight.shape[-1])
        if weight.dim() == 2:
            return to_fp8(weight, block)
        each = [to_fp8(one, block) for one in weight]
        found = {suffix: torch.stack([one[suffix] for one in each]) for suffix in each[0]}
        return found | {"_activation_scale": torch.ones(len(weight))}

    def back(parts):
        block = (parts[""].shape[-2] // parts["_scale_inv"].shape[-2], parts[""].shape[-1])
        if parts[""].dim() == 2:
            return from_fp8(parts, block)
        pairs = zip(parts[""], parts["_scale_inv"], strict=True)
        return torch.stack([from_fp8({"": values, "_scale_inv": scales}, block) for values, scales in pairs])

    def is_quantized(name, one):
        return ".experts." in name or (".mlp." in name and one.dim() == 2)

    quantized, plain = save_pair(dense, is_quantized, there, back, PER_TENSOR, dtype="bfloat16")
    scales = load_file(quantized / SECOND)
    assert scales["model.layers.0.experts.gate_up_proj_scale_inv"].shape == (4, 2, 1)
    rewrite(quantized / SECOND, lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(())}))
    assert any(name.endswith("router.per_expert_scale") for name in load_file(plain / "model.safetensors"))
    run_small(quantized, tmp_path / "out", text)
    run_small(plain, tmp_path / "twin", text)
    assert_same_tensors(tmp_path / "out", tmp_path / "twin")


def test_what_the_model_does_not_have_is_dequantized(pair, text, tmp_path):
    """A layer for multi-token prediction, which transformers does not build."""
    folder = shutil.copytree(pair("deepseek_v3")[0], tmp_path / "in")
    torch.manual_seed(0)
    parts = to_fp8(torch.randn(192, 384))
    name = "model.layers.9.eh_proj.weight"
    for suffix, part in parts.items():
        rewrite(folder / (SECOND if suffix else FIRST), lambda t, key=name + suffix, one=part: t.update({key: one}))
    _, warnings = run_small(folder, tmp_path / "out", text, reconstruct="none")
    assert f"copied: {name}, not part of DeepseekV3ForCausalLM as transformers builds it." in warnings
    assert torch.equal(tensors(tmp_path / "out")[name], from_fp8(parts))


def test_the_dtype_is_written_where_the_source_names_none(pair, text, tmp_path):
    """transformers would take that of the first tensor, and vLLM the widest one; both are another one here."""
    folder = shutil.copytree(pair("gpt_oss")[0], tmp_path / "in")
    rewrite(folder / FIRST, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    run_small(folder, tmp_path / "out", text)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    assert load_model(str(tmp_path / "out"), CPU).dtype == torch.bfloat16


def damaged(source: Path, folder: Path, **changes) -> Path:
    """A copy in which each tensor that `changes` names is what its function makes of it; None: it is not there."""
    shutil.copytree(source, folder)

    def apply(tensors):
        for name in tensors.keys() & changes.keys():
            tensor, change = tensors.pop(name), changes[name]
            if change is not None:
                tensors[name] = change(tensor.clone()).contiguous()

    for path in folder.glob("*.safetensors"):
        rewrite(path, apply)
    index, lost = folder / "model.safetensors.index.json", {name for name, change in changes.items() if change is None}
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {name: weight_map[name] for name in weight_map.keys() - lost}}))
    return folder


UP, DOWN = "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.1.mlp.experts.down_proj"
BLOCKS, SCALES, INVERSE = f"{DOWN}_blocks", f"{DOWN}_scales", f"{UP}_scale_inv"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
DAMAGE = [
    ({INVERSE: None}, rf"{FIRST}: {UP} has no scales: {INVERSE} is in no file"),
    ({UP: None}, rf"{SECOND}: {INVERSE} is in the files, but not the fp8 weight that it scales"),
    (
        {INVERSE: lambda t: t[:, :1]},
        rf"{SECOND}: {INVERSE} is F32 \[1, 1\]; by quantization_config .* should be F32 or BF16 or F16 \[1, 2\]",
    ),
    ({UP: lambda t: t.view(torch.int8), INVERSE: None}, rf"{UP} is I8 .* should be a plain tensor or part of an fp8"),
    ({BLOCKS: None}, rf"{SECOND}: {SCALES} is in the files, but not the mxfp4 weight that it scales"),
    ({BLOCKS: lambda t: t.flatten(2)}, rf"{BLOCKS} is U8 \[4, 64, 32\]; .* be U8 \[experts, out, groups, 16\]"),
    ({SCALES: lambda t: t[..., :1]}, rf"{SCALES} is U8 \[4, 64, 1\]; .* should be U8 \[4, 64, 2\]"),
    (
        {BLOCKS: lambda t: t[:, :, :1], SCALES: lambda t: t[:, :, :1]},
        rf"{DOWN} has shape .4, 32, 64., config.json asks for .4, 64, 64.",
    ),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGE)
def test_values_and_scales_that_do_not_go_together(changes, message, pair, tmp_path):
    """The headers tell."""
    kind = "gpt_oss" if DOWN in message else "deepseek_v3"
    folder = damaged(pair(kind)[0], tmp_path / "in", **changes)
    with pytest.raises(RiaError, match=message):
        StreamedModel(folder, AutoConfig.from_pretrained(folder), CPU)


def first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("deepseek_v3", {INVERSE: first(float("nan"))}, f"{INVERSE}: NaN or infinite values in the scales of {UP}"),
        ("deepseek_v3", {UP: first(float("nan"))}, f"{UP}: NaN or infinite values in the weights"),
        ("gpt_oss", {SCALES: first(255)}, f"{SCALES}: NaN or infinite values in the scales of {DOWN}"),
    ],
)
def test_values_and_scales_that_are_no_numbers(kind, changes, message, pair, text, tmp_path):
    folder = damaged(pair(kind)[0], tmp_path / "in", **changes)
    with pytest.raises(RiaError, match=f"safetensors: {message}"):
        run_small(folder, tmp_path / "out", text)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_files_is_read_once_or_is_a_scale(kind, pair):
    quantized, plain = pair(kind)
    found, wanted = SourceTensors(quantized, None), load_file(plain / "model.safetensors")
    assert found.dtype == torch.bfloat16 and set(found.files) == set(wanted) and found.quantized
    assert all(torch.equal(found.read(name), wanted[name]) for name in wanted)
    parts = {part for one in found.quantized.values() for part in (one.values, one.scales)}
    assert set(tensors(quantized)) == parts | (set(wanted) - set(found.quantized))
    assert {name: found.shape(name) for name in wanted} == {n: tuple(t.shape) for n, t in wanted.items()}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_no_tensor_is_mapped_from_its_file(pair):
    """It would stay so for as long as the tensor is alive, and change with the file."""

    def is_mapped(tensor):
        at = tensor.data_ptr()
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
        return any(int(begin, 16) <= at < int(end, 16) for begin, end in (line[0].split("-") for line in lines))

    found = SourceTensors(pair("gpt_oss")[0], None)
    plain, stack = "lm_head.weight", DOWN
    assert not is_mapped(found.read(plain)) and not is_mapped(found.read(plain, 3))
    assert not is_mapped(found.read(stack)) and not is_mapped(found.read(stack, 1))
