"""Measurements that run from a checkout; see README.md.

The checkout need not be installed: as in pyproject.toml, its folder `serve/` is ria_vllm.serve.
"""

from importlib.util import find_spec
from pathlib import Path

import ria_vllm

if find_spec("ria_vllm.serve") is None:
    ria_vllm.__path__.append(str(Path(__file__).parents[1]))
