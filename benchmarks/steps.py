"""A launch that notes how long its steps take, for benchmarks/launch.py.

    steps.py torchrun|securerun FILE [ARGUMENTS ...]

Runs that command's own main in this process. At the exit it writes {step: seconds} to FILE, with the moments of the
first and the last note on the monotonic clock, which all processes share.
"""

import time

_BEGIN = time.monotonic()

import atexit  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Callable  # noqa: E402

_taken: dict[str, float] = {}


def timed(step: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, whose time counts for the step."""

    @functools.wraps(work)
    def working(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        begin = time.monotonic()
        try:
            return work(*arguments, **named)
        finally:
            _taken[step] = _taken.get(step, 0.0) + time.monotonic() - begin

    return working


def import_torch() -> Any:  # noqa: ANN401
    """torch's launcher, the running of which is then timed too."""
    from torch.distributed import run

    run.run = timed("torch runs the job", run.run)
    return run


def import_securerun() -> tuple[Any, Any, Any]:
    """What the console script imports."""
    from securerun import run
    from securerun.preflight import inspection
    from securerun.protection import plan

    return inspection, plan, run


def torchrun() -> None:
    run = timed("import torch", import_torch)()
    run.parse_args = timed("parse", run.parse_args)
    run.main()


def securerun() -> None:
    inspection, plan, run = timed("load securerun", import_securerun)()
    from securerun.protection.client import Guard

    importing = run._import_torch

    def import_both() -> Any:  # noqa: ANN401
        decorator = importing()
        import_torch()
        return decorator

    run._import_torch = timed("import torch", import_both)
    run._understand = timed("parse", run._understand)
    inspection.begin = timed("preflight", inspection.begin)
    inspection.inspect = timed("preflight", inspection.inspect)
    plan.understand = timed("policy", plan.understand)
    Guard.__init__ = timed("start the guard", Guard.__init__)  # type: ignore[method-assign]
    Guard._ready = timed("wait for the guard", Guard._ready)  # type: ignore[method-assign]
    Guard.guard = timed("policy to layers", Guard.guard)  # type: ignore[method-assign]
    Guard.release = timed("farewell", Guard.release)  # type: ignore[method-assign]
    run.command()


def write(file: str) -> None:
    """What was noted; waiting for the guard is a part of getting the layers, and stands beside it."""
    waited = _taken.get("wait for the guard", 0.0)
    if "policy to layers" in _taken:
        _taken["policy to layers"] -= waited
    Path(file).write_text(json.dumps({"begin": _BEGIN, "end": time.monotonic(), "steps": _taken}))


if __name__ == "__main__":
    command, file = sys.argv[1:3]
    sys.argv = [str(Path(sys.executable).parent / command), *sys.argv[3:]]
    # Registered first, so called last: what torch has to do at the exit is not yet over then, but nearly.
    atexit.register(write, file)
    {"torchrun": torchrun, "securerun": securerun}[command]()
