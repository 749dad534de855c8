"""What a command has others start for it: by Slurm's daemons, over ssh, by a container engine. None of that is guarded.

A lease holds what descends from its launcher. `srun torchrun` does not: slurmstepd starts it. Looked at is the command
itself, what stands behind `env`, `time` and their like, what a shell is given by -c, and the one script that is named;
what that calls in its turn is not. So what is found is certain to be said, and what is not found is not denied.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePath

from securerun.job.shell_words import simple_commands
from securerun.text import printable

# Of a script and of what a shell is given; more is not read.
_MOST_READ = 65_536
_MOST_COMMANDS = 2_000
# Words of a wrapper's own before its command: each is looked for in PATH, which may be far away.
_LONGEST_PREFIX = 32
# Wrappers in wrappers.
_DEEPEST = 8
_MOST_NAMED = 4
# How far behind its name a client's subcommand may stand, after options of the client's own.
_WORDS_LOOKED_AT = 8


@dataclass(frozen=True)
class Client:
    """A program that asks another to start things. how: what becomes of them. instead: how they are guarded.

    verbs: its subcommands that start anything; none where it always does.
    """

    how: str
    instead: str
    verbs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Elsewhere:
    """A client that a command calls. place: the script in which it stands, "" for the command itself."""

    name: str
    client: Client
    place: str = ""

    def __str__(self) -> str:
        where = f" (in {printable(self.place)})" if self.place else ""
        return f"{self.name}{where}"


_CONTAINERS = frozenset(
    ("run", "exec", "start", "restart", "create", "compose", "container", "up", "task", "pod", "play", "kube")
)
_MACHINES = frozenset(("start", "exec", "shell", "launch", "restart"))
_PODS = frozenset(("run", "exec", "apply", "create"))
_JOBS = frozenset(("run", "launch", "exec", "apply"))
_IN_SCRIPT = "securerunctl exec -- COMMAND in the job's script"
_IN_CONTAINER = "securerunctl exec -- COMMAND in the container (docs/privilege.md)"
_ON_EVERY_NODE = "securerunctl exec -- {} on every node"
_EACH_TASK = "{0} … securerunctl exec -- COMMAND, or {0} … securerun in place of torchrun"
_BY_SSH = "{0} … securerunctl exec -- COMMAND"

# Names, what becomes of what they start, how that is guarded, and their subcommands that start anything.
_KINDS: tuple[tuple[str, str, str, frozenset[str]], ...] = (
    ("srun", "slurmstepd starts it", _EACH_TASK, frozenset()),
    ("jsrun aprun palsrun blaunch pbsdsh", "the batch system starts it", _EACH_TASK, frozenset()),
    ("flux", "flux starts it", "flux run securerunctl exec -- COMMAND", frozenset(("run", "submit", "batch"))),
    (
        "mpirun mpiexec mpiexec.hydra mpirun_rsh orterun prterun prun oshrun charmrun horovodrun",
        "MPI's daemons start it, on other hosts at least",
        _EACH_TASK,
        frozenset(),
    ),
    (
        "sbatch bsub qsub qrsh oarsub msub condor_submit llsubmit at vcctl arena",
        "the batch system starts it",
        _IN_SCRIPT,
        frozenset(),
    ),
    ("torchx sky dstack", "a scheduler starts it", _IN_SCRIPT, _JOBS),
    (
        "ssh rsh mosh pdsh clush dsh pssh parallel-ssh xdsh psh ansible dask-ssh",
        "it runs on other hosts",
        _BY_SSH,
        frozenset(),
    ),
    ("colossalai", "it runs on other hosts", _ON_EVERY_NODE.format("torchrun …"), frozenset(("run",))),
    ("docker docker-compose podman nerdctl ctr crictl", "its engine starts it", _IN_CONTAINER, _CONTAINERS),
    ("lxc incus machinectl", "its engine starts it", _IN_CONTAINER, _MACHINES),
    ("kubectl oc k3s", "the cluster starts it", "securerunctl exec -- COMMAND in the pod", _PODS),
    (
        "ray",
        "a ray that runs already starts it",
        _ON_EVERY_NODE.format("ray start --block …"),
        frozenset(("job", "submit", "exec", "up", "attach")),
    ),
    ("systemd-run", "systemd starts it", _BY_SSH, frozenset()),
    ("tmux", "a tmux that runs already starts it", "securerunctl exec -- COMMAND inside of tmux", frozenset()),
)
_CLIENTS = {
    name: Client(how, instead.format(name), verbs) for names, how, instead, verbs in _KINDS for name in names.split()
}
# Only with these do they start anything on other hosts: deepspeed/launcher/runner.py, accelerate/commands/launch.py.
_WITH_OPTIONS = {
    "deepspeed": ("--hostfile", "-H", "--force_multi"),
    "accelerate": ("--deepspeed_hostfile",),
}
_OTHER_HOSTS = {
    name: Client("pdsh starts it", _ON_EVERY_NODE.format(command))
    for name, command in (("deepspeed", "deepspeed --no_ssh --node_rank R …"), ("accelerate", "accelerate launch …"))
}
# They are followed by the name of a user, a group or a variable.
_NAMING = frozenset(("-u", "-g", "-U", "--user", "--group", "--unset"))
_FIND_STARTS = frozenset(("-exec", "-execdir", "-ok", "-okdir"))
# It takes these to mean that nothing is started elsewhere after all.
_AFTER_ALL_HERE = {
    "systemd-run": ("--scope",),
    "deepspeed": ("--no_ssh",),
    "torchx": ("local_cwd", "-slocal_cwd", "--scheduler=local_cwd"),
}

# They start what they are given, here. salloc too, where it is given a command.
_WRAPPERS = frozenset(
    (
        *("env", "time", "nohup", "nice", "ionice", "setsid", "stdbuf", "timeout", "chrt", "taskset", "numactl"),
        *("exec", "command", "builtin", "sudo", "doas", "unbuffer", "script", "flock", "xargs", "watch", "prlimit"),
        *("strace", "ltrace", "perf", "nsys", "ncu", "catchsegv", "unshare", "setarch", "salloc", "eatmydata"),
        *("uv", "poetry", "conda", "mamba", "micromamba", "pixi", "dumb-init", "tini", "catatonit", "gosu", "su-exec"),
        *("runuser", "capsh", "setpriv", "systemd-inhibit", "apptainer", "singularity", "enroot", "proot"),
        *("parallel", "su", "trap", "chroot", "cgexec", "sg"),
    )
)
_SHELLS = frozenset(("sh", "bash", "dash", "zsh", "ksh", "mksh", "ash", "fish"))
_OF_SHELL = re.compile(rb"#![^\n]*\b(?:ba|da|z|k|mk|a|fi)?sh\b")
_GIVEN = re.compile(r"-[A-Za-z]*c[A-Za-z]*")
_ITSELF = re.compile(r"(?:^|(?<=[\s/'\"(;&|]))securerun(?:ctl)?(?=[\s'\";&|)]|$)")
# Before a command, in the words of a shell.
_KEYWORDS = frozenset(("then", "do", "else", "elif", "if", "while", "until", "!", "{", "eval", "coproc"))
_DECLARATIONS = frozenset(("export", "declare", "local", "readonly", "typeset"))
# How env(1) is told to split a word, in one with it.
_SPLIT = re.compile(r"^(?:-S|--split-string=)")
# Where a program is, asked for in its place: `$(which srun) -n 2 ...`.
_WHERE = re.compile(r"(?:\$\(|`)\s*(?:which|command -v|type -[pP])\s+([\w./-]+)\s*[)`]")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=(.*)", re.DOTALL)


def of_command(command: Sequence[str]) -> tuple[Elsewhere, ...]:
    """Return the clients that a command calls to have others start things, each once; a few of many."""
    found = {one.name: one for one in _of_words(command, "", 0)}
    return tuple(found.values())[:_MOST_NAMED]


def _of_words(words: Sequence[str], place: str, depth: int) -> Iterator[Elsewhere]:
    """Look at a command. place: the script in which it stands, if it does: then no other is looked into."""
    if not words or not words[0] or depth > _DEEPEST:
        return
    name, rest = PurePath(words[0]).name, words[1:]
    if _ITSELF.fullmatch(name) or (name == "command" and rest[:1] and rest[0] in ("-v", "-V")):
        return
    client = _client(name, rest)
    if client is not None:
        if not any(_ITSELF.search(word) for word in _without_names(rest)):
            yield Elsewhere(name, client, place)
    elif name in _WRAPPERS:
        wrapped = _wrapped(rest)
        yield from _of_words(wrapped, place, depth + 1)
        # `env -S "srun ..."`, `su -c "srun ..."`, `trap "..." EXIT`: a whole command in one word.
        for word in rest[: min(len(rest) - len(wrapped), _LONGEST_PREFIX)]:
            if " " in word and not _ASSIGNMENT.fullmatch(word):
                yield from _of_text(_SPLIT.sub("", word), place, depth + 1)
    elif name == "find":
        for number, word in enumerate(rest):
            if word in _FIND_STARTS:
                yield from _of_words(rest[number + 1 :], place, depth + 1)
    elif name in _SHELLS:
        yield from _of_shell(rest, place, depth + 1)
    elif not place:
        yield from _of_script(shutil.which(words[0]) or "", depth + 1, must_say=True)


def _client(name: str, rest: Sequence[str]) -> Client | None:
    """Return what a program asks, called with these words; None where it asks nobody."""
    if any(word in _AFTER_ALL_HERE.get(name, ()) for word in rest):
        return None
    if name in _WITH_OPTIONS:
        asked = any(word.partition("=")[0] in _WITH_OPTIONS[name] for word in rest)
        return _OTHER_HOSTS[name] if asked else None
    client = _CLIENTS.get(name)
    if client is None or (client.verbs and not client.verbs.intersection(rest[:_WORDS_LOOKED_AT])):
        return None
    return client


def _without_names(words: Sequence[str]) -> Iterator[str]:
    """Yield all but what `-J` and `--job-name` are followed by: a job may be called securerun."""
    for before, word in zip(("", *words), words):
        if before not in ("-J", "--job-name"):
            yield word


def _wrapped(words: Sequence[str]) -> Sequence[str]:
    """Return the command that a wrapper is given: it begins with the first word that can be run.

    Which of a wrapper's options take a value is not known here, but for names of users and variables. Any other value
    is rarely the name of a program.
    """
    for number, (before, word) in enumerate(zip(("", *words), words[:_LONGEST_PREFIX])):
        name = PurePath(word).name
        if word.startswith("-") or not name or before in _NAMING or _ASSIGNMENT.fullmatch(word):
            continue
        if name in _CLIENTS or name in _WITH_OPTIONS or name in _WRAPPERS or shutil.which(word):
            return words[number:]
    return ()


def _of_shell(words: Sequence[str], place: str, depth: int) -> Iterator[Elsewhere]:
    for number, word in enumerate(words):
        if _GIVEN.fullmatch(word):
            yield from _of_text(" ".join(words[number + 1 : number + 2]), place, depth)
            return
        if not place and not word.startswith(("-", "+")) and os.path.isfile(word):  # noqa: PTH113 - it may be no path
            yield from _of_script(word, depth, must_say=False)
            return


def _of_script(path: str, depth: int, *, must_say: bool) -> Iterator[Elsewhere]:
    """Look into a script. must_say: whether its first line has to name a shell."""
    content = _content(path)
    if not must_say or _OF_SHELL.match(content):
        yield from _of_text(content.decode(errors="replace"), PurePath(path).name, depth)


def shell_script(path: str) -> str:
    """Return the beginning of a shell's script: a file that says so, by its name or its first line; else ""."""
    content = _content(path)
    is_script = path.endswith((".sh", ".bash", ".sbatch", ".slurm")) or _OF_SHELL.match(content) is not None
    return content.decode(errors="replace") if is_script else ""


def _content(path: str) -> bytes:
    """Return the beginning of a regular file; nothing of others: a pipe is not to be emptied, nor waited for."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return os.read(descriptor, _MOST_READ)
        finally:
            os.close(descriptor)
    return b""


def _of_text(text: str, place: str, depth: int) -> Iterator[Elsewhere]:
    """Look at the commands in a shell's text, and at what variables are set to, to be run later."""
    if depth > _DEEPEST:
        return
    for words in islice(simple_commands(_WHERE.sub(r"\1", text[:_MOST_READ])), _MOST_COMMANDS):
        yield from _of_simple_command(words, place, depth + 1)


def _of_simple_command(words: Sequence[str], place: str, depth: int) -> Iterator[Elsewhere]:
    for word in words:
        _, begins, substituted = word.partition("$(")
        if begins:
            yield from _of_text(f"({substituted}", place, depth)
    for number, word in enumerate(words):
        assigned = _ASSIGNMENT.fullmatch(word)
        if assigned and " " in assigned.group(1):  # LAUNCHER="srun torchrun"
            yield from _of_text(assigned.group(1), place, depth)
        elif not assigned and word not in _KEYWORDS and word not in _DECLARATIONS:
            command = words[number:]
            command = command[2:] if command[:2] == ["set", "--"] else command
            if len(command) > 1:  # else it starts nothing: a pattern of a `case`, the name of a function
                yield from _of_words(command, place, depth)
            return
