from __future__ import annotations

import sys
from pathlib import Path

# test_sync_bntt.py and the processes it starts share sync_bntt_rank.py; with importmode=importlib the folder is not on the path.
sys.path.insert(0, str(Path(__file__).parent))
