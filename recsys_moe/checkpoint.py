"""Resumable training states on disk: safetensors and JSON, whole or not at all.

    step-0000001200.json               what is not a tensor, and which files belong to the state; written last
    step-0000001200-0of1.safetensors   tensors of worker 0 of 1: weights, the optimizers' states, random numbers
    best-00003-0of1.safetensors        weights of the best epoch so far, written when it ends

A state counts once its JSON is there, and the one before it goes then. Each worker writes what it alone holds, so nothing is
gathered; a state can be read by any number of workers.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError

from recsys_moe.distributed import agreed, rank, total, world_size
from recsys_moe.errors import UserError
from recsys_moe.tensorfiles import TensorFiles, Tensors

FORMAT = 1


class Often(Protocol):
    """The part of a training's settings that says when states are written."""

    @property
    def checkpoint_steps(self) -> int: ...

    @property
    def checkpoint_seconds(self) -> float: ...


class Checkpoints:
    """The states in one folder, of which the newest is kept. All workers call the methods together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tried = time.monotonic()
        self._best_epoch: int | None = None
        self._best_files: list[str] = []
        self._named: list[str] = []  # the newest state's best files, which it can't do without

    def keep_best(self, epoch: int, tensors: Tensors) -> TensorFiles:
        """Put this worker's weights of `epoch`, the best so far, aside on disk, where the next state finds them.

        In memory they would double what large tables take.

        Raises:
            OSError: some worker could not write its part.
        """
        stem = f"best-{epoch:05d}"
        path = self.folder / f"{stem}-{rank()}of{world_size()}.safetensors"
        with _together():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, safetensors.torch.save_file, tensors)
        self._best_epoch, self._best_files = epoch, _all_files(stem)
        if rank() == 0:
            self._remove({*self._best_files, *self._named}, "best-*.safetensors*")
        return TensorFiles([path])

    def due(self, step: int, often: Often) -> bool:
        """Whether a state is to be written behind this step: every so many, and so long after the last (0: not so)."""
        steps, seconds = often.checkpoint_steps, often.checkpoint_seconds
        if steps and step % steps == 0:
            return True
        return bool(seconds) and agreed(time.monotonic() - self._tried > seconds)

    def save(self, step: int, told: dict[str, Any], tensors: Tensors, best_epoch: int | None, best: Tensors) -> None:
        """Write a state: `told` is JSON, `tensors` and `best` (the weights of `best_epoch`, if there is one) are this worker's.

        Raises:
            OSError: some worker could not write its part, on a full disk perhaps. The state before stays.
        """
        stems = [f"step-{step:010d}"] + ([f"best-{best_epoch:05d}"] if best_epoch != self._best_epoch else [])
        mine = [self.folder / f"{stem}-{rank()}of{world_size()}.safetensors" for stem in stems]
        whole = self.folder / f"{stems[0]}.json"
        try:
            with _together():
                self.folder.mkdir(parents=True, exist_ok=True)
                for path, content in zip(mine, (tensors, best), strict=False):
                    _write(path, safetensors.torch.save_file, content)
            best_files = _all_files(stems[1]) if len(stems) == 2 else self._best_files
            state = {
                "format": FORMAT,
                "told": told,
                "files": _all_files(stems[0]),
                "best_epoch": best_epoch,
                "best_files": best_files,
            }
            with _together():
                if rank() == 0:
                    _write(whole, lambda text, path: path.write_text(text), json.dumps(state))
        except OSError:
            # All workers are here. After any other error, a lost worker's perhaps, the state may be whole already.
            for path in [whole, *mine]:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            raise
        finally:
            self._tried = time.monotonic()
        self._best_epoch, self._best_files, self._named = best_epoch, best_files, best_files
        if rank() == 0:
            # JSON first: what is half removed must not look like a state.
            kept = {whole.name, *_all_files(stems[0]), *best_files}
            self._remove(kept, "step-*.json", "step-*.safetensors*", "best-*.safetensors*")

    def _remove(self, kept: set[str], *patterns: str) -> None:
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                if path.name not in kept:
                    with suppress(OSError):
                        path.unlink()

    def load(self) -> "State | None":
        """The newest state; None if there is none.

        Raises:
            UserError: its files are not what was written.
        """
        found = sorted(self.folder.glob("step-*.json"))
        if not found:
            return None
        state = State(found[-1])
        self._best_epoch, self._best_files, self._named = state.best_epoch, state.best_files, state.best_files
        return state


class State:
    """A state that is being read: `told`, and tensors by name, from whichever file has them."""

    def __init__(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise UserError(f"{str(path)!r} has checkpoint format {content['format']}, not {FORMAT}; train anew")
            self.told: dict[str, Any] = content["told"]
            self.best_epoch: int | None = content["best_epoch"]
            self.best_files: list[str] = content["best_files"]
            self.tensors = TensorFiles([path.parent / name for name in content["files"]])
            self.best = TensorFiles([path.parent / name for name in self.best_files])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())
            raise UserError(f"the checkpoint {str(path)!r} is damaged ({reason}); train anew") from None


def _all_files(stem: str) -> list[str]:
    return [f"{stem}-{worker}of{world_size()}.safetensors" for worker in range(world_size())]


def _write(path: Path, save: Any, content: Any) -> None:
    """Write under a temporary name and rename once it is on the disk, so that a power cut leaves no half of it either."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save(content, temporary)
        for place in (temporary, path.parent):
            handle = os.open(place, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            if place is temporary:
                temporary.replace(path)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _together() -> Iterator[None]:
    """What fails for one worker within the block, by an OSError, fails for all of them."""
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    failures = total(torch.tensor([failure is not None], dtype=torch.int32))
    if failure is not None:
        raise failure
    if failures:
        raise OSError("another worker could not write its part")
