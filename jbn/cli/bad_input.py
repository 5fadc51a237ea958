"""The one exception that the command line turns into a line on stderr and exit code 2."""

__all__ = ["BadInput"]


class BadInput(Exception):
    """What the user gave cannot be used: ``<option>: got …; expected …; <what to do>.``

    A class of its own, so that a ValueError out of the library, which would be a bug here, keeps its
    traceback.
    """
