"""The trainers of others on a pruned model: TRL's SFT as docs/train.md has it, TRL's DPO, and LoRA of PEFT."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from compare import check, generate
from sparse_llama import load, loss_of, masks, outside
from transformers import AutoTokenizer

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
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
