"""The command line: ``jbn train`` and ``jbn bench``. The only place in the package that prints.

What each file holds: ``commands`` what typer sees; ``parsers`` how an option is declared and what values it takes,
``options`` those of a run; ``data``, ``network`` (the one description of it, from option to file), ``batches``, ``fit``
and ``activations`` the pieces of a run; ``devices`` where its arrays lie; ``processes`` how several processes are one
run, ``supervision`` how each is watched from outside, ``child`` how a child is started; ``places`` where results
appear, whole and locked against other runs; ``models`` the files of networks; ``checkpoints`` what outlives a run that
is cut short, and ``resume`` how it goes on from there; ``train`` puts them together; ``runs`` reads one again, for
``inspect``, ``calibrate``, ``fold`` and ``export``; ``convert`` needs none; ``display`` shows a run while it goes,
``documents`` what any command has found, ``streams`` in any encoding; ``interrupt`` hears Ctrl-C.
"""

import os
import signal
import sys
from importlib.util import find_spec

from jbn.cli.bad_input import BadInput
from jbn.cli.interrupt import check, heard, signal_seen
from jbn.cli.streams import Unprinted, make_ready, printing, say

__all__ = ["main"]

# Modules of the extra "demo".
_NEEDED = ("matplotlib", "orbax", "rich", "safetensors", "sklearn", "typer")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; the entry point of ``jbn`` and ``python -m jbn``.

    Args:
        argv: the arguments after the program's name; None for those of the process.

    Returns:
        0 when done, 2 for input that cannot be used (one line on stderr), 1 where the report cannot be printed, 130
        when interrupted, 143 after SIGTERM, 129 after SIGHUP.

    Example:
        >>> from jbn.cli import main
        >>> main(["train", "--epochs", "0"])  # on stderr: jbn: --epochs: got 0; expected …
        2
    """
    make_ready()
    with heard():
        try:
            missing = [name for name in _NEEDED if find_spec(name) is None]
            if missing:
                raise BadInput(
                    f"extra 'demo': got no module {', '.join(missing)}; expected what the command line needs; "
                    f"install it with: pip install 'jbn[demo]'"
                )
            from jbn.cli.commands import parse

            with printing():
                job = parse(sys.argv[1:] if argv is None else argv)
            check()
            return (job() if job is not None else None) or 0
        except BadInput as error:
            say(str(error))
            return 2
        except (Unprinted, BrokenPipeError) as error:
            if isinstance(error, Unprinted):  # and no reader who has had enough, as in jbn train | head
                say(f"stdout: got {error}; expected room for the report; what goes to files is saved.")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except BaseException as error:
            # Python makes a RuntimeError of a KeyboardInterrupt that comes up while a class is made.
            number = signal_seen() or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else None)
            if number is None:
                raise
            say("interrupted." if number == signal.SIGINT else f"ended by {signal.Signals(number).name}.")
            if argv is None:
                sys.stderr.flush()
                os._exit(128 + number)  # Python's own way out waits for nothing, and XLA may still compile: a crash
            return 128 + number
