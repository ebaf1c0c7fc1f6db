"""How fast rows of tokens are read in one process, as ratios within one run: `python tools/bench_data.py [--json FILE]`.

    mds_over_memmap, webdataset_over_memmap   tokens per second of TokenStream over a NumPy memmap of the same rows in the same order
    mds_over_streaming                        over mosaicml-streaming used plainly: StreamingDataset, shuffled, in a DataLoader
    webdataset_over_webdataset                over webdataset used plainly: WebDataset, decoded, through its shuffle buffer
    webdataset_over_wids                      over wids used plainly: ShardListDataset in a DataLoader with the sampler made for it
    mds_data_wait, webdataset_data_wait       share of training steps spent waiting for rows that read_ahead reads meanwhile

A batch is 32 rows of 1,024 tokens, a (32, 1024) int64 tensor. Every side is a process of its own and has read all rows once, so that files
are in memory and hashes compared. Then rounds alternate between the sides, so that whatever else the machine does falls on all; a round is
all rows beside the memmap, 32 batches beside the libraries. A ratio is the median over rounds, its spread the quartiles.

The steps of the last comparison are matrix products. On a GPU they are the 6 * 170M floating-point operations a token that training a
model of 170M parameters takes. A CPU would need minutes for them: there a step is cut off after what an H100 would need at its peak
(989 TFLOP/s), which no real step is faster than. The first batch, which waits for the hashes of its shards, is given apart.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megaflow import process

process.settle()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from megaflow.data import convert, formats, shards, tokenizer  # noqa: E402
from megaflow.data.stream import TokenStream, epoch_order, read_ahead  # noqa: E402
from megaflow.files import out_file, write_atomically  # noqa: E402
from megaflow.progress import Progress  # noqa: E402

ROWS, LENGTH, BATCH, VOCAB = 16_384, 1024, 32, 50_257
PARAMETERS, PEAK = 170e6, 989e12
STEP_FLOPS = 6 * PARAMETERS * BATCH * LENGTH
OURS, LIBRARIES = ("mds", "webdataset"), ("streaming library", "webdataset library", "wids library")


def make_data(folder: Path) -> None:
    """folder/mds and folder/webdataset, prepared folders of random tokens, and folder/tokens.bin, the training rows as int32."""
    draws, mds = np.random.default_rng(0), folder / "mds"
    mds.mkdir()
    letters = tokenizer.characters_tokenizer("abc")
    tokenizer.save_tokenizer(letters, mds)
    counts, hashes = {}, {}
    with (folder / "tokens.bin").open("wb") as flat:
        for split, rows in (("train", ROWS), ("validation", BATCH)):
            writer = shards.SplitWriter(mds, split, LENGTH, "wrap", VOCAB)
            for _ in range(rows // BATCH):
                ids = draws.integers(0, VOCAB, BATCH * LENGTH, dtype=np.int32)
                writer.add(ids, len(ids), True)
                flat.write(ids.tobytes() if split == "train" else b"")
            counts[split], hashes[split] = writer.finish(letters), writer.rows_sha256
            np.save(mds / shards.UNIGRAM_FILE, writer.unigram)
    described: dict[str, Any] = {"sources": [], "settings": {}, "tokenizer": {"hash": tokenizer.tokenizer_hash(letters)}}
    described |= {"length": LENGTH, "packing": "wrap", "splits": counts, "rows_sha256": hashes}
    shards.write_manifest(mds, described)
    convert.convert(mds, "webdataset", folder / "webdataset")


def batches(side: str, folder: Path) -> Iterator[torch.Tensor]:
    """Batches (BATCH, LENGTH) int64 without end."""
    while True:
        yield from globals()[side.replace(" ", "_")](folder)


def memmap(folder: Path) -> Iterator[torch.Tensor]:
    rows = np.memmap(folder / "tokens.bin", np.int32, "r", shape=(ROWS, LENGTH))
    order = epoch_order(np.array([count for _, count in formats.listed_shards(folder / "mds" / "train", "mds")]), seed=0, epoch=0)
    for first in range(0, ROWS, BATCH):
        yield torch.from_numpy(rows[order[first : first + BATCH]].astype(np.int64))


def mds(folder: Path) -> Iterator[torch.Tensor]:
    return of_stream(folder / "mds")


def webdataset(folder: Path) -> Iterator[torch.Tensor]:
    return of_stream(folder / "webdataset")


def of_stream(folder: Path) -> Iterator[torch.Tensor]:
    stream = TokenStream(folder, "train", seed=0)
    for step in range(10**9):
        yield stream.rows(torch.arange(step * BATCH, (step + 1) * BATCH))[0]


def streaming_library(folder: Path) -> Iterator[torch.Tensor]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    dataset = StreamingDataset(local=str(folder / "mds"), split="train", shuffle=True, batch_size=BATCH)
    while True:
        for batch in DataLoader(dataset, batch_size=BATCH):
            yield batch["tokens"].long()


def webdataset_library(folder: Path) -> Iterator[torch.Tensor]:
    from webdataset import WebDataset

    tars = sorted(str(path) for path in (folder / "webdataset" / "train").glob("*.tar"))
    for (batch,) in WebDataset(tars, shardshuffle=len(tars)).shuffle(1000).decode().to_tuple("npy").batched(BATCH):
        yield torch.from_numpy(batch).long()


def wids_library(folder: Path) -> Iterator[torch.Tensor]:
    from torch.utils.data import DataLoader
    from wids import ShardListDataset
    from wids.wids import ShardListSampler

    dataset = ShardListDataset(str(folder / "webdataset" / "train" / "index.json"), cache_dir=str(folder / "wids"))
    dataset.add_transform(lambda sample: sample[".npy"])
    for batch in DataLoader(dataset, batch_size=BATCH, sampler=ShardListSampler(dataset)):
        yield batch.long()


def alternate(sides: tuple[str, ...], folder: Path, count: int, budget: float) -> dict[str, list[float]]:
    """Tokens per second of every side in rounds of `count` batches, until the budget of seconds is spent, five rounds at least."""
    spawn, pipes, processes = multiprocessing.get_context("spawn"), {}, []
    found: dict[str, list[float]] = {side: [] for side in sides}
    for side in sides:
        pipes[side], other = spawn.Pipe()
        processes.append(spawn.Process(target=_rounds, args=(other, side, folder, count), daemon=True))
        processes[-1].start()
        other.close()
        pipes[side].recv()
    progress, began = Progress(", ".join(sides), budget, "s"), time.perf_counter()
    while time.perf_counter() - began < budget or len(found[sides[0]]) < 5:
        for side, pipe in pipes.items():
            pipe.send(True)
            found[side].append(count * BATCH * LENGTH / pipe.recv())
        progress.update(min(time.perf_counter() - began, budget))
    progress.update(budget)
    for pipe, one in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        one.join()
    return found


def _rounds(pipe: Any, side: str, folder: Path, count: int) -> None:
    """The process of a side: reads all rows once, then answers each message with the seconds of a round."""
    torch.set_num_threads(1)
    tempfile.tempdir = str(folder)  # where StreamingDataset leaves its locks
    source = batches(side, folder)
    for _ in range(ROWS // BATCH):
        next(source)
    pipe.send(True)
    while pipe.recv():
        start = time.perf_counter()
        for _ in range(count):
            next(source)
        pipe.send(time.perf_counter() - start)


def ratio(name: str, upper: list[float], lower: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(upper, lower, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        name: statistics.median(ratios),
        f"{name}_spread": [quartiles[0], quartiles[2]],
        f"{name}_rounds": len(ratios),
        f"{name}_tokens_per_second": [statistics.median(upper), statistics.median(lower)],
    }


def training_step() -> Callable[[], None]:
    """A step's work: on a GPU the operations of a model of 170M parameters, on a CPU products until the peak of an H100 is outrun."""
    if torch.cuda.is_available():
        left = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
        products = round(STEP_FLOPS / (2 * 8192**3))

        def on_gpu() -> None:
            for _ in range(products):
                torch.mm(left, left)
            torch.cuda.synchronize()

        return on_gpu
    small = torch.randn(256, 256)

    def on_cpu() -> None:
        end = time.perf_counter() + STEP_FLOPS / PEAK
        while time.perf_counter() < end:
            torch.mm(small, small)

    return on_cpu


def data_wait(format: str, folder: Path, steps: int = 200) -> dict[str, Any]:
    """The share of `steps` training steps after the first that is spent waiting for rows."""
    step, waits, seconds = training_step(), [], []
    step()
    places = (torch.arange(number * BATCH, (number + 1) * BATCH) for number in range(steps + 1))
    with contextlib.closing(read_ahead(TokenStream(folder / format, "train", seed=0), places)) as rows:
        for _ in range(steps + 1):
            start = time.perf_counter()
            next(rows)
            waits.append(time.perf_counter() - start)
            step()
            seconds.append(time.perf_counter() - start)
    return {
        f"{format}_data_wait": sum(waits[1:]) / sum(seconds[1:]),
        f"{format}_first_batch_seconds": waits[0],
        f"{format}_step_seconds": statistics.median(seconds[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=out_file, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument("--seconds", type=float, default=30.0, help="budget of the rounds (default 30)")
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores",
        "numpy": np.__version__,
    }
    folder = Path(tempfile.mkdtemp(prefix="bench_data."))
    try:
        make_data(folder)
        speed = alternate(("memmap", *OURS), folder, ROWS // BATCH, arguments.seconds / 2)
        for format in OURS:
            found |= ratio(f"{format}_over_memmap", speed[format], speed["memmap"])
        speed = alternate((*OURS, *LIBRARIES), folder, 32, arguments.seconds / 2)
        found |= ratio("mds_over_streaming", speed["mds"], speed["streaming library"])
        found |= ratio("webdataset_over_webdataset", speed["webdataset"], speed["webdataset library"])
        found |= ratio("webdataset_over_wids", speed["webdataset"], speed["wids library"])
        for format in OURS:
            found |= data_wait(format, folder)
    finally:
        shutil.rmtree(folder)
    for name, value in found.items():
        print(f"{name:<46}{value:.3g}" if isinstance(value, float) else f"{name:<46}{value}")
    if arguments.json:
        write_atomically(arguments.json, json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(main())
