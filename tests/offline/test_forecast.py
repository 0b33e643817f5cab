"""The tables of docs/compress.md: what `forecast` says of large models, from their shapes alone."""

import json
import re
from math import prod
from pathlib import Path

import pytest
import torch
from compressing import WarningRecorder, interrupted_after_a_layer
from transformers import AutoConfig, AutoModelForCausalLM

from ria_vllm.files.sizes import human_size
from ria_vllm.format.pattern import SCHEMES
from ria_vllm.offline.commands import EFFORTS
from ria_vllm.offline.experts.plan import experts_to_prune
from ria_vllm.offline.model.run.loading import Loader
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import forecast
from ria_vllm.offline.run.compress import Settings, compress
from ria_vllm.offline.run.layers import LayerPass
from ria_vllm.offline.run.plan import Kept, Plan, linears_to_prune, widths

PAGE = Path(__file__).parents[2] / "docs" / "compress.md"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "intermediate_size": 6144,
}  # fmt: skip


def llama(hidden: int, inner: int, layers: int, heads: int, tied: bool = False) -> dict[str, object]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return LLAMA | sizes | {"num_attention_heads": heads, "tie_word_embeddings": tied}


# As their config.json have it.
MODELS = {
    "Llama 3.2 1B": llama(2048, 8192, 16, 32, tied=True),
    "Llama 3.1 8B": llama(4096, 14336, 32, 32),
    "Llama 3.1 70B": llama(8192, 28672, 80, 64),
    "Qwen3 30B A3B": QWEN,
}


def without_values(folder: Path, config: dict[str, object]) -> StreamedModel:
    """The model in a folder whose weight files are headers and holes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "max_position_embeddings": 40960}))
    read = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read)
    files: dict[str, dict[str, list[int]]] = {}
    for name, shape in as_published(model):
        layer = re.search(r"[.](\d+)[.]|$", name)[1]
        files.setdefault(f"model-{layer}.safetensors", {})[name] = shape
    for file, tensors in files.items():
        header, end = {}, 0
        for name, shape in tensors.items():
            begin, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as written:
            written.write(len(text).to_bytes(8, "little") + text)
            written.truncate(8 + len(text) + end)
    places = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return StreamedModel(folder, read, torch.device("cpu"), torch.bfloat16)


def as_published(model: torch.nn.Module):
    """Names and shapes: tied tensors once, each expert by itself."""
    tied = model.all_tied_weights_keys
    for name, tensor in model.state_dict().items():
        before, stacked, _ = name.partition("experts.")
        if not stacked and name not in tied:
            yield name, list(tensor.shape)
        elif name.endswith("gate_up_proj"):
            experts, both, width = tensor.shape
            for expert in range(experts):
                yield f"{before}experts.{expert}.gate_proj.weight", [both // 2, width]
                yield f"{before}experts.{expert}.up_proj.weight", [both // 2, width]
                yield f"{before}experts.{expert}.down_proj.weight", [width, both // 2]


def size(model: StreamedModel, scheme: str) -> tuple[int, int]:
    """Bytes of the dense weights, and of those stored with all that can be pruned pruned."""
    recipe = Recipe(**SCHEMES[scheme])
    recipe = recipe.fitting(widths(model, recipe))
    layers = range(len(model.layers))
    pruned = {index: frozenset(linears_to_prune(model, index, recipe)) for index in layers}
    experts = {index: frozenset(experts_to_prune(model, index, recipe)) for index in layers}
    plan = Plan(pruned, dict.fromkeys(layers, frozenset()), {}, (), experts, {}, Kept())
    _, dense, stored = forecast.sizes_of(model, plan, recipe)
    return dense, stored


def cells(title: str) -> dict[str, list[str]]:
    """The rows of the table with this title in its head, by model."""
    table = PAGE.read_text().partition(f"\n| {title} |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()[2:]]
    return {name: found for name, *found in rows}


# As the page has them, of a core and of an H100: multiply-adds a second in bfloat16 and in float32, and bytes.
RATES = {"cpu": (98e9, 43e9, 43e9), "cuda": (989e12 / 2, 67e12 / 2, 3.35e12)}


@pytest.mark.parametrize("name", MODELS)
def test_the_tables_are_what_is_computed_for_large_models(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Loader, "check_all", lambda _: None)  # it reads a head of 2 GB
    model, sizes = without_values(tmp_path / "model", MODELS[name]), {}
    peaks = [forecast.peak_bytes(model, Recipe(**EFFORTS[effort])) for effort in ("default", "best")]
    for scheme in ("BF16", "W8A8", "W4A8"):
        dense, sizes[scheme] = size(model, scheme)
    assert cells("in bfloat16")[name] == [human_size(round(one)) for one in (*peaks, dense, *sizes.values())]
    times = []
    for kind, unit in (("cpu", 3600), ("cuda", 60)):
        monkeypatch.setattr(model, "device", torch.device(kind))
        monkeypatch.setattr(forecast, "_rates", lambda *_, kind=kind: RATES[kind])
        seconds = [forecast.pruning_seconds(model, Recipe(**words)) for words in EFFORTS.values()]
        seconds[-1] += forecast.distilling_seconds(model, Recipe(calibration="a.txt", **EFFORTS["best"]))
        times.append(" / ".join(f"{float(f'{one / unit:.2g}'):g}" for one in seconds))
    assert cells("`fast` / `default` / `best`")[name] == times


@pytest.mark.parametrize(
    ("options", "taken"), [({}, "20 min"), ({"max_loss": 1.0}, "40 min"), ({"seed": 1}, "10 min from there on")]
)
def test_once_a_layer_is_pruned_the_time_is_as_measured(options, taken, tiny, text, tmp_path, monkeypatch):
    """Two layers that are alike, in ten minutes each by a clock that stands still otherwise."""
    now, prune, resumed = [0.0], LayerPass.prune, "seed" in options

    def slowly(*arguments):
        now[0] += 600
        return prune(*arguments)

    monitor = WarningRecorder(clock=lambda: now[0])
    recipe = Recipe(calibration=str(text), samples=4, seq_len=32, reconstruct="admm", **options)
    arguments = (str(tiny("llama")), tmp_path / "out", recipe)
    if resumed:
        with interrupted_after_a_layer():
            compress(*arguments, Settings(is_half=True), WarningRecorder())
    monkeypatch.setattr(LayerPass, "prune", slowly)
    monkeypatch.setattr(forecast, "distilling_seconds", lambda *_: 7200.0)
    compress(*arguments, Settings(is_half=True, resume=resumed), monitor)
    (said,) = [line for line in monitor.said if line.startswith("as measured")]
    wanted = f"as measured on layer {int(resumed)}, pruning takes about {taken}, and distilling, as estimated, 2.0 h"
    assert said == wanted
