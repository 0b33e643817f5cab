"""LoRA adapters of the dense model on folders whose heads are turned."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from checkpoint_folder import add_rotations, random, random_rotations
from compare import check, generate, job_of
from compressing import run_small
from families import TEXT
from lora import merged, write_adapter
from safetensors.torch import load_file, save_file
from tiny import HEADS
from transformers import AutoModelForCausalLM
from vllm.config import LoRAConfig, VllmConfig, get_current_vllm_config, set_current_vllm_config

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.weight_files import SINGLE_FILE
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.format.layer_schema import Producer
from ria_vllm.format.schema import PERMUTATIONS_FILE, ROTATIONS_FILE
from ria_vllm.serve.model.adapters import Rotation, rotate, rotate_adapters
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.reload import check_reload

LORA = {"enable_lora": True, "max_lora_rank": 8}


def of_values(rotations: torch.Tensor) -> torch.Tensor:
    """What v's rows are multiplied by, as one matrix."""
    return torch.block_diag(*rotations)


def of_outputs(rotations: torch.Tensor) -> torch.Tensor:
    """What o's columns are multiplied by, as one matrix."""
    return torch.block_diag(*rotations.repeat_interleave(HEADS // len(rotations), 0)).T


def rotated(family: str, folder) -> SimpleNamespace:
    """A pruned folder whose dense parent had its heads turned at random; `turned` does that to a change of a weight."""
    model = tiny.write(tiny.FAMILIES[family], folder)
    kind = tiny.FAMILIES[family]
    names = [kind.block.format(i=layer) for layer in range(2)]
    rotations = {name + kind.output: random_rotations(kind.kv) for name in names}
    add_rotations(folder, rotations)
    of = {name + kind.value[0]: rotations[name + kind.output] for name in names}

    def turned(name: str, change: torch.Tensor) -> torch.Tensor:
        if name in rotations:
            return change @ of_outputs(rotations[name])
        if name not in of:
            return change
        start, end = kind.value[1] or (0, len(change))
        return torch.cat([change[:start], of_values(of[name]) @ change[start:end], change[end:]])

    return SimpleNamespace(model=model, folder=folder, turned=turned)


def compressed(folder) -> SimpleNamespace:
    """The same by `compress`, with random rotations in the place of learned ones."""
    dense = tiny.model_of(tiny.FAMILIES["llama-gqa"])
    dense.save_pretrained(folder / "dense")
    tiny.add_tokenizer(folder / "dense")
    (folder / "text.txt").write_text(TEXT * 40)
    given = [random_rotations(2), random_rotations(2)]
    with pytest.MonkeyPatch.context() as patch:
        waiting = iter(given)
        patch.setattr("ria_vllm.offline.transforms.rotation.learned", lambda *_: next(waiting))
        run_small(folder / "dense", folder / "out", folder / "text.txt", rotate="heads")
    export_dense(Reader(folder / "out"), folder / "exported", 1 << 40)

    def turned(name: str, change: torch.Tensor) -> torch.Tensor:
        rotations = given[int(name.split(".")[2])]
        if name.endswith("o_proj"):
            return change @ of_outputs(rotations)
        return of_values(rotations) @ change if name.endswith("v_proj") else change

    model = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32)
    return SimpleNamespace(model=model, folder=folder / "out", turned=turned)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Name -> a folder, an adapter of its dense parent, and what vLLM says with it."""
    found, jobs = {}, []
    for name in ("phi3", "compress"):
        folder = tmp_path_factory.mktemp(name)
        one = compressed(folder) if name == "compress" else rotated(name, folder / "out")
        scaled = {"lora_alpha": 12, "use_rslora": name == "phi3"}
        base = str(folder / "dense") if name == "compress" else "org/dense"
        one.adapter = write_adapter(one.model, folder / "adapter", base_model_name_or_path=base, **scaled)
        found[name] = one
        adapter = {"lora": str(folder / "adapter"), "prompt_logprobs": False}
        jobs.append(job_of(one.folder, {"engine": LORA} | adapter))
    for one, result in zip(found.values(), generate(tmp_path_factory.mktemp("run"), jobs), strict=True):
        one.result = result
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi3", "compress"])
def test_vllm_turns_adapters_of_the_dense_model(name, served):
    one = served[name]
    check(merged(one.model, one.adapter, one.turned), one.result)
    with pytest.raises(AssertionError):  # these adapters are large enough to tell
        check(merged(one.model, one.adapter), one.result)


@pytest.mark.parametrize(
    ("rows", "blocks", "out"),
    [(None, 1, 2 * 8), ((5, 21), 1, 40), ((3, 11), 2, 2 * 11)],
    ids=["v", "a part of qkv", "a part of each head's rows"],
)
def test_the_adapter_moves_with_the_weights(rows, blocks, out):
    """(W + B A) turned is W turned plus the turned adapter; and that is not so if the adapter stays."""
    kv, heads, d, hidden, rank = 2, 4, 8, 24, 3
    rotations = random_rotations(kv, d)
    block, (start, end) = out // blocks, rows or (0, out)
    own = torch.cat([torch.arange(b * block + start, b * block + end) for b in range(blocks)])
    left = torch.eye(out, dtype=torch.float64)
    left[own[:, None], own] = of_values(rotations)
    right = torch.block_diag(*rotations.repeat_interleave(heads // kv, 0)).T
    producer = Producer(name="v", rows=rows, blocks=blocks)
    for one, shape in (
        (Rotation(rotations, heads, producer), (out, hidden)),
        (Rotation(rotations, heads, None), (hidden, 32)),
    ):
        weight, a, b = random(*shape), random(rank, shape[1]), random(shape[0], rank)
        change = b @ a
        lora = SimpleNamespace(lora_a=a.float(), lora_b=b.float())
        rotate({"x": lora, "other": SimpleNamespace(lora_a=None, lora_b=None)}, {"x": [one]}, "mine")
        want = left @ (weight + change) if one.producer else (weight + change) @ right
        base = left @ weight if one.producer else weight @ right
        torch.testing.assert_close(base + lora.lora_b.double() @ lora.lora_a.double(), want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(base + change, want, atol=0.1)


@pytest.mark.parametrize(
    ("value", "a", "b", "message"),
    [
        (True, torch.zeros(3, 24), torch.zeros(3, 16), r"lora_B has 3 rows .*expected 2 key-value heads of 8"),
        (False, [torch.zeros(3, 32)], torch.zeros(24, 3), "it has no lora_A that is a matrix"),
    ],
)
def test_an_adapter_of_another_shape(value, a, b, message):
    one = Rotation(random_rotations(2, 8), 4, Producer(name="v") if value else None)
    with pytest.raises(RiaError, match=f"adapter mine: x: {message}.*--rotate none.*RIA_VLLM_OWN_ADAPTERS=1"):
        rotate({"x": SimpleNamespace(lora_a=a, lora_b=b)}, {"x": [one]}, "mine")


@pytest.fixture
def engine_with_adapters():
    current = VllmConfig()
    current.lora_config = LoRAConfig(max_lora_rank=8)
    with set_current_vllm_config(current):
        yield


def built(folder, packed: dict[str, list[str]]) -> tuple[RiaConfig, torch.nn.Module]:
    """The folder's configuration, and a stand-in for a model with vLLM's names of the layers of attention."""
    config = RiaConfig.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    config.packed_modules_mapping = packed
    config.maybe_update_config(str(folder))
    model = torch.nn.Module()
    model.packed_modules_mapping = packed
    for layer in range(2):
        for leaf in ("qkv_proj", "o_proj"):
            path = f"model.layers.{layer}.self_attn.{leaf}"
            module = model
            for part in path.split("."):
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            module.quant_method = config.sparse_method(path, config.linears_of(path))
    return config, model


PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def test_which_modules_are_turned(engine_with_adapters, copy, monkeypatch):
    rotations = {f"model.layers.{layer}.self_attn.o_proj": random_rotations(2) for layer in range(2)}
    add_rotations(copy, rotations)
    config, model = built(copy, PACKED)
    rotate_adapters(config, model, None)
    turned = {name for name, turns in model.ria_rotations.items() if turns}
    assert turned == {f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in range(2) for leaf in "vo"}
    for name, matrices in rotations.items():
        assert torch.equal(model.ria_rotations[name][0].rotations, matrices.float())
    model.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
    with pytest.raises(RiaError, match="qkv_proj takes adapters for .*qkv_proj instead.*--rotate none"):
        rotate_adapters(config, model, None)
    monkeypatch.setenv("RIA_VLLM_OWN_ADAPTERS", "1")
    del model.ria_rotations
    rotate_adapters(config, model, None)
    assert not hasattr(model, "ria_rotations")


@pytest.mark.parametrize(("variable", "turned", "asked"), [(None, True, True), ("0", True, False), ("1", False, False)])
def test_what_the_user_says_of_all_adapters(variable, turned, asked, engine_with_adapters, copy, monkeypatch, tmp_path):
    if variable is not None:
        monkeypatch.setenv("RIA_VLLM_OWN_ADAPTERS", variable)
    add_rotations(copy, {O_PROJ: random_rotations(2)})
    config, model = built(copy, PACKED)
    rotate_adapters(config, model, None)
    assert hasattr(model, "ria_rotations") == turned
    assert hasattr(model, "ria_check_base") == asked
    if asked:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/dense"}))
        model.ria_check_base(tmp_path, "mine")
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(copy)}))
        with pytest.raises(RiaError, match="adapter mine"):
            model.ria_check_base(tmp_path, "mine")


def dummy_start(folder, where=None) -> tuple[RiaConfig, torch.nn.Module]:
    """A server with adapters, of dummy weights; `where`: a repository that only the start could reach."""
    get_current_vllm_config().load_config.load_format = "dummy"
    config, model = built(folder, PACKED)
    config.where = where or str(folder)
    rotate_adapters(config, model, None)
    return config, model


def test_adapters_of_weights_that_follow_dummies(engine_with_adapters, copy):
    rotations = {O_PROJ: random_rotations(2)}
    add_rotations(copy, rotations)
    config, model = dummy_start(copy)
    check_reload(config, SimpleNamespace(model=str(copy), revision=None), from_files=True, lora=True)
    assert torch.equal(model.ria_rotations[O_PROJ][0].rotations, rotations[O_PROJ].float())
    (copy / ROTATIONS_FILE).write_bytes(b"")
    with pytest.raises(RiaError, match="heads.safetensors: broken"):
        dummy_start(copy)


@pytest.mark.parametrize("lost", [ROTATIONS_FILE, "the hub"])
def test_dummies_need_no_rotations_but_weights_that_follow_do(lost, engine_with_adapters, copy, monkeypatch):
    """Without weight files, permutations alone tell which of vLLM's layers serve which linears."""
    add_rotations(copy, {O_PROJ: random_rotations(2)})
    where = None
    if lost == "the hub":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        where = "ria-vllm-tests/not-cached"
    else:
        (copy / SINGLE_FILE).unlink()
        (copy / lost).unlink()
    for own in ("", "1"):
        monkeypatch.setenv("RIA_VLLM_OWN_ADAPTERS", own)
        config, model = dummy_start(copy, where)
        assert not hasattr(model, "ria_rotations")
        if own and lost != PERMUTATIONS_FILE:
            check_reload(config, None, from_files=False, lora=True)
        else:
            with pytest.raises(RiaError, match="started with dummy weights, which did not need that. Start it again"):
                check_reload(config, None, from_files=False, lora=True)


def test_a_user_who_says_something_else(engine_with_adapters, copy, monkeypatch):
    monkeypatch.setenv("RIA_VLLM_OWN_ADAPTERS", "true")
    add_rotations(copy, {O_PROJ: random_rotations(2)})
    with pytest.raises(RiaError, match="RIA_VLLM_OWN_ADAPTERS=true: set it to 1 .* to 0 .* unset"):
        rotate_adapters(*built(copy, PACKED), None)


O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found[f"{O_PROJ}.rotations"][1, 2, 3].fill_(float("nan")), "head 1 is not orthogonal"),
        (lambda found: found.update({f"{O_PROJ}.rotations": torch.eye(32).half()[None]}), "float16, expected float32"),
        (lambda found: found.pop(f"{O_PROJ}.rotations"), "heads.safetensors is from another run than config.json"),
    ],
)
def test_damaged_rotations(change, message, engine_with_adapters, copy):
    add_rotations(copy, {O_PROJ: random_rotations(2), O_PROJ.replace("0", "1"): random_rotations(2)})
    config, model = built(copy, PACKED)
    found = load_file(copy / ROTATIONS_FILE)
    change(found)
    save_file(found, copy / ROTATIONS_FILE)
    with pytest.raises(RiaError, match=message):
        rotate_adapters(config, model, None)
    with pytest.raises(RiaError, match=message):
        Reader(copy)
    (copy / ROTATIONS_FILE).unlink()
    with pytest.raises(RiaError, match="rotations/heads.safetensors is missing"):
        rotate_adapters(config, model, None)


@pytest.mark.parametrize(
    ("name", "kv", "message"),
    [
        (O_PROJ, 4, "4 rotations, but its fold has 2 key-value heads"),
        ("model.layers.0.mlp.down_proj", 2, "no fold by heads from one pruned linear to it"),
    ],
)
def test_rotations_of_something_else(name, kv, message, engine_with_adapters, copy):
    add_rotations(copy, {name: random_rotations(kv)})
    config, model = built(copy, PACKED)
    with pytest.raises(RiaError, match=message):
        rotate_adapters(config, model, None)


def test_rotations_of_another_size(copy):
    """`verify` finds them; a server would when it reads an adapter."""
    add_rotations(copy, {O_PROJ: random_rotations(2, 16)})
    assert list(Reader(copy).problems()) == [
        f"{O_PROJ}: its rotations are for heads of 16 channels, but it reads 4 heads with 128 channels in all"
    ]
