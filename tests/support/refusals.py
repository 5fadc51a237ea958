"""Tables of calls that are refused, each with its exception and its full text, as tests."""

import pytest


def refusals(table):
    """Runs a test of ``call``, ``error`` and ``text`` on each row."""
    return pytest.mark.parametrize(("call", "error", "text"), table, ids=[text.split(";")[0] for _, _, text in table])


def assert_refused(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == text
