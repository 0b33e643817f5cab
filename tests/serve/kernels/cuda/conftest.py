import sys
from pathlib import Path

# The tests of this folder share how kernels are compiled and emulated.
sys.path.insert(0, str(Path(__file__).parent))
