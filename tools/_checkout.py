"""Imported first by every tool: its own checkout's package comes before one that is installed (docs/decisions.md)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
