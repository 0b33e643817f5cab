import sys
from pathlib import Path

# The makers of small checkpoints are shared with the processes that the tests start.
sys.path.insert(0, str(Path(__file__).parent))
