"""Writing a checkpoint by many processes, beside training: each writes its own boxes of the logical tensors, none waits for a disk.

A save copies what a process holds to the CPU's memory, and training goes on; a thread writes it. No collective is called from the thread:
the processes meet in the folder of the checkpoint, step-00001200.JOB.partial.

    every process    writes its files, then part-00003.json: what it has written; or part-00003.failed: why it could not
    the first one    waits for all parts, holds them against each other, writes the manifest, renames the folder to step-00001200 and
                     removes what is older than the last few; or removes the folder
    the others       wait until the folder has another name, or none

So all agree on whether the checkpoint exists. JOB is a word of the job's own: what a process of an earlier one, which hangs somewhere and
comes back, may still write lands in no checkpoint of another.
"""

import contextlib
import json
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial as partial_of
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaflow.errors import UserError
from megaflow.files import hashed
from megaflow.parallel import boxes
from megaflow.parallel.boxes import Box
from megaflow.train import checkpoint as checkpoints
from megaflow.train import tensor_file

PARTIAL = ".partial"
LIMIT = 600.0
"""Seconds that the first process waits for the others' parts once it has written its own. The others wait twice as long for it."""
LEAVING = 20.0
"""Seconds that a process still waits for others when it is on its way out, because of an error elsewhere."""

SETTLING = 1.0
"""Seconds for which a folder may have neither name: a listing that meets a rename shows none, and a file server is late."""


@dataclass(frozen=True)
class Piece:
    """Box `at` of the logical tensor GROUP/NAME whose full shape is `shape`; the tensor has the box's shape.

    Of all processes together the pieces hold each element once: what several processes have, one of them gives.
    """

    name: str
    shape: tuple[int, ...]
    at: Box
    tensor: Tensor


def whole(group: str, tensors: dict[str, Tensor]) -> list[Piece]:
    """Pieces of tensors that this process holds whole, and gives alone."""
    return [Piece(f"{group}/{name}", tuple(tensor.shape), boxes.full(tensor.shape), tensor) for name, tensor in tensors.items()]


def save(run: Path, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint of whole tensors, GROUP/NAME to value, from this process alone, and wait for it. Returns its folder.

    Raises UserError where the disk refuses; earlier checkpoints stay intact.
    """
    writer = Writer(run, keep)
    writer.save([Piece(name, tuple(tensor.shape), boxes.full(tensor.shape), tensor) for name, tensor in tensors.items()], state)
    writer.finish()
    return checkpoints.folder(run, state["step"])


class Writer:
    """Saves a process's pieces in the background.

    failure: what the thread has met, for processes that agree on stopping; `check` raises it.
    """

    def __init__(self, run: Path, keep: int, rank: int = 0, size: int = 1, job: str | None = None, limit: float = LIMIT) -> None:
        """For process `rank` of `size`, all of which save the same steps in the same order; the last `keep` checkpoints are kept.

        job: a word that all processes of the job have and no other job; a new one if None, for one process. The first process, which
        holds the run's lock, removes what an earlier job has left half written: before another saves. limit: seconds, see LIMIT.
        """
        if size > 1 and job is None:
            raise ValueError("processes that write together need a common word for their job")
        self.run, self.keep, self.rank, self.size, self.limit = run, keep, rank, size, limit
        self.job = job if job is not None else secrets.token_hex(4)
        self.failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._buffers: dict[str, Tensor] = {}
        self._leaving = False
        if rank == 0:
            for stale in (run / "checkpoints").glob("*" + PARTIAL):
                shutil.rmtree(stale, ignore_errors=True)

    def save(self, pieces: Iterable[Piece], state: dict[str, Any]) -> None:
        """Begin to write a checkpoint of state["step"] steps; returns when the pieces are copied, and they may change then.

        Waits for the save before it. Raises UserError where that has failed.
        """
        self.finish()
        held = copied(pieces, self._buffers)
        self._thread = threading.Thread(target=self._work, args=(held, json.loads(json.dumps(state))), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what writing has met since it was last asked; nothing where it goes on, or went, well. Raises UserError."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def finish(self) -> None:
        """Wait until the last save is on disk, of all processes. Raises UserError where it has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Leave, whatever has happened: wait for what is being written, but not long for other processes, and raise nothing."""
        self._leaving = True
        try:
            self.finish()
        except Exception as error:
            print(f"warning: {error}", file=sys.stderr)

    def settle(self, limit: float) -> None:
        """Before the process is ended from another thread: have what is being written finished, if that takes at most `limit` seconds."""
        self._leaving = True
        if (thread := self._thread) is not None:
            thread.join(limit)

    def _work(self, held: list[Piece], state: dict[str, Any]) -> None:
        failure: BaseException
        target = checkpoints.folder(self.run, state["step"])
        partial = target.with_name(f"{target.name}.{self.job}{PARTIAL}")
        try:
            try:
                partial.mkdir(parents=True, exist_ok=True)
                write_part(partial, held, self.rank, self.size)
            except BaseException as error:
                withdraw(partial, self.rank, self.size, getattr(error, "strerror", None) or str(error))
                raise
            if self.rank == 0:
                complete(partial, target, self._parts(partial, target), state, self.job)
                prune(self.run, state["step"], self.keep)
            else:
                self._follow(partial, target)
        except OSError as error:
            failure = UserError(failed(target, error.strerror or str(error)))
        except BaseException as error:
            failure = error
        else:
            return
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        self.failure = failure

    def _parts(self, partial: Path, target: Path) -> list[dict[str, Any]]:
        """What each process has written, by rank, as soon as all have. Raises UserError where one could not, or does not in time."""
        missing = set(range(self.size))
        for _ in self._looks(self.limit):
            names = set(os.listdir(partial))  # a listing is fresh where files of other hosts are still cached as absent
            for rank in sorted(missing):
                if _note(rank, "failed") in names:
                    reason = (partial / _note(rank, "failed")).read_text("utf-8") or "the disk refuses"
                    raise UserError(failed(target, f"process {rank} of {self.size}: {reason}"))
            missing -= {rank for rank in missing if _note(rank, "json") in names}
            if not missing:
                return written_parts(partial, self.size)
        listed = ", ".join(map(str, sorted(missing)))
        which = f"process {listed}" if len(missing) == 1 else f"processes {listed}"
        raise UserError(failed(target, f"{which} of {self.size} wrote no part {self._in_time(self.limit)}"))

    def _follow(self, partial: Path, target: Path) -> None:
        """Wait until the first process has made a checkpoint of the folder. Raises UserError where it has given up, or does not in time."""
        gone, patience = None, 2 * self.limit  # the verdict on whom it waits for is the first one's
        for _ in self._looks(patience):
            if partial.name in os.listdir(target.parent):
                continue
            if written_by(target) == self.job:
                return
            gone = time.monotonic() if gone is None else gone
            if time.monotonic() - gone > SETTLING:
                break
        reason = f"the first process did not complete it {self._in_time(patience)}"
        raise UserError(failed(target, reason if gone is None else "the first process has given it up and says why"))

    def _looks(self, limit: float) -> Iterator[None]:
        """One turn each time that it is worth looking into the folder again, until the limit; sooner where the process is leaving.

        The interpreter waits for this thread when its main thread has ended, by an error that nobody caught: that is leaving too.
        """
        end, pause, leaving = time.monotonic() + limit, 0.01, False
        while time.monotonic() < end:
            yield
            if not leaving and self._leaves():
                leaving, end = True, min(end, time.monotonic() + LEAVING)
            time.sleep(pause)
            pause = min(1.3 * pause, 0.5)
        yield

    def _leaves(self) -> bool:
        return self._leaving or not threading.main_thread().is_alive()

    def _in_time(self, limit: float) -> str:
        return f"within {LEAVING:g} s of this one's leaving" if self._leaves() else f"within {limit:g} s"


def copied(pieces: Iterable[Piece], buffers: dict[str, Tensor]) -> list[Piece]:
    """The pieces with copies in the CPU's memory, in buffers that are kept from save to save: pinned for those of a GPU.

    They are taken one after the other: an iterator that gathers each need not hold all. Of empty boxes only one is
    kept, of a tensor that is empty itself.
    """
    held, cuda, seen = [], False, set()
    for piece in pieces:
        if "/" not in piece.name or boxes.shape_of(piece.at) != tuple(piece.tensor.shape) or not boxes.lies_in(piece.at, piece.shape):
            raise ValueError(f"{piece.name} {piece.shape}: box {piece.at} of a tensor {tuple(piece.tensor.shape)}")
        key, empty = f"{piece.name} {piece.at}", not piece.tensor.numel()
        if empty and (key in seen or 0 not in piece.shape):
            continue
        if key in seen:
            raise ValueError(f"{piece.name}: box {piece.at} is given twice")
        seen.add(key)
        buffer = buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (piece.tensor.shape, piece.tensor.dtype):
            buffer = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype, pin_memory=piece.tensor.is_cuda)
            buffers[key] = buffer
        buffer.copy_(piece.tensor.detach(), non_blocking=piece.tensor.is_cuda)
        cuda |= piece.tensor.is_cuda
        held.append(Piece(piece.name, tuple(piece.shape), piece.at, buffer))
    if cuda:
        torch.cuda.current_stream().synchronize()
    return held


def at_hand(piece: Piece) -> Iterator[tuple[Box, Tensor]]:
    """The one block that a piece in memory is."""
    yield piece.at, piece.tensor


def write_part(
    partial: Path, held: list[Piece], rank: int, size: int, blocks_of: Callable[[Piece], Iterable[tuple[Box, Tensor]]] = at_hand
) -> None:
    """One process's files, a group each, and, when they are on disk, the note that says so. Raises OSError.

    blocks_of(piece): what it holds, as boxes of the logical tensor in row-major order of its own; of a piece that is not in memory, whose
    tensor is one of torch's without values (device "meta"), they are read when its turn comes.
    """
    groups: dict[str, dict[str, Piece]] = {}
    for piece in held:
        groups.setdefault(piece.name.partition("/")[0], {})[checkpoints.key(piece.name, piece.shape, piece.at)] = piece
    files, described = {}, []
    for group, named in groups.items():
        file = checkpoints.file_of(group, rank, size)
        places = json.dumps({key: {"shape": piece.shape, "at": piece.at} for key, piece in named.items()})
        kinds = tensor_file.kinds_of({key: piece.tensor for key, piece in named.items()})
        sums = dict.fromkeys(named, 0)
        counted = partial_of(_blocks, named, blocks_of, sums if group in checkpoints.SEEN else None)
        sha256, count = tensor_file.write(partial / file, kinds, counted, {"format": "pt", "boxes": places})
        files[file] = {"sha256": sha256, "bytes": count}
        for key, piece in named.items():
            described.append(
                {
                    "name": piece.name,
                    "dtype": tensor_file.NAMES[piece.tensor.dtype],
                    "shape": piece.shape,
                    "at": piece.at,
                    "file": file,
                    "content": sums[key],
                }
            )
    note = partial / _note(rank, "json")
    with note.with_suffix(".writing").open("w", encoding="utf-8") as text:
        json.dump({"files": files, "tensors": described}, text)
        text.flush()
        os.fsync(text.fileno())
    note.with_suffix(".writing").rename(note)
    flush(partial)


def written_parts(partial: Path, size: int) -> list[dict[str, Any]]:
    """What the notes of all `size` processes say, by rank. Raises OSError, ValueError."""
    return [json.loads((partial / _note(rank, "json")).read_text("utf-8")) for rank in range(size)]


def _blocks(
    named: dict[str, Piece], blocks_of: Callable[[Piece], Iterable[tuple[Box, Tensor]]], sums: dict[str, int] | None, key: str
) -> Iterator[Tensor]:
    """The blocks of the piece of this key; their contents are added to `sums` on the way."""
    for box, block in blocks_of(piece := named[key]):
        if sums is not None:
            sums[key] += tensor_file.content(block, piece.shape, box)
        yield block


def complete(partial: Path, target: Path, parts: list[dict[str, Any]], state: dict[str, Any], job: str) -> None:
    """Make a checkpoint of a folder in which every process has written its part. Raises OSError, ValueError."""
    content = manifest(parts, state, job)
    for name, written in content["files"].items():
        if (size := (partial / name).stat().st_size) != written["bytes"]:
            raise OSError(f"{name} has {size} bytes and not the {written['bytes']} that were written")
    with (partial / checkpoints.MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"sha256": hashed(content), "checkpoint": content}, file)
        file.flush()
        os.fsync(file.fileno())
    for rank in range(len(parts)):
        (partial / _note(rank, "json")).unlink()
    flush(partial)
    if target.exists():
        remove(target)
    try:
        partial.rename(target)
    except OSError:  # of a file server whose first answer was lost, and which finds it done when it is asked again
        if written_by(target) != job:
            raise
    flush(target.parent)


def manifest(parts: list[dict[str, Any]], state: dict[str, Any], job: str) -> dict[str, Any]:
    """What a manifest says of the processes' parts. Raises ValueError where they do not make up the tensors, each element once."""
    files: dict[str, Any] = {}
    tensors: dict[str, dict[str, Any]] = {}
    sums: dict[str, int] = {}
    for part in parts:
        files |= part["files"]
        for piece in part["tensors"]:
            name, described = piece["name"], {"dtype": piece["dtype"], "shape": piece["shape"]}
            known = tensors.setdefault(name, described | {"boxes": []})
            if described != {"dtype": known["dtype"], "shape": known["shape"]}:
                raise ValueError(f"{name}: one process says {described}, another {known['dtype']} {known['shape']}")
            known["boxes"].append([piece["file"], piece["at"]])
            sums[name] = (sums.get(name, 0) + piece["content"]) % 2**64
    for name, known in tensors.items():
        held = [tuple((start, stop) for start, stop in at) for _, at in known["boxes"]]
        if problem := boxes.fault(known["shape"], held):
            raise ValueError(f"{name} {known['shape']}: {problem}")
    seen = [
        [name, known["dtype"], known["shape"], sums[name]]
        for name, known in sorted(tensors.items())
        if name.partition("/")[0] in checkpoints.SEEN
    ]
    identity = hashed(seen)
    return {"version": checkpoints.VERSION, "job": job, "state": state, "content": identity, "files": files, "tensors": tensors}


def prune(run: Path, step: int, keep: int) -> None:
    """Remove all checkpoints but that of `step` and the `keep` - 1 before it. Raises UserError where the disk refuses."""
    reached = [each for each in checkpoints.steps(run) if each <= step]  # beyond it are damaged ones that were passed over
    for each in set(checkpoints.steps(run)) - set(reached[-keep:]):
        try:
            remove(path := checkpoints.folder(run, each))
        except OSError as error:
            raise UserError(f"{path}: it is older than the last {keep} and cannot be removed ({error.strerror}); see to the disk") from None


def remove(path: Path) -> None:
    """Remove a checkpoint; no moment at which it is called step-… and half of it is there. Raises OSError."""
    away = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    path.rename(away)
    shutil.rmtree(away, ignore_errors=True)  # what somebody still reads on a file server goes at the next start


def withdraw(partial: Path, rank: int, size: int, reason: str) -> None:
    """Remove what this process could not write to its end, and leave the reason to the first one."""
    with contextlib.suppress(OSError):
        for file in partial.glob(f"*-{rank:05d}-of-{size:05d}.safetensors"):  # before the note, since the disk may be full
            file.unlink()
    note = partial / _note(rank, "failed")
    with contextlib.suppress(OSError):
        note.with_suffix(".writing").touch()
        with contextlib.suppress(OSError):
            note.with_suffix(".writing").write_text(reason, "utf-8")
        note.with_suffix(".writing").rename(note)


def written_by(path: Path) -> str | None:
    """The job that wrote a checkpoint, None where it cannot be told."""
    try:
        return json.loads((path / checkpoints.MANIFEST).read_text("utf-8"))["checkpoint"]["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def failed(target: Path, reason: str) -> str:
    return f"{target}: the checkpoint could not be written ({reason}); earlier checkpoints are intact"


def flush(path: Path) -> None:
    """Have a folder's entries on disk before going on. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _note(rank: int, kind: str) -> str:
    return f"part-{rank:05d}.{kind}"
