import sys
from pathlib import Path

# `sweep.py` is both a program and a module of these tests.
sys.path.insert(0, str(Path(__file__).parent))
