"""Checkpoints that hold code: what torch.load makes of them is told to the workers by two variables."""

from __future__ import annotations

from collections.abc import MutableMapping

from securerun.errors import PolicyError

# torch/serialization.py, load, since 1.13; torch_npu's own load reads both as well.
FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
ALLOWED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def is_true(text: str) -> bool:
    """Return whether torch takes a variable's text for yes."""
    return text.lower() in {"1", "y", "yes", "true"}


def forbid_code(environment: MutableMapping[str, str]) -> None:
    """Have torch.load take weights alone in whatever is started with this environment.

    Raises PolicyError where the environment asks for the opposite: torch would refuse to load anything.
    """
    allowed = environment.get(ALLOWED, "")
    if is_true(allowed):
        raise PolicyError(f"--weights-only, but {ALLOWED}={allowed} allows code in checkpoints; unset {ALLOWED}")
    environment[FORBIDDEN] = "1"
