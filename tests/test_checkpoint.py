"""Trainings that are killed go on from their last checkpoint, to the same bits; this file is also the script that dies."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys_moe import checkpoint, tensorfiles
from recsys_moe.checkpoint import Checkpoints
from recsys_moe.errors import UserError
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.shards import PreparedData
from recsys_moe.trainer import TrainConfig, Trainer, fingerprint

MMOE = MMoEConfig(embedding_dim=4, num_experts=3, expert_dims=(8,), tower_dims=(4,), dropout=0.3)
# 9 steps an epoch; states after steps 5, 10, 15, … 25.
CONFIG = TrainConfig(epochs=3, batch_size=128, patience=0, checkpoint_steps=5)


def trainer(data: PreparedData, state: Path | None, tell: Any = lambda event: None) -> Trainer:
    return Trainer(data, MMOE, CONFIG, tell, Checkpoints(state) if state else None)


def finished(trainer: Trainer) -> dict[str, Tensor]:
    trainer.fit()
    return dict(trainer.model.state_dict())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing by a second thread, and waits for it where others use the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def die(data: Path, state: Path, step: int, place: str) -> None:
    """Train, and be killed at a step: right after it, or while its checkpoint is written."""
    torch.set_num_threads(1)
    mine = trainer(PreparedData(data), state)
    train_step, save = mine._train_step, checkpoint._write

    def dying_step(batch: Any) -> float:
        loss = train_step(batch)
        if place == "step" and mine.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def dying_write(path: Path, *rest: Any) -> None:
        if mine.step == step and path.suffix == ".json":
            os.kill(os.getpid(), signal.SIGKILL)
        save(path, *rest)

    mine._train_step = dying_step  # type: ignore[method-assign]
    checkpoint._write = dying_write
    mine.fit()


def test_a_killed_training_ends_with_the_bits_of_an_undisturbed_one(prepared_clicks: PreparedData, tmp_path: Path) -> None:
    state, seen = tmp_path / "state", list[dict[str, Any]]()
    # Within the second epoch; then while the checkpoint of step 15 is written: its tensors are there, its JSON is not.
    for step, place in ((12, "step"), (15, "write")):
        command = [sys.executable, __file__, str(prepared_clicks.folder), str(state), str(step), place]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in state.glob("*.json")] == ["step-0000000010.json"]
    assert list(state.glob("step-0000000015*"))
    resumed = trainer(prepared_clicks, state, seen.append)
    assert [(e["step"], e["epoch"], e["rows"]) for e in seen] == [(10, 1, 128)]
    weights = finished(resumed)
    undisturbed = finished(trainer(prepared_clicks, None))
    assert all(torch.equal(weights[name], undisturbed[name]) for name in undisturbed)
    best = Checkpoints(state).load().best_epoch  # type: ignore[union-attr]
    # One state is left, and nothing of those that were begun in vain.
    assert sorted(path.name for path in state.iterdir()) == [
        f"best-{best:05d}-0of1.safetensors",
        "step-0000000025-0of1.safetensors",
        "step-0000000025.json",
    ]


@pytest.mark.parametrize("stop", [4, 13, 18])
def test_any_step_is_a_place_to_go_on_from(stop: int, prepared_clicks: PreparedData, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    first = trainer(prepared_clicks, tmp_path / "state")
    step = first._train_step

    def stopping(batch: Any) -> float:
        loss = step(batch)
        if first.step == stop:
            raise Stop
        return loss

    first._train_step = stopping  # type: ignore[method-assign]
    with pytest.raises(Stop):
        first.fit()
    second = trainer(prepared_clicks, tmp_path / "state")
    assert second.step == (stop - 1) // 5 * 5
    result = second.fit()
    whole = trainer(prepared_clicks, None)
    expected = whole.fit()
    assert (result.best_epoch, result.best_quality, result.validation) == (
        expected.best_epoch,
        expected.best_quality,
        expected.validation,
    )
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], weight), name


def test_a_full_disk_keeps_the_checkpoint_before(
    prepared_clicks: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    state = tmp_path / "state"
    mine = trainer(prepared_clicks, state, told.append)
    fsync = os.fsync

    def full(handle: int) -> None:
        if mine.step > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    weights = finished(mine)
    assert [path.name for path in state.glob("*.json")] == ["step-0000000010.json"]
    assert len(list(state.iterdir())) == 3
    warnings = [event["message"] for event in told if event["kind"] == "warning"]
    checkpoints = [f"the checkpoint of step {step} could not be written" for step in (15, 20, 25)]
    assert [w.split(" (")[0] for w in warnings if w.startswith("the checkpoint")] == checkpoints
    assert warnings[0].endswith("([Errno 28] No space left on device); the one before is kept")
    (of_weights,) = [w for w in warnings if not w.startswith("the checkpoint")]
    assert of_weights.endswith("; they are kept in memory")
    monkeypatch.undo()
    again = finished(trainer(prepared_clicks, state))
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_best_weights_lie_on_disk_and_come_back_bit_for_bit(
    prepared_clicks: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorfiles, "CHUNK_BYTES", 64)  # several pieces a table
    mine = trainer(prepared_clicks, tmp_path / "state")
    before = {name: value.clone() for name, value in mine.model.state_dict().items()}
    mine.progress.epoch = 1
    mine.best_weights = mine._keep_best()
    assert isinstance(mine.best_weights, tensorfiles.TensorFiles)
    for value in mine.model.state_dict().values():
        value.zero_()
    mine.restore_best()
    assert all(torch.equal(value, before[name]) for name, value in mine.model.state_dict().items())
    # What no state names goes once a better epoch came.
    mine.progress.epoch = 2
    mine._keep_best()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["best-00002-0of1.safetensors"]


@pytest.mark.parametrize("place", range(1, 7))
def test_a_disk_may_fill_up_at_any_write(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two files and the JSON, each synced itself and then its folder.
    kept, synced, fsync = Checkpoints(tmp_path / "state"), 0, os.fsync
    kept.save(10, {"x": 2}, {"a": torch.arange(5.0)}, 1, {"w": torch.ones(2)})
    before = sorted(path.name for path in kept.folder.iterdir())

    def full(handle: int) -> None:
        nonlocal synced
        synced += 1
        if synced == place:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            kept.save(15, {"x": 3}, {"a": torch.zeros(5)}, 2, {"w": torch.zeros(2)})
    assert sorted(path.name for path in kept.folder.iterdir()) == before
    state = Checkpoints(kept.folder).load()
    assert state is not None
    assert (state.told, state.best_epoch) == ({"x": 2}, 1)
    assert torch.equal(state.tensors["a"], torch.arange(5.0))
    assert torch.equal(state.best["w"], torch.ones(2))
    kept.save(20, {"x": 4}, {"a": torch.zeros(5)}, 2, {"w": torch.zeros(2)})
    assert len(list(kept.folder.iterdir())) == 3


FULL = """
import sys
sys.argv = ["", {data!r}, {state!r}]
import runpy
here = runpy.run_path({file!r})
from recsys_moe.pipelines.worker import EventLog
disk = here["Path"]({state!r}).parent
log = EventLog(disk / "events.jsonl")  # on the same disk
mine = here["trainer"](here["PreparedData"](here["Path"]({data!r})), here["Path"]({state!r}), log.tell)
step = mine._train_step
def stepping(batch):
    if mine.step == 12:  # all but a few kilobytes are taken by somebody else
        import shutil, pathlib
        free = shutil.disk_usage({state!r}).free
        (disk / "other").write_bytes(bytes(max(0, free - 8192)))
        with (disk / "rest").open("wb", buffering=0) as rest:
            rest.write(bytes(2**20))  # as much as there is room for
    return step(batch)
mine._train_step = stepping
mine.fit()
(disk / "rest").unlink()
with log:
    pass
import json
told = [json.loads(line) for line in (disk / "events.jsonl").read_text().splitlines()]
print([e["message"] for e in told if e["kind"] == "warning"])
import pathlib
print(sorted(p.name for p in pathlib.Path({state!r}).iterdir()))
again = here["trainer"](here["PreparedData"](here["Path"]({data!r})), here["Path"]({state!r}))
print(again.step)
"""


def test_a_disk_that_is_really_full(prepared_clicks: PreparedData, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=400k none {disk}"
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here (unshare -rm, mount -t tmpfs)")
    program = FULL.format(data=str(prepared_clicks.folder), state=str(disk / "state"), file=__file__)
    command = [unshare, "-rm", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    warnings, left, step = done.stdout.splitlines()[-3:]
    assert "the checkpoint of step 15 could not be written" in warnings
    assert "No space left on device" in warnings
    assert "step-0000000010.json" in left
    assert ".tmp" not in left
    assert step == "10"


def test_other_data_is_refused(prepared_clicks: PreparedData, tmp_path: Path) -> None:
    finished(trainer(prepared_clicks, tmp_path / "state"))
    file = next((tmp_path / "state").glob("*.json"))
    file.write_text(file.read_text().replace("0" * 64, "1" * 64))
    with pytest.raises(UserError, match=r"was trained on other data than .*; restore the data, or train anew"):
        trainer(prepared_clicks, tmp_path / "state")


@pytest.mark.parametrize("harm", ["cut", "gone", "json"])
def test_a_damaged_state_is_told(harm: str, prepared_clicks: PreparedData, tmp_path: Path) -> None:
    finished(trainer(prepared_clicks, tmp_path / "state"))
    tensors, file = next((tmp_path / "state").glob("step-*.safetensors")), next((tmp_path / "state").glob("*.json"))
    if harm == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif harm == "gone":
        tensors.unlink()
    else:
        file.write_text("{")
    with pytest.raises(UserError, match=r"the checkpoint '.*step-0000000025.json' is damaged \(.*\); train anew"):
        trainer(prepared_clicks, tmp_path / "state")


def test_an_epoch_that_misses_a_row_or_has_one_twice_is_no_epoch(
    prepared_clicks: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = trainer(prepared_clicks, None)
    batches = list(mine.batches.epoch(0))
    batches[3] = batches[3].take(torch.tensor([0, *range(127)]))  # the last row is the first once more
    monkeypatch.setattr(mine.batches, "epoch", lambda number, skip: iter(batches))
    with pytest.raises(RuntimeError, match="epoch 1 did not train each of its 1,033 rows once"):
        mine.fit()


def test_fingerprints_tell_sets_apart() -> None:
    every = torch.arange(1000)
    whole = fingerprint(every)
    assert fingerprint(every[torch.randperm(1000)]) == whole
    assert (fingerprint(every[:400]) + fingerprint(every[400:])) % 2**63 == whole
    others = {
        fingerprint(torch.cat([every[:i], every[i + 1 :], every[j : j + 1]])) for i in range(0, 1000, 97) for j in (i + 1,)
    }
    assert whole not in others


if __name__ == "__main__" and len(sys.argv) == 5:
    die(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
