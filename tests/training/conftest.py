import sys
from pathlib import Path

# serve: the small checkpoints of many families, and the comparison with vLLM.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "serve")]
