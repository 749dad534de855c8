"""Writes docs/options.md from the table of options in securerun/options.py.

Run after a change there: .venv/bin/python scripts/options_page.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from securerun.options import GROUPS, OPTIONS, SITE_CONFIG, Option, Options

PAGE = Path(__file__).resolve().parent.parent / "docs/options.md"

_BEGINNING = f"""\
# Options

Made by `scripts/options_page.py` from the table in `securerun/options.py`; `securerun --help` has a line of each.

They stand before the script, among torchrun's options, by their full names: with dashes or, as torchrun's, with
underscores, `--name value` or `--name=value`. What comes after the script is the script's.
`securerunctl exec` has the same ones before its command, `--launcher` and `--[no-]seal-logs` aside.

A value comes from the flag, else from the environment (an empty variable counts as none), else from `{SITE_CONFIG}`:

```toml
# {SITE_CONFIG}
peers = ["node0", "10.0.0.0/24"]
umask = "0077"
accept = false
```

Tab completes them, with torchrun's own and their values, in every bash that begins after this (zsh: `setup
completion zsh`, into `_securerun` in a directory of `$fpath`). It is made for the torch that is installed.
`securerunctl` itself is completed by `securerunctl --install-completion`. From torch 2.14 on, and with the package
shtab, `securerun --print-completion SHELL` prints torch's kind of script: more shells, the same options, fewer values.

```sh
mkdir -p ~/.local/share/bash-completion/completions
securerunctl setup completion bash > ~/.local/share/bash-completion/completions/securerun
```
"""


def render() -> str:
    """The text of the page."""
    return "\n".join((_BEGINNING, *_sections()))


def _sections() -> Iterator[str]:
    for group in GROUPS:
        yield f"## {group.capitalize()}\n"
        for option in OPTIONS:
            if option.group == group:
                yield f"### {option.synopsis}\n"
                yield f"{_place(option)}\n"
                yield f"{option.help}\n"


def _place(option: Option) -> str:
    parts = [f"`{option.variable}`"]
    if option.in_file:
        parts.append(f"`{option.key}` in the site file")
    if option.choices:
        parts.append(" ".join(f"`{choice}`" for choice in option.choices))
    parts.append(_default(option))
    return " · ".join(parts)


def _default(option: Option) -> str:
    value = getattr(Options(), option.key)
    if option.is_flag:
        return "on by default" if value else "off by default"
    return "no default of its own" if value is None else f"default: `{value}`"


if __name__ == "__main__":
    PAGE.write_text(render())
