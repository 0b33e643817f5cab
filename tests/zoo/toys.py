"""The zoo: model type -> toy."""

from zoo.experts import MIXTURES
from zoo.hybrids import HYBRIDS
from zoo.text import TEXT
from zoo.toy import Toy
from zoo.wrapped import WRAPPED

ALL: dict[str, Toy] = {**TEXT, **MIXTURES, **HYBRIDS, **WRAPPED}
# Not measured yet.
# `python -m zoo.run RESULTS.json NAME` does it, and then the name goes from here.
UNTRIED = frozenset(("cohere2_vision qwen2_audio").split())
TOYS = {name: toy for name, toy in ALL.items() if name not in UNTRIED}
