"""The code of the README runs as it is pasted, block after block, and prints what the comments beside it say."""

import contextlib
import io
import re
import tokenize

import numpy as np
import pytest
from support.installed import ROOT
from support.pages import needs_what_is_absent

if not (ROOT / "README.md").exists():
    pytest.skip("needs the repository", allow_module_level=True)

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def printed(code, names):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    return out.getvalue().splitlines()


def promised(code):
    """The comments at the end of lines that print."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT and t.line.startswith("print(")]


# Parts of a block that are skipped by themselves: each import from a door, with what follows it.
DOOR = re.compile(r"^(?=from jbn\.\w+ import )", re.MULTILINE)
STATE_DICT = {"layer1.bn.running_mean": np.zeros(64, np.float32), "layer1.bn.running_var": np.ones(64, np.float32)}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.partition("\n")[0])
def test_a_block_runs_by_itself_and_prints_what_it_says(block):
    names = {"state_dict": STATE_DICT}
    first, *parts = DOOR.split(block)
    if needs_what_is_absent(first):
        pytest.skip("needs a framework that is not installed")
    for part in (first, *(part for part in parts if not needs_what_is_absent(part))):
        assert printed(part, names) == promised(part)


def test_every_line_that_prints_says_what():
    assert len(BLOCKS) == 3
    for block in BLOCKS:
        assert len(re.findall(r"^ *print\(", block, re.MULTILINE)) == len(promised(block))
