"""A child process: a Python of its own, that ends with its parent and hears of Ctrl-C from its parent alone."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["start"]


def start(arguments: list[str], environment: Mapping[str, str], **streams: Any) -> "subprocess.Popen[str]":
    """Starts ``python ARGUMENTS``, which finds the same jbn; its stdin is a pipe, at an end when this process is.

    Args:
        arguments: what follows ``python``: a file, or ``-m`` and a module.
        environment: variables beside those of this process.
        **streams: stdout and stderr, as `subprocess.Popen` takes them.
    """
    paths = (os.environ.get("PYTHONPATH"), str(Path(__file__).parents[2]))
    return subprocess.Popen(
        # -P keeps the folder of a program, and the current one, off its path.
        [sys.executable, "-P", *arguments],
        stdin=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
        # A terminal sends Ctrl-C to a group of processes; systems without groups take the flag.
        process_group=0,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        **streams,
    )
