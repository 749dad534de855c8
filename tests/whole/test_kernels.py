"""securerun on a kernel that people have, in a machine of its own; scripts/kernels.sh has all of them.

What machines are made of is fetched and made once (`.kernels` in the checkout, or SECURERUN_KERNELS); then a cell is a
boot under emulation and some two minutes of a processor. torch stays out: what a kernel changes is the shield, the
chains and the guard.
"""

from __future__ import annotations

import kernel_matrix
import pytest
from kernel_cells import OF_THE_SUITE, parse_cell
from kernel_matrix import Trial
from lacking import needed

# Those that ask the kernel most in the least time: programs that it has to take and to run, cgroups that it has to
# make, and a table that it has to change while packets come.
TESTS = (
    "tests/firewall/test_shield_programs.py",
    "tests/guard/test_cgroup.py",
    "tests/firewall/test_nftables.py::test_no_packet_slips_through_while_the_table_is_changed[in a range-outlives]",
)
PARTS = ("truth", "chains", "tests", "left")
# Some minutes are enough on an idle machine; on one that has ten other things to do it was five.
SECONDS = 1200


@pytest.fixture(scope="module")
def emulator(root: None) -> None:
    tools = ("qemu-system-x86_64", "qemu-system-aarch64", "cpio", "depmod", "mke2fs")
    for tool in tools:
        needed(tool)


@pytest.mark.slow
@pytest.mark.machine
@pytest.mark.parametrize("name", OF_THE_SUITE)
def test_the_shield_is_there_and_holds_on_a_kernel_that_people_have(emulator: None, name: str) -> None:
    cell = parse_cell(name)
    trial = Trial(PARTS, tests=TESTS, seconds=SECONDS)
    document, output = kernel_matrix.try_cell(cell, kernel_matrix.kernel_of(cell, {}), trial)
    parts = document["parts"]
    assert [name for name, part in parts.items() if not part["ok"]] == [], output[-8000:]
    assert set(parts) == set(PARTS)
    assert parts["truth"]["says"].startswith("shield;"), parts["truth"]["says"]
