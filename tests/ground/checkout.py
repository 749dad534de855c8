"""Where things of this checkout are."""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
GROUND = CHECKOUT / "tests/ground"
# Those of the tests' own Python, and of no other securerun that the machine may have.
COMMANDS = Path(sys.executable).parent
