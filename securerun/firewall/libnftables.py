"""libnftables inside this process: texts in nft's language are run through one netlink socket that we keep.

A table with `flags owner` belongs to the socket that made it (net/netfilter/nf_tables_api.c, kernel 5.12):
nobody else may change or flush it, and the kernel deletes it when the last copy of the socket is closed. The `nft`
command closes its socket when it ends, so such a table has to be made in the process that is to hold it.

What libnftables 1.0.6 leaves to its caller:
- its socket is not close-on-exec (src/mnl.c: nft_mnl_socket_open), and a program started from here would keep the
  table alive: the descriptor is marked here, and closed in children that are forked without starting a program;
- when it gets no socket it ends the whole process (src/netlink.c: netlink_init_error): one is opened beforehand;
- what it cannot read it may die of: 0.9.8 of Debian 11 does, at an error in a table's block with a set or chain in it.
  Whatever it may not know is read alone, first (`read`);
- it waits with select(2), and glibc aborts a process that does so with a descriptor of 1024 or more: refused here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re

from securerun.linux import netlink, nfnetlink, proc

LIBRARY = "libnftables.so.1"
_PACKAGES = "libnftables1 (Debian, Ubuntu) or nftables (openEuler, CentOS, Kylin)"
_SELECTABLE = 1024  # FD_SETSIZE
# include/nftables/libnftables.h: NFT_CTX_OUTPUT_STATELESS, NUMERIC_PROTO, NUMERIC_PRIO, TERSE
_OUTPUT = 1 << 2 | 1 << 7 | 1 << 8 | 1 << 11


class NftablesError(Exception):
    """What libnftables or the kernel said, on one line."""


class Nftables:
    """One context of libnftables, and with it one netlink socket, until `close`.

    Raises NftablesError where the library, the kernel's nf_tables or the permission to ask it is missing.
    """

    def __init__(self) -> None:
        self._library = _load()
        _require_netfilter()
        before = _netlink_descriptors()
        self._context: int | None = self._library.nft_ctx_new(0)
        if self._context is None:
            raise NftablesError(f"{LIBRARY} has no memory for a context")
        self._descriptors = _netlink_descriptors() - before
        for descriptor in self._descriptors:
            os.set_inheritable(descriptor, False)
        _open.add(self)
        if max(self._descriptors, default=_SELECTABLE) >= _SELECTABLE:
            self.close()
            raise NftablesError(f"{LIBRARY} needs a descriptor below {_SELECTABLE}, and this process has too many open")
        # Nothing may be printed: the guard's standard output is its answer to the launcher.
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)
        self._library.nft_ctx_output_set_flags(self._context, _OUTPUT)

    def run(self, text: str) -> str:
        """Run commands in nft's language as one transaction, and return what they print.

        Lists are terse (sets without their elements, no counters) and priorities are numbers.
        Raises NftablesError when anything is refused; then nothing was changed.
        """
        if self._context is None:
            raise NftablesError("this context of libnftables is closed")
        status = self._library.nft_run_cmd_from_buffer(self._context, text.encode())
        if status != 0:
            raise NftablesError(one_line(_text(self._library.nft_ctx_get_error_buffer(self._context))))
        return _text(self._library.nft_ctx_get_output_buffer(self._context))

    def read(self, text: str) -> None:
        """Read commands in nft's language and run none. Raises NftablesError for what this library does not know."""
        self._library.nft_ctx_set_dry_run(self._context, True)
        try:
            self.run(text)
        finally:
            self._library.nft_ctx_set_dry_run(self._context, False)

    def close(self) -> None:
        """Close the socket: the kernel deletes the tables that it owns. May be called again."""
        _open.discard(self)
        context, self._context = self._context, None
        if context is not None:
            self._library.nft_ctx_free(context)

    def _let_go(self) -> None:
        """In a forked child: close our copy of the socket, and leave the context, which would close it again."""
        self._context = None
        for descriptor in self._descriptors:
            os.close(descriptor)


_open: set[Nftables] = set()


def _let_go_of_all() -> None:
    while _open:
        _open.pop()._let_go()


os.register_at_fork(after_in_child=_let_go_of_all)


def one_line(errors: str) -> str:
    """libnftables' first complaint, without the place in the text and the underlined copy of it."""
    found = re.search(r"Error: (.+)", errors)
    return found.group(1).strip() if found else " ".join(errors.split()) or "libnftables gave no reason"


def _text(buffer: bytes | None) -> str:
    return (buffer or b"").decode(errors="replace")


@functools.cache
def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise NftablesError(f"{LIBRARY} cannot be loaded; install {_PACKAGES} ({error})") from error
    context = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_new.restype = context
    library.nft_ctx_output_set_flags.argtypes = [context, ctypes.c_uint]
    library.nft_ctx_output_set_flags.restype = None
    library.nft_ctx_set_dry_run.argtypes = [context, ctypes.c_bool]
    library.nft_ctx_set_dry_run.restype = None
    library.nft_run_cmd_from_buffer.argtypes = [context, ctypes.c_char_p]
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
        getattr(library, name).argtypes = [context]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(library, name).argtypes = [context]
        getattr(library, name).restype = ctypes.c_char_p
    return library


def _require_netfilter() -> None:
    try:
        nfnetlink.open_channel().close()
    except OSError as error:
        raise NftablesError(f"no netlink socket to netfilter: {error.strerror}") from error


def _netlink_descriptors() -> frozenset[int]:
    """Return this process' descriptors that are netlink sockets to netfilter."""
    # The descriptor that listed the directory is closed by now.
    own = proc.own_descriptors()
    return frozenset(descriptor for descriptor in own if netlink.is_channel(descriptor, netlink.NETFILTER))
