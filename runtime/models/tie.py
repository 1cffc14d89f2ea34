"""A child process that ends when whoever started it does, however that ended."""

import os
import signal
import threading


def end_with_input() -> None:
    """End this process, and every other one of a group that it leads, at the end of its standard input."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
