"""The program ``jbn``, outside of the package, whose import takes a second: Ctrl-C is heard then too."""

import os
import signal
import sys

__all__ = ["main"]


def main() -> int:
    """Runs `jbn.cli.main`; before there is anything to clean up, a signal ends the process with a line."""

    def leave(number, frame):
        how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        os.write(2, f"jbn: {how}.\n".encode())
        os._exit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: old for number, old in before.items() if old in (signal.SIG_DFL, signal.default_int_handler)}
    for number in before:
        signal.signal(number, leave)
    from jbn.cli import main as run

    for number, old in before.items():
        signal.signal(number, old)
    return run()


if __name__ == "__main__":
    sys.exit(main())
