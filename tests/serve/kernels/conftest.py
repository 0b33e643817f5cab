import sys
from pathlib import Path

# `layers.py` is shared by the tests of all kernels.
sys.path.insert(0, str(Path(__file__).parent))
