"""The command line: ``jbn train`` and ``jbn bench``. The only place in the package that prints.

What each file holds: ``commands`` the options as typer sees them; ``options`` what values they take;
``data``, ``network``, ``fit``, ``activations``, ``saving`` and ``interrupt`` the pieces of a run; ``devices``
where its arrays lie; ``processes`` how several processes are one run; ``checkpoints`` what outlives
it, and ``resume`` how it goes on from there; ``train`` puts them together; ``runs`` reads one again, for
``inspect``, ``calibrate`` and ``fold``; ``display`` shows a run while it goes, and what came out.
"""

import os
import sys
from importlib.util import find_spec

from jbn.cli.bad_input import BadInput

__all__ = ["main"]

# Modules of the extra "demo".
_NEEDED = ("matplotlib", "orbax", "rich", "safetensors", "sklearn", "typer")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; the entry point of ``jbn`` and ``python -m jbn``.

    Args:
        argv: the arguments after the program's name; None for those of the process.

    Returns:
        0 when done, 2 for input that cannot be used (one line on stderr), 130 when interrupted.

    Example:
        >>> from jbn.cli import main
        >>> main(["train", "--epochs", "0"])  # on stderr: jbn: --epochs: got 0; expected …
        2
    """
    try:
        missing = [name for name in _NEEDED if find_spec(name) is None]
        if missing:
            raise BadInput(
                f"extra 'demo': got no module {', '.join(missing)}; expected what the command line needs; "
                f"install it with: pip install 'jbn[demo]'"
            )
        from jbn.cli.commands import parse

        job = parse(sys.argv[1:] if argv is None else argv)
        code = job() if job is not None else None
        sys.stdout.flush()
    except BadInput as error:
        print(f"jbn: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jbn: interrupted.", file=sys.stderr)
        if argv is None:
            sys.stderr.flush()
            os._exit(130)  # Python's own way out waits for nothing, and XLA may still be compiling: a crash
        return 130
    except BrokenPipeError:  # whoever read what is printed, as in jbn train | head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code or 0
