"""Host files that change while the job runs: a node that starts later adds its own line.

What is half written, broken or empty changes nothing: a change counts once it was read twice, alike and right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from securerun.errors import PolicyError
from securerun.job import entries, hostfile
from securerun.job.entries import Entry, Tell
from securerun.job.hostfile import Reading
from securerun.linux.networks import Network

# So much is said of files that are broken again and again.
_MOST_LINES = 20


@dataclass(frozen=True)
class HostFile:
    """A host file, by its absolute name, and what stood in it last: networks written out, and host names.

    place: what it is called in messages. counted: whether each line is a node, so that none may be a network.
    """

    name: str
    place: str
    counted: bool
    fixed: tuple[Network, ...] = ()
    names: tuple[str, ...] = ()


def files_of(listed: Iterable[Entry], counted: bool) -> tuple[HostFile, ...]:
    """Return the files that entries stand in and that may be read again, with those entries."""
    by_file: dict[tuple[str, str], list[Entry]] = {}
    for entry in listed:
        if entry.file:
            by_file.setdefault((entry.file, entry.place.rpartition(", line ")[0]), []).append(entry)
    return tuple(
        _filled(HostFile(name, place, counted), group)
        for (written, place), group in by_file.items()
        if (name := hostfile.may_grow(written)) is not None
    )


class Growing:
    """Reads host files again. tell: takes a line when one cannot be read as it should be, each line once.

    is_unsettled: whether a file was just found changed, and is to be looked at once more before that counts.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell, self._told = tell, set[str]()
        self._readings: dict[str, Reading] = {}
        self._seen: dict[str, bytes] = {}
        self.is_unsettled = False

    def look(self, files: Sequence[HostFile]) -> tuple[HostFile, ...]:
        """Return the files as they are now. Takes `hostfile.SECONDS` a file at most."""
        self.is_unsettled = False
        return tuple(map(self._now, files))

    def complain(self, words: str) -> None:
        """Say what is wrong, if that has not been said."""
        if words not in self._told and len(self._told) < _MOST_LINES:
            self._told.add(words)
            self._tell(f"{words}; until that is right, the peers stay as they are")

    def _now(self, file: HostFile) -> HostFile:
        contents: list[bytes] = []
        try:
            found = entries.of_file(file.name, file.place, read=self._reader(contents))
            now = _filled(file, found)
        except PolicyError as error:
            self._seen.pop(file.name, None)
            self.complain(str(error))
            return file
        if now == file:
            self._seen.pop(file.name, None)
            return file
        import hashlib  # where a file has changed

        digest = hashlib.sha256(contents[0]).digest()
        if self._seen.get(file.name) != digest:
            self._seen[file.name] = digest
            self.is_unsettled = True
            return file
        return now

    def _reader(self, contents: list[bytes]) -> Callable[[str], bytes]:
        def read(name: str) -> bytes:
            # One that still waits for a file server goes on: there is never a second one of the same file.
            reading = self._readings.pop(name, None)
            seconds = 0.0 if reading is not None else hostfile.SECONDS
            reading = reading or Reading(name, again=True)
            try:
                contents.append(reading.wait(seconds))
            except TimeoutError:
                self._readings[name] = reading
                raise
            return contents[0]

        return read


def names_of(files: Iterable[HostFile]) -> Mapping[str, None]:
    """Return the host names in files, each once."""
    return dict.fromkeys(name for file in files for name in file.names)


def _filled(file: HostFile, listed: Iterable[Entry]) -> HostFile:
    """Return a file with what stands in it. Raises PolicyError for what can be no peer."""
    fixed: dict[Network, None] = {}
    names: dict[str, None] = {}
    for entry in listed:
        network = entries.literal(entry.word, entry.place)
        if network is None:
            names[entry.word] = None
        elif file.counted and network.num_addresses > 1:
            raise PolicyError(f"{entry.place}: {entry.word} is a network, not a node; name the nodes")
        else:
            fixed[network] = None
    return replace(file, fixed=tuple(fixed), names=tuple(names))
