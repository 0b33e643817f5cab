"""Whatever is changed in a folder, the answer is right or a one-sentence error: no traceback, no wrong weight."""

import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from integer_checkpoint import with_integers
from mutations import Damaged, damaged, examples, other_run
from transformers import AutoModelForCausalLM

import ria_vllm
from ria_vllm.checkpoint.reader import Reader, is_compressed
from ria_vllm.errors import RiaError
from ria_vllm.folder_commands import export, inspect, verify
from ria_vllm.format.formats import INTEGERS

OURS = str(Path(ria_vllm.__file__).parent)


@pytest.fixture(scope="module", params=["float", "int4"])
def sound(request, pruned_llama, tmp_path_factory):
    """The pruned Llama, also with integers in groups and rounded inputs. Do not write into it."""
    if request.param == "float":
        return pruned_llama
    return with_integers(pruned_llama, tmp_path_factory.mktemp("int4") / "out", INTEGERS[4, 32], rounds_inputs=True)


@pytest.fixture(scope="module")
def other(sound, tmp_path_factory) -> Path:
    return other_run(sound.folder, tmp_path_factory.mktemp("other") / "run")


def refused(call) -> str | None:
    """The message of a RiaError; None if there was none. Other exceptions propagate."""
    try:
        call()
    except RiaError as error:
        return str(error)
    return None


@given(case=damaged)
@examples(150)
def test_the_readers_answer_in_sentences(sound, other, case: Damaged):
    with tempfile.TemporaryDirectory() as place:
        folder = case.make(sound.folder, other, Path(place) / "x")
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
def test_transformers_gets_the_right_weights_or_none(sound, other, case: Damaged):
    """transformers may raise whatever it likes about parts that are not ours."""
    with tempfile.TemporaryDirectory() as place:
        folder = case.make(sound.folder, other, Path(place) / "x", inside="quantization_config")
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
        for name in Reader(sound.folder).sparse_names:
            assert torch.equal(found[f"{name}.weight"], expected(folder, name, sound)), name


def expected(folder: Path, name: str, sound) -> torch.Tensor:
    """The reader's weight; if it refuses what transformers does not read (the index), the undamaged one."""
    try:
        return Reader(folder).linear(name).dense()
    except RiaError:
        return sound.dense[f"{name}.weight"]
