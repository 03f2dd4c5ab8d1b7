from __future__ import annotations

import sys
from pathlib import Path

# Test files of this folder share random_nets.py; with importmode=importlib the folder is not on the path.
sys.path.insert(0, str(Path(__file__).parent))
