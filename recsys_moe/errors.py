"""Mistakes in what was given to us, told in one sentence."""

import difflib
from collections.abc import Iterable
from itertools import islice


class UserError(ValueError):
    """Bad input. The message is one sentence: the field, its value, the limit and the remedy.

    The command line prints it without a traceback and exits with 2; the services answer 4xx with it.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """A phrase that names the closest valid name, or the valid names where nothing is close.

    >>> nearest("mmeo", ["mmoe", "shared_bottom"])
    "did you mean 'mmoe'?"
    >>> nearest("xyz", ["mmoe", "shared_bottom"])
    'valid: mmoe, shared_bottom'
    """
    # Both may be a stranger's: neither many names nor long ones may take seconds.
    valid = [each[:100] for each in islice(valid, 1000)]
    close = difflib.get_close_matches(name[:100], valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(valid) > 12:
        return "valid: " + ", ".join(valid[:12]) + ", …"
    return "valid: " + (", ".join(valid) or "none")
