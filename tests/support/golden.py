"""Arrays by name in one small file: those of a dtype end to end, since an archive spends some 200 bytes on each."""

import json

import numpy as np


def save(path, arrays):
    """Writes them, those that float32 holds exactly in float32."""
    rows, values = [], {}
    for name, array in arrays.items():
        exact = array.dtype == np.float64 and np.array_equal(array.astype(np.float32), array)
        stored = np.float32 if exact else array.dtype
        rows.append((name, list(array.shape), str(array.dtype), np.dtype(stored).name))
        values.setdefault(np.dtype(stored).name, []).append(array.astype(stored).ravel())
    flat = {dtype: np.concatenate(parts) for dtype, parts in values.items()}
    np.savez_compressed(path, rows=np.array(json.dumps(rows)), **flat)


def load(path):
    """What was saved, in the dtypes that it had."""
    with np.load(path, allow_pickle=False) as file:
        flat, places, arrays = {k: file[k] for k in file.files}, {}, {}
    for name, shape, dtype, stored in json.loads(str(flat["rows"])):
        start = places.get(stored, 0)
        places[stored] = end = start + int(np.prod(shape))
        arrays[name] = flat[stored][start:end].reshape(shape).astype(dtype)
    return arrays


def nested(arrays, separator):
    """Nested dicts, from arrays by names in which a separator stands between those of modules."""
    tree = {}
    for name, array in arrays.items():
        *modules, leaf = name.split(separator)
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = array
    return tree
