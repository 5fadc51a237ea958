"""What several doors to other frameworks need, and the little arithmetic that their conventions ask for."""

__all__ = ["missing"]


def missing(door: str, package: str, extra: str) -> ModuleNotFoundError:
    """The error of a door whose framework is not installed."""
    return ModuleNotFoundError(
        f"jbn.{door}: got no package {package}; expected it to be installed; run pip install 'jbn[{extra}]'."
    )
