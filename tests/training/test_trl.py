"""The trainers of others on a pruned model: TRL's SFT as docs/train.md has it, TRL's DPO, and LoRA of PEFT."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from compare import check, generate
from datasets import Dataset
from safetensors.torch import load_file
from sparse_llama import load, loss_of, masks, outside
from transformers import AutoTokenizer

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.folder_commands import verify
from ria_vllm.training import keep_sparse, save

trl = pytest.importorskip("trl", reason="trl is not installed (pip install '.[train]')")
peft = pytest.importorskip("peft", reason="peft is not installed (pip install '.[train]')")

PAGE = Path(__file__).parents[2] / "docs" / "train.md"
CHATS = Path(__file__).with_name("chats.jsonl")
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}


@pytest.fixture
def folder(pruned_llama, tmp_path, monkeypatch):
    """The pruned model and the chats where the example looks for them; the working directory is theirs."""
    shutil.copytree(pruned_llama.folder, tmp_path / "SmolLM2-2of4")
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    (tmp_path / "SmolLM2-2of4" / "chat_template.jinja").write_text(template)
    shutil.copy(CHATS, tmp_path / "chats.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "SmolLM2-2of4"


def example() -> str:
    return re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]


@pytest.mark.slow
def test_the_documented_example(folder, tmp_path):
    """It runs as it stands, learns the chats, changes only kept weights, and vLLM serves its folder."""
    kept = masks(folder)
    names = {"__name__": "example"}
    exec(compile(example(), "docs/train.md", "exec"), names)
    new = Path("SmolLM2-2of4-chat")
    assert list(Reader(new).problems()) == [] and masks(new).keys() == kept.keys()
    assert all(torch.equal(mask, kept[name]) for name, mask in masks(new).items())
    before, after = load(folder), load(new)
    assert list(outside(after, kept)) == [] and names["saved"].changed == 14
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [json.loads(line)["messages"] for line in CHATS.read_text().splitlines()]
    texts = [torch.tensor([tokenizer(tokenizer.apply_chat_template(chat, tokenize=False)).input_ids]) for chat in chats]
    with torch.no_grad():
        losses = [sum(loss_of(model, text).item() for text in texts) / len(texts) for model in (before, after)]
    assert losses[1] < losses[0] - 0.05
    trained = {name: tensor.to(torch.bfloat16) for name, tensor in names["model"].state_dict().items()}
    assert all(torch.equal(tensor.to(torch.bfloat16), trained[name]) for name, tensor in after.state_dict().items())
    prompts = [text[0, :24].tolist() for text in texts[:4]]
    job = {"model": str(new.resolve()), "prompts": prompts, "engine": {"dtype": "float32", "max_model_len": 64}}
    (result,) = generate(tmp_path / "run", [job], VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1")
    check(after, result, given=prompts)


def unpacked(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pruned linear -> (its mask, its weight), [out, in] in the model's own order, as docs/reference.md has it."""
    stored = {name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()}
    permutations, found = load_file(folder / "permutations.safetensors"), {}
    for name in [name.removesuffix(".bitmask") for name in stored if name.endswith(".bitmask")]:
        bits = np.unpackbits(stored[f"{name}.bitmask"].numpy(), axis=1, bitorder="little")
        mask = torch.from_numpy(bits).bool()
        weight = torch.zeros(mask.shape, dtype=stored[f"{name}.compressed"].dtype)
        weight[mask] = stored[f"{name}.compressed"].flatten()
        channels = permutations.get(f"{name}.input_permutation", torch.arange(mask.shape[1])).long()
        back = channels.argsort()  # stored column j holds channel channels[j]
        found[name] = (mask[:, back], weight[:, back])
    return found


@pytest.mark.slow
def test_dpo(folder, tmp_path):
    """What it has trained is in the folder that is written, under the same masks."""
    model, kept = load(folder), masks(folder)
    keep_sparse(model)
    chats = [json.loads(line)["messages"][:2] for line in CHATS.read_text().splitlines()[:6]]
    pairs = [{"prompt": [q], "chosen": [a], "rejected": [{"role": "assistant", "content": "No."}]} for q, a in chats]
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(
            "dpo", max_steps=2, learning_rate=1e-3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            max_length=64, report_to="none", use_cpu=True,
        ),
        train_dataset=Dataset.from_list(pairs), processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.train()
    before = load(folder).state_dict()
    assert list(outside(trainer.model, kept)) == []
    assert all((trainer.model.get_parameter(name) != before[name]).any() for name in kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.ref_model.state_dict().items())
    saved = save(trainer.model, new := tmp_path / "new", like=folder, tokenizer=trainer.processing_class)
    assert saved.linears == saved.changed == len(kept)
    assert CliRunner().invoke(verify, [str(new)], catch_exceptions=False).exit_code == 0
    old, written, trained = unpacked(folder), unpacked(new), trainer.model.state_dict()
    assert old.keys() == written.keys() == {name.removesuffix(".weight") for name in kept}
    for name, (mask, weight) in written.items():
        assert torch.equal(mask, old[name][0]) and not torch.equal(weight, old[name][1])
        assert torch.equal(weight, trained[f"{name}.weight"].to(weight.dtype))
    others = {name: tensor for path in new.glob("model*.safetensors") for name, tensor in load_file(path).items()}
    dense = {name: tensor for name, tensor in others.items() if name in trained}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= dense.keys()
    assert all(torch.equal(tensor, trained[name].to(tensor.dtype)) for name, tensor in dense.items())


@pytest.mark.parametrize("first", ["keep_sparse", "peft"])
def test_lora_beside_frozen_sparse_weights(pruned_llama, tmp_path, first):
    model = load(pruned_llama.folder)
    if first == "keep_sparse":
        keep_sparse(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    keep_sparse(wrapped)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.1)
    loss_of(wrapped).backward()
    optimizer.step()
    with pytest.raises(RiaError, match=r"the model has adapters .*enable-lora"):
        save(wrapped, tmp_path / "new", like=pruned_llama.folder)
    with pytest.raises(RiaError, match=r"the model has adapters"):
        save(wrapped.get_base_model(), tmp_path / "new", like=pruned_llama.folder)
    saved = save(wrapped.unload(), tmp_path / "new", like=pruned_llama.folder)
    assert saved.changed == 0 and saved.relative_change == 0
    left, right = Reader(pruned_llama.folder), Reader(tmp_path / "new")
    assert all(torch.equal(left.tensor(name), right.tensor(name)) for name in left.files)


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy])
def test_a_merged_adapter_is_not_trained_on(pruned_llama, copied):
    """The first step would take away what it has outside the masks."""
    model = load(pruned_llama.folder)
    keep_sparse(model)
    merged = copied(peft.get_peft_model(model, peft.LoraConfig(**LORA)).merge_and_unload().requires_grad_())
    before = copy.deepcopy(merged.state_dict())
    loss_of(merged).backward()
    with pytest.raises(RiaError, match=r"layers.0.\w+.\w+.weight: not zero everywhere outside the mask"):
        torch.optim.SGD(merged.parameters(), lr=1e-3).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())
