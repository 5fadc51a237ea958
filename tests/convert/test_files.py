"""Files of arrays: what was written is read, what is damaged or hostile is one line, nothing is lost."""

import io
import json
import os
import struct
import sys
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from jbn.convert import read_file, write_file

SUFFIXES = (".safetensors", ".npz")
RNG = np.random.default_rng(0)
ARRAYS = {
    "conv.weight": RNG.normal(size=(4, 3, 2, 2)).astype(np.float32),
    "columns": np.asfortranarray(RNG.normal(size=(3, 2))),
    "bn.num_batches_tracked": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
    "flag": np.array([True, False]),
    "wave": np.array([1 + 2j], np.complex64),
    "γ/β with spaces": np.arange(5, dtype=np.uint8),
}


def same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_written_is_read(tmp_path, suffix):
    for metadata in ({}, {"format": "pt", "network": '{"γ": 1}'}):
        file = tmp_path / f"{len(metadata)}{suffix}"
        write_file(file, ARRAYS, metadata)
        arrays, texts = read_file(str(file))
        same(arrays, ARRAYS)
        assert texts == metadata
    assert sorted(os.listdir(tmp_path)) == [f"0{suffix}", f"2{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_arrays_are_a_file_too(tmp_path, suffix):
    write_file(tmp_path / f"none{suffix}", {})
    assert read_file(tmp_path / f"none{suffix}") == ({}, {})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_arrays_give_equal_bytes(tmp_path, suffix):
    for name in "ab":
        write_file(tmp_path / f"{name}{suffix}", ARRAYS, {"one": "text"})
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_arrays_of_jax_are_written_and_bfloat16_where_there_is_one(tmp_path):
    array = jnp.linspace(0, 1, 5, dtype=jnp.bfloat16)
    write_file(tmp_path / "a.safetensors", {"x": array})
    same(read_file(tmp_path / "a.safetensors")[0], {"x": np.asarray(array)})
    with pytest.raises(ValueError, match=r"^arrays\['x'\]: got dtype bfloat16; expected one of NumPy's own, which an"):
        write_file(tmp_path / "a.npz", {"x": array})
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_files_of_the_libraries_themselves_are_read(tmp_path):
    from safetensors.numpy import save_file

    plain = {name: np.ascontiguousarray(array) for name, array in ARRAYS.items() if array.ndim}
    save_file(plain, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", **plain)
    np.savez_compressed(tmp_path / "c.npz", **plain, zeros=np.zeros(100_000))
    same(read_file(tmp_path / "a.safetensors")[0], plain)
    same(read_file(tmp_path / "b.npz")[0], plain)
    same(read_file(tmp_path / "c.npz")[0], plain | {"zeros": np.zeros(100_000)})


def test_what_is_written_the_libraries_themselves_read(tmp_path):
    from safetensors.numpy import load_file

    for suffix in SUFFIXES:
        write_file(tmp_path / f"a{suffix}", ARRAYS)
    same(load_file(tmp_path / "a.safetensors"), ARRAYS)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        same(dict(archive), ARRAYS)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_overwritten(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b"precious")
    link = tmp_path / f"link{suffix}"
    link.symlink_to(tmp_path / "nowhere")
    for taken in (file, link):
        with pytest.raises(FileExistsError, match=r"^file: got .*, which exists already; expected a new file; choose"):
            write_file(taken, ARRAYS)
    assert file.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == [f"a{suffix}", f"link{suffix}"]


def test_one_that_comes_while_it_is_written_wins(tmp_path, monkeypatch):
    file = tmp_path / "a.npz"
    monkeypatch.setattr(os.path, "lexists", lambda path: file.write_bytes(b"first") and False)
    with pytest.raises(FileExistsError, match=r"^file: got .*a\.npz, which exists already"):
        write_file(file, ARRAYS)
    assert file.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ([1], None, "arrays: got list; expected a mapping from names; pass a dict."),
        ({1: np.ones(2)}, None, "arrays: got 1 as a name; expected text, not __metadata__; rename it."),
        ({"__metadata__": np.ones(2)}, None, "arrays: got '__metadata__' as a name; expected text, not __metadata__;"),
        ({"x": "text"}, None, "arrays['x']: got builtins.str; expected an array; pass the values themselves."),
        ({"x": np.array([None])}, None, "arrays['x']: got numpy.ndarray of objects; expected an array of numbers; "),
        ({}, {"x": 1}, "metadata['x']: got int; expected text; pass json.dumps of it."),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path, suffix, arrays, metadata, message):
    with pytest.raises(TypeError) as caught:
        write_file(tmp_path / f"a{suffix}", arrays, metadata)
    assert str(caught.value).startswith(message)
    assert os.listdir(tmp_path) == []


def test_other_suffixes_are_refused(tmp_path):
    for act in (lambda file: write_file(file, {}), read_file):
        with pytest.raises(ValueError, match=r"^file: got .*a\.pt; expected a name that ends in \.safetensors"):
            act(tmp_path / "a.pt")
    assert os.listdir(tmp_path) == []


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for act in (lambda file: write_file(file, ARRAYS), read_file):
        with pytest.raises(ModuleNotFoundError, match=r"^jbn\.convert: got no package safetensors; expected it to be"):
            act(tmp_path / "a.safetensors")
    write_file(tmp_path / "a.npz", ARRAYS)
    same(read_file(tmp_path / "a.npz")[0], ARRAYS)


# Damage and malice


def safetensors(header, data=b"\0" * 24, length=None):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


GOOD = safetensors({"x": entry()})
BAD_SAFETENSORS = {
    "nothing": (b"", "(0 bytes)"),
    "seven bytes": (b"\0" * 7, "(7 bytes)"),
    "a header longer than the file": (
        safetensors({"x": entry()}, length=10_000),
        "(a header of 10000 bytes in",
    ),
    "a header of 2^63": (
        safetensors({"x": entry()}, length=2**63),
        "(a header of 9223372036854775808 bytes in",
    ),
    "a header of 5 MB": (
        safetensors(b'{"x": [' + b"0," * 2_500_000 + b"0]}"),
        "(a header of 5000010 bytes in a file of",
    ),
    "no JSON": (safetensors(b"\x80\x04K\x01."), "(a header that is not JSON)"),
    "no UTF-8": (safetensors(b'{"\xff": 1}'), "(a header that is not JSON)"),
    "a list": (safetensors(b"[]", b""), "(a header that is no table)"),
    "depth": (safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "(a header nested too deeply)"),
    "digits": (safetensors(b'{"x": ' + b"9" * 5000 + b"}"), "(a header with too large a number)"),
    "twice": (
        safetensors(b'{"x":' + json.dumps(entry()).encode() + b',"x":' + json.dumps(entry()).encode() + b"}"),
        "('x' stands twice)",
    ),
    "nested metadata": (
        safetensors({"__metadata__": {"a": {"b": "c"}}, "x": entry()}),
        "(metadata that are not texts by name)",
    ),
    "metadata no table": (safetensors({"__metadata__": "text", "x": entry()}), "(metadata that are not texts by name)"),
    "no entry": (safetensors({"x": [1]}), "('x' has not just a dtype, a shape and offsets)"),
    "more in the entry": (safetensors({"x": entry(code="1")}), "('x' has not just a dtype, a shape and offsets)"),
    "a shape that overflows": (
        safetensors({"x": entry(shape=(2**32, 2**32), offsets=(0, 24))}),
        "('x' of shape [4294967296, 4294967296] does not fit its offsets [0, 24])",
    ),
    "a product that wraps to what is there": (
        safetensors({"x": entry(dtype="U8", shape=(2**62, 4, 2), offsets=(0, 0))}, b""),
        "('x' of shape [4611686018427387904, 4, 2] does not fit its offsets [0, 0])",
    ),
    "a negative size": (safetensors({"x": entry(shape=(-2, -3))}), "('x' has a shape or offsets that are not whole"),
    "a fraction": (safetensors({"x": entry(shape=(2.0, 3))}), "('x' has a shape or offsets that are not whole"),
    "a flag": (safetensors({"x": entry(shape=(True, 6))}), "('x' has a shape or offsets that are not whole numbers)"),
    "infinity": (safetensors(b'{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,24]}}'), "('x' has a shape or"),
    "one offset": (safetensors({"x": entry(offsets=(24,))}), "does not fit its offsets [24]"),
    "offsets beyond the end": (
        safetensors({"x": entry(shape=(2, 6), offsets=(0, 48))}),
        "(arrays of 48 bytes where",
    ),
    "what no array has": (safetensors({"x": entry()}, b"\0" * 25), "(arrays of 24 bytes where 25 follow the header)"),
    "overlap": (
        safetensors({"x": entry(), "y": entry(offsets=(0, 24))}),
        "('y' does not begin where the array before it ends)",
    ),
    "a hole": (safetensors({"x": entry(offsets=(8, 32))}, b"\0" * 32), "('x' does not begin where the array before it"),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_a_bad_safetensors_file_is_one_line(tmp_path, case):
    content, reason = BAD_SAFETENSORS[case]
    refused(tmp_path / "a.safetensors", content, reason)


def test_a_dtype_that_is_not_had_is_named(tmp_path):
    for dtype in ("F8_E4M3", "OBJECT", ["F32"]):
        (tmp_path / "a.safetensors").write_bytes(safetensors({"x": entry(dtype=dtype)}))
        with pytest.raises(ValueError, match=r"^file: got 'x' of dtype .* in .*; expected one of BOOL, U8, I8, U16,"):
            read_file(tmp_path / "a.safetensors")


def npy(array=None, header=None, data=None):
    """A member of an npz: of an array, or of what it may claim."""
    content = io.BytesIO()
    if array is not None:
        np.lib.format.write_array(content, array, allow_pickle=True)
        return content.getvalue()
    text = (header + "\n").encode("latin1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + (b"" if data is None else data)


def npz(*members, compression=zipfile.ZIP_STORED):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive, pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *arguments, **options: None)  # of names that stand twice
        for name, data in members:
            archive.writestr(name, data)
    return content.getvalue()


def claiming(size):
    """A compressed member that claims to be so many bytes long."""
    content = npz(("x.npy", npy(np.zeros(1000))), compression=zipfile.ZIP_DEFLATED)
    at = content.rindex(b"PK\x01\x02") + 24
    return content[:at] + struct.pack("<I", size) + content[at + 4 :]


ONE = npy(np.arange(6.0))
HUGE = "{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776, 1099511627776)}"
BAD_NPZ = {
    "nothing": (b"", "(File is not a zip file)"),
    "no zip": (b"PK" * 100, "(File is not a zip file)"),
    "half a zip": (npz(("x.npy", ONE))[:-30], "(File is not a zip file)"),
    "no array": (npz(("x.txt", b"text")), "('x.txt' is no array)"),
    "no header": (npz(("x.npy", b"text")), "('x': "),
    "code": (npz(("x.npy", npy(header="__import__('os').getpid()"))), "('x': "),
    "depth": (npz(("x.npy", npy(header="(" * 5000))), "('x': "),
    "a header without end": (npz(("x.npy", npy(header=" " * 60_000))), "('x': "),
    "a shape that overflows": (npz(("x.npy", npy(header=HUGE, data=b"\0" * 48))), "('x' of shape (1099511627776, "),
    "a negative size": (
        npz(("x.npy", npy(header=HUGE.replace("1099511627776, 1099511627776", "-1, -6"), data=b"\0" * 48))),
        "('x' has a shape of (-1, -6))",
    ),
    "fewer bytes": (npz(("x.npy", ONE[:-8])), "('x' of shape (6,) and dtype float64 is not "),
    "more bytes": (npz(("x.npy", ONE + b"\0")), "('x' of shape (6,) and dtype float64 is not "),
    "twice": (npz(("x.npy", ONE), ("x.npy", ONE)), "('x' stands twice)"),
    "a bomb": (claiming(2**32 - 2), "('x.npy' claims 4294967294 bytes)"),
    "a lie": (claiming(9000), "('x' of shape (1000,) and dtype float64 is not 9000 bytes long)"),
    "changed bytes": (npz(("x.npy", ONE)).replace(np.float64(5).tobytes(), np.float64(7).tobytes()), "('x': Bad CRC"),
    "metadata no JSON": (npz(("__metadata__.npy", npy(np.zeros(3, np.uint8)))), "(__metadata__ is not JSON of texts"),
    "nested metadata": (
        npz(("__metadata__.npy", npy(np.frombuffer(b'{"a": {"b": "c"}}', np.uint8)))),
        "(__metadata__ is not JSON of texts by name)",
    ),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_a_bad_npz_file_is_one_line(tmp_path, case):
    content, reason = BAD_NPZ[case]
    refused(tmp_path / "a.npz", content, reason)


def refused(file, content, reason):
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^file: ") as caught:
            read_file(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(f"file: got {file}, which is damaged or no {file.suffix} file (")
    assert reason in message
    assert message.endswith("); expected one that was written whole; write or download it again.")
    assert "\n" not in message
    assert peak < 2**23 + 10 * len(content)


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    (tmp_path / "a.npz").write_bytes(npz(("x.npy", npy(np.array([Trap()], object)))))
    with pytest.raises(ValueError, match=r"^file: got 'x' in .*a\.npz, which holds pickled objects; expected an array"):
        read_file(tmp_path / "a.npz")
    assert os.listdir(tmp_path) == ["a.npz"]


def test_dtypes_that_are_no_numbers_are_named(tmp_path):
    for array in (np.array(["text"]), np.zeros(2, "V2"), np.zeros(2, "M8[s]"), np.zeros(2, [("a", "f4")])):
        (tmp_path / "a.npz").write_bytes(npz(("x.npy", npy(array))))
        with pytest.raises(ValueError, match=r"^file: got 'x' of dtype .* in .*; expected numbers; write what NumPy"):
            read_file(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_short_anywhere_is_refused(tmp_path, suffix):
    write_file(tmp_path / f"whole{suffix}", {"x": np.arange(6.0), "y": np.ones((2, 2), np.float32)}, {"a": "b"})
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    cut = tmp_path / f"cut{suffix}"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^file: got .*, which is damaged or no"):
            read_file(cut)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_flipped_byte_is_refused_or_harmless(tmp_path, suffix):
    """It may change a value or a name, which no header tells; what is read is always arrays of numbers."""
    write_file(tmp_path / f"whole{suffix}", {"x": np.arange(6.0), "y": np.ones((2, 2), np.float32)}, {"a": "b"})
    whole = (tmp_path / f"whole{suffix}").read_bytes()
    for at in range(0, len(whole), 3):
        file = tmp_path / f"flipped{suffix}"
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        arrays, message = outcome(file)
        assert message is None or (message.startswith("file: got ") and "\n" not in message)
        assert all(array.dtype.kind in "biufc" for array in arrays.values())


def outcome(file):
    """The arrays, or why there are none."""
    try:
        return read_file(file)[0], None
    except ValueError as error:
        return {}, str(error)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_no_file_is_an_error_of_the_system(tmp_path, suffix):
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path / f"folder{suffix}")
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / f"none{suffix}")
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "none" / f"a{suffix}", ARRAYS)
