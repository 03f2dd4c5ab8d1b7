from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Test files of this folder share time_major.py; with importmode=importlib the folder is not on the path.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("time_major")
