"""A pruned text decoder of a model that reads images, through the API. The zoo has others."""

import base64

import openai
import pytest
import torch
from PIL import Image
from test_server import serving
from transformers import AutoProcessor
from zoo.agreement import load, picture
from zoo.family import dense_folder, pruned_folders
from zoo.toys import TOYS

pytestmark = pytest.mark.slow

SAYS = [{"type": "text", "text": "hello there"}]
TEMPLATE = (
    "{%% for message in messages %%}{%% for part in message['content'] %%}{%% if part['type'] == 'image' %%}%s"
    "{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}{%% endfor %%}"
)


def chat(image: dict) -> list[dict]:
    return [{"role": "user", "content": [image, *SAYS]}]


@torch.no_grad()
def continued(model: torch.nn.Module, inputs: dict, tokens: list[int]) -> tuple[list[int], torch.Tensor]:
    """The ids that a processor gives, and transformers' logprob of each from the second on, `tokens` too."""
    ids, others = inputs["input_ids"], {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    for kind in [kind for kind in others if "token_type_ids" in kind]:
        others[kind] = torch.nn.functional.pad(others[kind], (0, len(tokens)))
    sequence = torch.cat([ids, torch.tensor([tokens])], -1)
    found = model(input_ids=sequence, **others).logits.log_softmax(-1)[0]
    return ids[0].tolist(), found[:-1].gather(-1, sequence[0, 1:, None])[:, 0]


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen2_5_vl"])
def test_what_compress_writes_through_the_api(name, tmp_path):
    """With an image and with text alone, against transformers on what `export` makes of the folder."""
    toy = TOYS[name]
    (dense_folder(name, toy, tmp_path) / "chat_template.jinja").write_text(TEMPLATE % toy.processor.placeholder)
    out, exported, _ = pruned_folders(name, toy, tmp_path)
    file = picture(tmp_path)
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
