import sys
from pathlib import Path

import pytest
from families import text, tiny  # noqa: F401

# The mock of a Hopper GPU is shared with the tests of serving.
sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
sys.path.insert(0, str(Path(__file__).parent))

from pretend_hopper import ampere_layers, cutlass_on_cpu, hopper, hopper_layers  # noqa: F401
from sanitizer_stand_in import sanitizer  # noqa: F401
from small_gpu import mocked, small  # noqa: F401


@pytest.fixture
def in_tmp(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
