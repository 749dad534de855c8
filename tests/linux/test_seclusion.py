"""What a process keeps for itself is in none that it forks."""

from __future__ import annotations

import os
import threading
import time

from cgroups import in_child

from securerun.linux import seclusion


def test_nobody_forks_while_descriptors_are_made_that_a_child_could_not_let_go_of() -> None:
    def work() -> tuple[int, int]:
        made, begun = threading.Event(), threading.Event()

        def make() -> None:
            with seclusion.without_forks():
                begun.set()
                time.sleep(0.3)
                made.set()

        maker = threading.Thread(target=make)
        maker.start()
        begun.wait()
        child = os.fork()
        if not child:
            with seclusion.without_forks():  # and the child may make some of its own
                os._exit(3 if made.is_set() else 4)
        maker.join()
        _, status = os.waitpid(child, 0)
        with seclusion.without_forks():
            another = os.fork()
            if not another:
                os._exit(5)
            _, second = os.waitpid(another, 0)
        return os.WEXITSTATUS(status), os.WEXITSTATUS(second)

    assert in_child(work) == (3, 5)
