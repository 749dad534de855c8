"""Runs a command as an ordinary user, from the root of the checkout:   python tests/ground/ordinary_user.py COMMAND

For root, who so sees that a test needs nothing that only root may do. The user has an account, a home, a temporary
directory, and /etc, /run, /var/log and /dev, that go when the command has ended (`users.PrivateMachine`).
"""

from __future__ import annotations

import os
import subprocess
import sys

from checkout import CHECKOUT
from hosts import hear_signals
from users import PrivateMachine


def main() -> int:
    """Return the command's status."""
    hear_signals()
    try:
        with PrivateMachine() as machine:
            user = machine.add_user("tester")
            # Not the machine's /tmp, where the next run is another user's; nor the checkout, which is root's.
            temporary = f"{user.home}/tmp"  # noqa: S108
            machine.place(temporary).mkdir()
            os.chown(machine.place(temporary), user.uid, user.gid)
            places = {"TMPDIR": temporary, "HYPOTHESIS_STORAGE_DIRECTORY": f"{user.home}/hypothesis"}
            words = machine.command(sys.argv[1:], user=user, env=places, cwd=str(CHECKOUT))
            return subprocess.run(words, check=False).returncode
    except RuntimeError as missing:
        print(f"ordinary_user: {missing}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
