"""Whatever is changed in a folder, the answer is right or a one-sentence error: no traceback, no wrong weight."""

import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from mutations import Damaged, damaged, examples, other_run
from transformers import AutoModelForCausalLM

import ria_vllm
from ria_vllm.checkpoint import Reader, is_compressed
from ria_vllm.errors import RiaError
from ria_vllm.folder_commands import export, inspect, verify

OURS = str(Path(ria_vllm.__file__).parent)


@pytest.fixture(scope="module")
def other(pruned_llama, tmp_path_factory) -> Path:
    return other_run(pruned_llama.folder, tmp_path_factory.mktemp("other") / "run")


def refused(call) -> str | None:
    """The message of a RiaError; None if there was none. Other exceptions propagate."""
    try:
        call()
    except RiaError as error:
        return str(error)
    return None


@given(case=damaged)
@examples(150)
def test_the_readers_answer_in_sentences(pruned_llama, other, case: Damaged):
    with tempfile.TemporaryDirectory() as place:
        folder = case.make(pruned_llama.folder, other, Path(place) / "x")
        dense = Path(place) / "dense"
        for command in (
            [verify, folder],
            [inspect, folder],
            [inspect, folder, "--json"],
            [export, folder, "-o", dense],
        ):
            found = CliRunner().invoke(command[0], [str(word) for word in command[1:]])
            if found.exception is not None and not isinstance(found.exception, RiaError | SystemExit):
                raise found.exception
            assert "\x1b" not in found.output and "\0" not in found.output
            if command[0] is export:
                assert dense.exists() == (found.exit_code == 0) and not dense.with_name("dense.partial").exists()


@given(case=damaged)
@examples(40)
def test_transformers_gets_the_right_weights_or_none(pruned_llama, other, case: Damaged):
    """transformers may raise whatever it likes about parts that are not ours."""
    with tempfile.TemporaryDirectory() as place:
        folder = case.make(pruned_llama.folder, other, Path(place) / "x", inside="quantization_config")
        try:
            model = AutoModelForCausalLM.from_pretrained(folder)
        except RiaError:
            return
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            assert not frames[-1].filename.startswith(OURS), f"{type(error).__name__} from our own code: {error}"
            return
        if refused(lambda: is_compressed(folder)) or not is_compressed(folder):
            return  # then none of our code ran
        found = model.state_dict()
        for name in Reader(pruned_llama.folder).sparse_names:
            assert torch.equal(found[f"{name}.weight"], expected(folder, name, pruned_llama)), name


def expected(folder: Path, name: str, pruned_llama) -> torch.Tensor:
    """The reader's weight; if it refuses what transformers does not read (the index), the undamaged one."""
    try:
        return Reader(folder).linear(name).dense()
    except RiaError:
        return pruned_llama.dense[f"{name}.weight"]
