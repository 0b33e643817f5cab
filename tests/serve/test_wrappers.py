"""Pruned text decoders of models that read images, against transformers on the same weights."""

import base64
from pathlib import Path

import image_models
import openai
import pytest
import torch
from compare import differences, generate, prompts
from PIL import Image
from test_server import serving
from transformers import AutoProcessor
from zoo.agreement import load
from zoo.agreement import picture as picture_in
from zoo.family import dense_folder, pruned_folders
from zoo.toys import TOYS

pytestmark = pytest.mark.slow

# On a CPU, vLLM cannot run the vision tower of Llama 4, dense or not.
SEEING = [name for name in image_models.FAMILIES if name != "llama4"]
# How their weights are stored; the others' are plain. vLLM's Llama 4 rearranges rows, and so their scales.
WEIGHTS = {"llama4": "int4-g32", "qwen2_5_vl": "int8"}
SAYS = [{"type": "text", "text": "hello there"}]
TEMPLATE = (
    "{%% for message in messages %%}{%% for part in message['content'] %%}{%% if part['type'] == 'image' %%}%s"
    "{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}{%% endfor %%}"
)


def chat(image: dict) -> list[dict]:
    return [{"role": "user", "content": [image, *SAYS]}]


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    pixels = torch.randint(256, (image_models.SIDE, image_models.SIDE, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def served(tmp_path_factory, picture):
    """All of them, one after the other in one process."""
    folder = tmp_path_factory.mktemp("wrappers")
    models, jobs = {}, []
    for name in image_models.FAMILIES:
        models[name] = image_models.write(name, folder / name, weights=WEIGHTS.get(name, "float"))
        text = image_models.processor(name).apply_chat_template(chat({"type": "image"}))
        sees = name in SEEING
        jobs.append({
            "model": str(folder / name), "prompts": prompts(), "tokens": 4, "image": str(picture),
            "texts": [text] if sees else [],
            "engine": {
                "dtype": "float32", "skip_tokenizer_init": False,
                "limit_mm_per_prompt": {"image": int(sees), "video": 0},
            },
        })  # fmt: skip
    results = generate(folder / "run", jobs)
    return {name: (models[name], result) for name, result in zip(models, results)}


def logprobs(name: str, model: torch.nn.Module, picture: Path, tokens: list[int]) -> tuple[list[int], torch.Tensor]:
    """The ids of the chat with the picture, and transformers' logprob of each id from the second on, `tokens` too."""
    processor = image_models.processor(name)
    text = processor.apply_chat_template(chat({"type": "image"}))
    inputs = processor(images=[Image.open(picture)], text=[text], return_tensors="pt").to(torch.float32)
    if name == "gemma3":  # on a CPU, vLLM's attention shows parts of an image only earlier ones, dense or not
        inputs["token_type_ids"] *= 0
    return continued(model, inputs, tokens)


@torch.no_grad()
def continued(model: torch.nn.Module, inputs: dict, tokens: list[int]) -> tuple[list[int], torch.Tensor]:
    """The ids that a processor gives, and transformers' logprob of each from the second on, `tokens` too."""
    ids, others = inputs["input_ids"], {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    for kind in [kind for kind in others if "token_type_ids" in kind]:
        others[kind] = torch.nn.functional.pad(others[kind], (0, len(tokens)))
    sequence = torch.cat([ids, torch.tensor([tokens])], -1)
    found = model(input_ids=sequence, **others).logits.log_softmax(-1)[0]
    return ids[0].tolist(), found[:-1].gather(-1, sequence[0, 1:, None])[:, 0]


@pytest.mark.parametrize("name", image_models.FAMILIES)
def test_text(served, name):
    model, results = served[name]
    assert "error" not in results, results
    assert differences(model, results[: len(prompts())]).max() < 1e-4


@pytest.mark.parametrize("name", SEEING)
def test_an_image(served, picture, name):
    model, results = served[name]
    assert "error" not in results, results
    result = results[-1]
    ids, want = logprobs(name, model, picture, result["tokens"])
    assert result["prompt_ids"] == ids
    assert (torch.tensor(result["prompt"] + result["logprobs"]) - want).abs().max() < 1e-4


def test_what_compress_writes_through_the_api(tmp_path):
    """With an image and with text alone, against transformers on what `export` makes of the folder."""
    name, toy = "qwen3_vl_moe", TOYS["qwen3_vl_moe"]
    (dense_folder(name, toy, tmp_path) / "chat_template.jinja").write_text(TEMPLATE % toy.processor.placeholder)
    out, exported, _ = pruned_folders(name, toy, tmp_path)
    file = picture_in(tmp_path)
    url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    asked = [chat({"type": "image_url", "image_url": {"url": url}}), [{"role": "user", "content": SAYS}]]
    options = ("--dtype", toy.dtype, "--enforce-eager", "--served-model-name", "small")
    with serving(out, tmp_path / "log", *options) as base:
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none")
        answers = [
            client.chat.completions.create(
                model="small", messages=messages, max_tokens=6, temperature=0, logprobs=True,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            for messages in asked
        ]  # fmt: skip
    model, processor = load(exported, toy), AutoProcessor.from_pretrained(exported)
    for answer, messages, images in zip(answers, (chat({"type": "image"}), asked[1]), ([Image.open(file)], None)):
        tokens = answer.choices[0].model_extra["token_ids"]
        text = processor.apply_chat_template(messages)
        ids, want = continued(model, processor(images=images, text=[text], return_tensors="pt"), tokens)
        assert answer.model_extra["prompt_token_ids"] == ids
        got = torch.tensor([entry.logprob for entry in answer.choices[0].logprobs.content])
        assert len(got) == 6 and (got - want[-6:]).abs().max() < 1e-4
