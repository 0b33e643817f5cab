import sys
from pathlib import Path

from families import text, tiny  # noqa: F401

# The mock of a Hopper GPU is shared with the tests of serving.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "serve")]

from pretend_hopper import cutlass_on_cpu, hopper, hopper_layers  # noqa: F401
from small_gpu import mocked, small  # noqa: F401
