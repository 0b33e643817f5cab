"""The zoo: model type -> toy."""

from zoo.experts import MOES
from zoo.hybrids import HYBRIDS
from zoo.text import TEXT
from zoo.toy import Toy
from zoo.wrapped import WRAPPED

TOYS: dict[str, Toy] = {**TEXT, **MOES, **HYBRIDS, **WRAPPED}
