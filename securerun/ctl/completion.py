"""securerunctl setup completion: what has a shell complete the command line of `securerun`.

The script that is printed knows all options, of securerun and of the torch that is installed, so that nothing of
either is started when somebody presses Tab.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from securerun.errors import UsageError
from securerun.job.job import C10D, ETCD, ETCD_V2, PARALLEL, STATIC
from securerun.options import OPTIONS, Option

SHELLS = ("bash", "zsh")

# What stands for a value where it is none of a few words.
_FILES, _DIRECTORIES, _HOSTS, _INTERFACES, _USERS = "files", "directories", "hosts", "interfaces", "users"
_KEYS = "keys"
_KINDS = {
    "--interface": _INTERFACES,
    "--key": _KEYS,
    "--log-dir": _DIRECTORIES,
    "--master-addr": _HOSTS,
    "--peers": _HOSTS,
    "--rdzv-endpoint": _HOSTS,
    "--report": _FILES,
    "--run-as": _USERS,
}


@dataclass(frozen=True)
class Completion:
    """How one option is completed. words: the values that it takes, where they are few. kind: else, of what sort."""

    spellings: tuple[str, ...]
    summary: str
    takes_value: bool
    words: tuple[str, ...] = ()
    kind: str = ""


def print_completion(shell: str) -> None:
    """Print the script for a shell. Raises UsageError for a shell that is not one of SHELLS."""
    if shell not in SHELLS:
        raise UsageError(f"{shell!r} is no shell that is known here; write {' or '.join(SHELLS)}")
    from torch import __version__

    from securerun.job import launchers

    known = [*map(_of_ours, OPTIONS), *_of_torch(launchers.parser_of_all())]
    render = render_bash if shell == "bash" else render_zsh
    print(render(known, f"torch {__version__}"), end="")


def render_bash(known: list[Completion], made_with: str) -> str:
    """Return the script for bash. What it leaves open is completed as file names."""
    valued = "|".join(_spellings(one for one in known if one.takes_value))
    return _BASH.format(
        made_with=made_with,
        valued=valued,
        values="\n".join(_bash_values(known)),
        options=" ".join(_spellings(iter(known))),
    )


def render_zsh(known: list[Completion], made_with: str) -> str:
    """Return the script for zsh, to be sourced or to lie in the function path."""
    return _ZSH.format(made_with=made_with, options=" \\\n        ".join(_zsh_options(known)))


def _of_ours(option: Option) -> Completion:
    return Completion(
        (option.flag, *option.reversals[:1]),
        option.summary,
        not option.is_flag,
        option.choices,
        _KINDS.get(option.flag, ""),
    )


def _of_torch(parser: argparse.ArgumentParser) -> Iterator[Completion]:
    """torch spells its options with dashes and with underscores; the dashes are enough."""
    for action in parser._actions:
        spellings = tuple(one for one in action.option_strings if "_" not in one) or tuple(action.option_strings)
        if not spellings:
            continue
        words = _rendezvous_backends() if "--rdzv-backend" in spellings else tuple(map(str, action.choices or ()))
        kind = next((_KINDS[one] for one in spellings if one in _KINDS), "")
        summary = " ".join((action.help or "").split()).partition(". ")[0]
        yield Completion(spellings, summary, action.nargs != 0, words, kind)


def _rendezvous_backends() -> tuple[str, ...]:
    """Return what torch's parser takes any word for: the names of `torch.distributed.elastic.rendezvous.registry`."""
    return (STATIC, C10D, ETCD, ETCD_V2, PARALLEL)


def _spellings(completions: Iterator[Completion]) -> list[str]:
    return [spelling for one in completions for spelling in one.spellings]


def _bash_values(known: list[Completion]) -> Iterator[str]:
    for one in known:
        if one.words:
            yield f'        {"|".join(one.spellings)}) set -- -W "{" ".join(one.words)}" ;;'
        elif one.kind:
            yield f"        {'|'.join(one.spellings)}) set -- {_BASH_KINDS[one.kind]} ;;"


def _zsh_options(known: list[Completion]) -> Iterator[str]:
    for one in known:
        for spelling in one.spellings:
            summary = one.summary.translate(_ZSH_UNSAFE)
            if not one.takes_value:
                yield f"'{spelling}[{summary}]'"
                continue
            values = f"({' '.join(one.words)})" if one.words else _ZSH_KINDS.get(one.kind, " ")
            # `--option=value` and `--option value`; -rvalue and -r value.
            joint = "=" if spelling.startswith("--") else "+"
            yield f"'{spelling}{joint}[{summary}]:{spelling.lstrip('-')}:{values}'"


_BASH_KINDS = {
    _FILES: "-A file",
    _DIRECTORIES: "-A directory",
    _HOSTS: "-A hostname",
    _INTERFACES: '-W "$(cd /sys/class/net && echo *)"',
    _USERS: "-A user",
    _KEYS: '-W "auto off require" -A file',
}
_ZSH_KINDS = {
    _FILES: "_files",
    _DIRECTORIES: "_files -/",
    _HOSTS: "_hosts",
    _INTERFACES: "_net_interfaces",
    _USERS: "_users",
    _KEYS: "{compadd auto off require; _files}",
}

# A summary stands in brackets, in single quotes.
_ZSH_UNSAFE = str.maketrans({"\\": "", "[": "(", "]": ")", "'": "'\\''"})

_BASH = """\
# Completion of securerun for bash, with the options of {made_with}. Made by `securerunctl setup completion bash`.
_securerun() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} option="" at=1
    COMPREPLY=()
    while ((at < COMP_CWORD)); do
        case ${{COMP_WORDS[at]}} in
            --) return ;;
            {valued})
                option=${{COMP_WORDS[at++]}}
                # bash cuts --option=value, host:port and @file into words of their own.
                while ((at < COMP_CWORD)) && [[ ${{COMP_WORDS[at]}} == [=:@] ]]; do ((at++)); done
                ((at < COMP_CWORD)) || break
                ((at++))
                while ((at < COMP_CWORD)) && [[ ${{COMP_WORDS[at]}} == [=:@] ]]; do ((at += 2)); done
                [[ $at -gt $COMP_CWORD || $word == [=:@] ]] || option=""
                ;;
            -*) ((at++)) ;;
            *) return ;; # the script: what comes now is its own
        esac
    done
    [[ $word != [=:@] ]] || word=""
    set --
    case $option in
{values}
        "") [[ $word != -* ]] || set -- -W "{options}" ;;
    esac
    [[ $# == 0 ]] || mapfile -t COMPREPLY < <(compgen "$@" -- "$word")
}}
complete -o bashdefault -o default -F _securerun securerun
"""

_ZSH = """\
#compdef securerun
# Completion of securerun for zsh, with the options of {made_with}. Made by `securerunctl setup completion zsh`.
_securerun() {{
    _arguments -S -A '-*' \\
        {options} \\
        '1:script:_files' \\
        '*:argument:_files'
}}
if [[ $funcstack[1] == _securerun ]]; then
    _securerun "$@"
else
    compdef _securerun securerun
fi
"""
