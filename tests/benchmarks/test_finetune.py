"""`python -m benchmarks.finetune`: items by hand, what is right against greedy decoding, and every way."""

import pytest
import torch

from benchmarks import finetune
from ria_vllm.offline.model.run.hf import load_model

CORPUS = """

\tThe/at Court/nn-tl of/in Oslo/np said/vbd ,/, ``/`` No/rb ''/'' ./.


\tIt/pps isn't/bez* Pat's/np$ !/.
"""


@pytest.fixture
def brown(tmp_path):
    folder = tmp_path / "brown"
    folder.mkdir()
    for number in range(40):
        (folder / f"ca{number:02}").write_text(CORPUS * 60)
    return folder


def answers(item):
    return [text for text, is_answer in item if is_answer]


def whole(item):
    return "".join(text for text, _ in item)


def test_an_answer_is_right_where_greedy_decoding_writes_it(tiny):
    """Windows of what the model itself writes, some tokens changed; the model decodes each answer again."""
    folder = str(tiny("llama"))
    model = load_model(folder, torch.device("cpu"), "auto")
    draw = torch.Generator().manual_seed(0)
    written = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=253, do_sample=False, eos_token_id=None)[0]
    tokens = torch.stack([written, written.roll(1)])
    changed = torch.rand(tokens.shape, generator=draw) < 0.1
    tokens[changed] = torch.randint(3, 90, (int(changed.sum()),), generator=draw)
    numbers = (torch.arange(256) // 3 % 2 * (torch.arange(256) // 6 + 1)).repeat(2, 1)  # three tokens, three of none
    numbers[1][numbers[1] > 0] += 1000
    right = []
    for window, of in zip(tokens, numbers, strict=True):
        for number in of.unique().tolist()[1:]:
            at = (of == number).nonzero().flatten().tolist()
            again = model.generate(window[None, : at[0]], max_new_tokens=len(at), do_sample=False, eos_token_id=None)
            right.append(torch.equal(again[0, at[0] :], window[at]))
    found = finetune.share_right(model, tokens, numbers)
    assert found["answers"] == len(right) and 0 < sum(right) < len(right)
    assert found["right"] == pytest.approx(sum(right) / len(right))
