import re

import pytest
import torch
from click.testing import CliRunner

from ria_vllm.errors import RiaError
from ria_vllm.serve.doctor import doctor


def say(*arguments, env=None):
    return CliRunner().invoke(doctor, arguments, env=env, catch_exceptions=False).output


def test_names_versions_and_the_chosen_kernel():
    output = say("--device", "cpu")
    assert re.search(rf"^torch\s+{re.escape(torch.__version__)}$", output, re.M)
    assert re.search(r"^vllm\s+vllm\S* \d+\.\d+.*plugin found$", output, re.M)
    assert len(re.findall("chosen: the first", output)) == 1


def test_says_why_a_kernel_is_left_out():
    output = say("--device", "cpu", "--shape", "64x96")
    assert re.search(r"^  cpu\s+no: in-features 96", output, re.M)
    assert re.search(r"^  reference\s+chosen", output, re.M)


def test_forced_backend():
    assert re.search(
        r"reference\s+chosen: RIA_VLLM_BACKEND", say("--device", "cpu", env={"RIA_VLLM_BACKEND": "reference"})
    )
    assert "none: RIA_VLLM_BACKEND=nonsense" in say("--device", "cpu", env={"RIA_VLLM_BACKEND": "nonsense"})


def test_plugin_switched_off():
    assert "VLLM_PLUGINS leaves it out" in say("--device", "cpu", env={"VLLM_PLUGINS": "other"})


@pytest.mark.parametrize("shape", ["12", "0x64", "axb"])
def test_bad_shape(shape):
    with pytest.raises(RiaError, match="give OUTxIN"):
        say("--shape", shape)
