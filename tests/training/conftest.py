import sys
from pathlib import Path

# The small checkpoints of many families, and the comparison with vLLM.
sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
