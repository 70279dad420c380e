"""Files that change while the service runs: read again when they do, kept as they were when they can't be used."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from recsys_moe.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Watched(Generic[T]):
    """What `read` makes of a file. `value` changes in one assignment; `refused` says why the file's newest state was not taken.

    A file must be replaced (written beside and renamed), never written over: readers may have it mapped.

    Raises:
        UserError: at first, the file can't be used.
    """

    def __init__(self, path: Path, read: Callable[[Path], T]) -> None:
        self._path, self._read = path, read
        self._seen = self._state()
        self.value = read(path)
        self.refused: str | None = None

    def refresh(self) -> None:
        """Read the file if it is another one now."""
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            self.value = self._read(self._path)
            self.refused = None
            log.info("%s has changed and is used from now on", self._path)
        except Exception as error:  # of a library's own as well: status and metrics must tell of it
            self.refused = str(error)
            log.error("%s has changed, but can't be used: %s", self._path, error, exc_info=not isinstance(error, UserError))

    def _state(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def refreshing(refresh: Sequence[Callable[[], None]], seconds: float) -> Iterator[None]:
    """Call each of `refresh` every so many seconds, in the background."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            for each in refresh:
                try:
                    each()
                except Exception:  # a watcher that dies would freeze what is served without a word
                    log.exception("a change could not be looked at")

    thread = threading.Thread(target=watch, name="refresh", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
