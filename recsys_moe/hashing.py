"""A hash of categories that is the same on every machine, in every version, in training and in serving.

A text's hash is what `pandas.util.hash_array` makes of it: mix(SipHash-2-4 of its UTF-8 bytes under a fixed key) (Aumasson &
Bernstein 2012), mix being SplitMix64's finaliser (Steele et al. 2014). Several hashes become one, in order, by

    h ← mix(h + 0x9E3779B97F4A7C15 + h_i),  h = 0 at first,

all modulo 2^64. Bundles depend on it: change nothing here.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

KEY = "0123456789123456"

Hashes = npt.NDArray[np.uint64]


def hash_texts(texts: pa.Array) -> Hashes:
    """The hash of each text `[N]`; of a null, 0.

    >>> hash_texts(pa.array(["user 7", None])).tolist()
    [3207753847639122703, 0]
    """
    from pandas.util import hash_array

    distinct = texts.dictionary_encode()
    values = np.asarray(distinct.dictionary.to_pylist(), dtype=object)
    hashes = hash_array(values, hash_key=KEY, categorize=False) if len(values) else np.zeros(1, np.uint64)
    missing = pc.is_null(distinct.indices).to_numpy(zero_copy_only=False)
    out: Hashes = np.where(missing, np.uint64(0), hashes[pc.fill_null(distinct.indices, 0).to_numpy()])
    return out


def combine(hashes: Sequence[Hashes]) -> Hashes:
    """One hash of several, each `[N]` or `[1]`, which stands for all: that of a pair is not that of its halves swapped.

    >>> combine([np.array([1], np.uint64), np.array([2], np.uint64)]).tolist()
    [13608149317741381227]
    """
    whole = np.zeros(1, np.uint64)
    for part in hashes:
        x = whole + np.uint64(0x9E3779B97F4A7C15) + part
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        whole = x ^ (x >> np.uint64(31))
    return whole
