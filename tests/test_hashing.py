"""The hash of categories: published SipHash, frozen values, one result whatever the column's form."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_moe.hashing import KEY, combine, hash_texts

MASK = 2**64 - 1


def rotate(x: int, bits: int) -> int:
    return (x << bits | x >> (64 - bits)) & MASK


def mix(x: int) -> int:
    """SplitMix64's finaliser."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def siphash_2_4(data: bytes, key: bytes) -> int:
    """As the paper has it, a word at a time."""
    k0, k1 = (int.from_bytes(key[i : i + 8], "little") for i in (0, 8))
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rounds(number: int) -> None:
        for _ in range(number):
            v[0] = (v[0] + v[1]) & MASK
            v[2] = (v[2] + v[3]) & MASK
            v[1], v[3] = rotate(v[1], 13) ^ v[0], rotate(v[3], 16) ^ v[2]
            v[0] = rotate(v[0], 32)
            v[2] = (v[2] + v[1]) & MASK
            v[0] = (v[0] + v[3]) & MASK
            v[1], v[3] = rotate(v[1], 17) ^ v[2], rotate(v[3], 21) ^ v[0]
            v[2] = rotate(v[2], 32)

    padded = data + bytes(7 - len(data) % 8) + bytes([len(data) & 255])
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    v[2] ^= 255
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def test_the_naive_siphash_is_the_papers() -> None:
    # The test vector of the paper's appendix A.
    assert siphash_2_4(bytes(range(15)), bytes(range(16))) == 0xA129CA6149BE45E5


@given(st.lists(st.none() | st.text(max_size=30), min_size=1, max_size=20))
def test_a_text_has_its_mixed_siphash(texts: list[str | None]) -> None:
    expected = [0 if text is None else mix(siphash_2_4(text.encode(), KEY.encode())) for text in texts]
    assert hash_texts(pa.array(texts, pa.string())).tolist() == expected
    assert hash_texts(pa.array(["-", *texts], pa.string()).slice(1)).tolist() == expected


def test_the_values_are_frozen() -> None:
    # Every bundle with a hashed feature depends on them.
    known = {"": 1760245841805064774, "a": 13950350942979735504, "272": 12437704295416782798, "Ärger": 10520055703845072179}
    assert hash_texts(pa.array(list(known))).tolist() == list(known.values())
    pair = [hash_texts(pa.array(["a"])), hash_texts(pa.array(["272"]))]
    assert combine(pair).tolist() == [16097657013363506559]


@given(st.lists(st.integers(0, MASK), min_size=1, max_size=5))
def test_hashes_are_combined_one_after_the_other(hashes: list[int]) -> None:
    expected = 0
    for h in hashes:
        expected = mix((expected + 0x9E3779B97F4A7C15 + h) & MASK)
    assert combine([np.array([h], np.uint64) for h in hashes]).tolist() == [expected]


def test_order_counts_and_so_does_each_part() -> None:
    a, b, c = (np.array([n], np.uint64) for n in (1, 2, 3))
    found = {int(combine(parts)[0]) for parts in ([a, b], [b, a], [a, c], [a, b, c], [a], [a, a], [b, b])}
    assert len(found) == 7


@pytest.mark.parametrize("buckets", [7, 64, 1000])
def test_buckets_fill_evenly(buckets: int) -> None:
    # χ² of 200 values a bucket: its mean is buckets − 1, its deviation √(2(buckets − 1)).
    ids = pa.array([str(n) for n in range(200 * buckets)])
    crossed = combine([hash_texts(ids), hash_texts(pa.array(["x"] * len(ids)))])
    for hashes in (hash_texts(ids), crossed):
        counts = np.bincount((hashes % np.uint64(buckets)).astype(int), minlength=buckets)
        chi2 = ((counts - 200) ** 2 / 200).sum()
        assert abs(chi2 - (buckets - 1)) < 5 * np.sqrt(2 * (buckets - 1))
