"""What a launcher does to its own process, so that it starts and ends sooner and lets go of what it holds."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn


def exit_quickly() -> NoReturn:
    """End this process with status 0, without taking to pieces first what the kernel takes back at once.

    As at every end of Python, threads are joined, exit handlers called and files written out before. Left out are the
    search for garbage and the destructors of torch's libraries, which take 0.3 s to free memory and have nothing to
    save: in a launcher they have done no work.
    """
    threading._shutdown()  # type: ignore[attr-defined] # as Py_FinalizeEx and multiprocessing do (CPython)
    with suppress(Exception):  # Python 3.9 raises again what it has printed
        atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # a closed pipe, a closed file
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        ctypes.CDLL(None).fflush(None)
        os._exit(0)
    sys.exit(0)


@contextmanager
def without_collecting() -> Iterator[None]:
    """Collect no garbage in the block, nor later what the block made: for imports, which make much that stays.

    To look for garbage among hundreds of thousands of objects, now or at the exit, costs time and finds nothing.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()


@contextmanager
def closing_what_frames_hold() -> Iterator[None]:
    """Clear the frames of what the block raises: a failed job's traceback holds the agent's listening stores.

    The traceback still prints without them.
    """
    try:
        yield
    except BaseException as error:
        held: BaseException | None = error
        while held is not None:
            traceback.clear_frames(held.__traceback__)
            held = held.__cause__ or held.__context__
        raise
