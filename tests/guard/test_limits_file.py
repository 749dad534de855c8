"""guard.toml where nothing reads TOML: Python has a reader of its own from 3.11 on, and the guard's package none."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from securerun.errors import PrivilegeError
from securerun.guard import limits


def test_a_python_without_a_reader_of_toml_says_what_is_missing(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was called a defect of securerun's, to every ordinary user."""
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "tomli", None)  # as if it were not installed
    with tempfile.TemporaryDirectory(dir="/run") as directory:
        file = Path(directory, "guard.toml")
        file.write_text("accept = true\n")
        with pytest.raises(PrivilegeError, match="so only root is served: .* the package tomli"):
            limits.read_site_policy(file)
