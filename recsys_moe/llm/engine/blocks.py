"""Blocks of the KV cache: who uses which, and which hold a prefix that another request may use again. No tensors here.

A block is empty, in use (by one sequence or by several that share a prefix), or idle: used by nobody, but its content is kept
until the space is needed. Idle blocks count as free; the one that has been idle longest goes first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def salted(salt: bytes) -> bytes:
    """The key that a tenant's prefixes begin with: different salts never share a block, nor learn what another has sent."""
    return hashlib.sha256(b"salt" + salt).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block: a digest of its tokens and of all that came before (`parent`: that block's key, or `salted`).

    SHA-256, so that nobody can make two prefixes that collide.

    >>> a, b = salted(b"a"), salted(b"b")
    >>> block_key(a, [1, 2]) == block_key(a, [1, 2]), block_key(a, [1, 2]) == block_key(b, [1, 2])
    (True, False)
    """
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class BlockPool:
    """`num_blocks` blocks with reference counts.

    >>> pool = BlockPool(2)
    >>> block = pool.take()
    >>> pool.publish(block, b"key")
    >>> pool.release(block)
    >>> pool.free, pool.reuse(b"key") == block, pool.free
    (2, True, 1)
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._users = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that `take` can still give."""
        return len(self._empty) + len(self._idle)

    def take(self) -> int:
        """A block for one user; what an idle one held is forgotten. There must be a free one."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._users[block] = 1
        return block

    def reuse(self, key: bytes) -> int | None:
        """The block that holds this prefix, with one user more; None if there is none."""
        block = self._block_of.get(key)
        if block is not None:
            self._users[block] += 1
            self._idle.pop(block, None)
        return block

    def publish(self, block: int, key: bytes) -> None:
        """Say what a block in use holds, once it is full and written. If another block holds the same, that one stays known."""
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def release(self, block: int) -> None:
        """One user less."""
        assert self._users[block] > 0, f"block {block} is released more often than it was taken"
        self._users[block] -= 1
        if self._users[block] == 0:
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._empty.append(block)

    def users(self, block: int) -> int:
        return self._users[block]
