"""Tokens to text as they come, and the text's end at a stop string: nothing is shown that would have to be taken back."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6
"""Tokens of the prompt's end that the first one is decoded with: by themselves, some tokens lose their leading blank."""


class Detokenizer:
    """The text of token after token. What ends within a character waits for the rest of it.

    Each token is decoded with those before it, since what a token reads as depends on them, and what is known is cut off. A
    character has at most four bytes, so at most three that are no text yet can still become one.

    >>> table = [b"a", "é".encode()[:1], "é".encode()[1:]]
    >>> text = Detokenizer(lambda ids: b"".join(table[i] for i in ids).decode(errors="replace"))
    >>> [text.add(token) for token in (0, 1, 2, 1)], text.finish()
    (['a', '', 'é', ''], '�')
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._shown = 0
        self._start(list(prompt[-_CONTEXT:]), [])

    def add(self, token: int) -> str:
        """The characters that this token completes."""
        self._tokens.append(token)
        text, whole = self._look()
        new, self._shown = text[self._shown : whole], max(self._shown, whole)
        if whole == len(text):
            segment = self._tokens[self._known :]
            # A lone blank or a special token is no context.
            self._start(segment if self._decode(segment) else self._tokens, [])
        elif len(self._tokens) - self._known > 16:  # bytes that are no text, on and on
            self._start(self._tokens[-9:-3], self._tokens[-3:])
        return new

    def finish(self) -> str:
        """What still waits, though no whole character will come of it."""
        return self._look()[0][self._shown :]

    def _start(self, context: list[int], waiting: list[int]) -> None:
        self._tokens, self._known = context + waiting, len(context)
        self._before = len(self._decode(context))
        self._shown = self._look()[1] if waiting else 0

    def _look(self) -> tuple[str, int]:
        """The text after the context, and how many of its characters are whole."""
        text = self._decode(self._tokens)[self._before :]
        return text, len(text) - min(3, len(text) - len(text.rstrip(_UNKNOWN)))


class StopStrings:
    """Text up to the first stop string, whatever pieces it comes in: what may be the beginning of one is held back.

    The stop string that ends first counts; of those that end together, the one that begins first.

    >>> stops = StopStrings(("END",))
    >>> [stops.add(piece) for piece in ("the E", "N", "d, the EN", "D!")]
    [('the ', False), ('', False), ('ENd, the ', False), ('', True)]
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held = stops, ""

    def add(self, text: str) -> tuple[str, bool]:
        """What can be shown, and whether a stop string has ended it."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        longest = max((n for stop in self._stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        shown = len(text) - longest
        self._held = text[shown:]
        return text[:shown], False

    def finish(self) -> str:
        """What is held, as no stop string came of it."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Both, one after the other: `add` a token, see what can be shown and whether a stop string has ended it."""

    def __init__(self, decode: Decode, prompt: Sequence[int], stops: tuple[str, ...]) -> None:
        self._text, self._stops = Detokenizer(decode, prompt), StopStrings(stops)

    def add(self, token: int) -> tuple[str, bool]:
        return self._stops.add(self._text.add(token))

    def finish(self) -> str:
        """The rest of the text after the last token, if no stop string has ended it."""
        text, stopped = self._stops.add(self._text.finish())
        return text if stopped else text + self._stops.finish()
