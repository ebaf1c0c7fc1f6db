"""The order of a run: every row once an epoch, a pure function of (seed, epoch), resumed by one number."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import LocalDataset

from megaflow.config.schema import DataConfig
from megaflow.data import shards
from megaflow.data.prepare import prepare
from megaflow.data.stream import TokenStream
from megaflow.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Some hundred rows of four different bytes each, in several shards."""
    base = tmp_path_factory.mktemp("stream")
    (base / "source.txt").write_text("\n".join(f"{place:03d}" for place in range(400)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 2000)
        prepare(
            DataConfig(
                path=str(base / "data"),
                source=[str(base / "source.txt")],
                document_separator="\n",
                tokenizer="bytes",
                length=4,
                validation_fraction=0.1,
                workers=1,
            )
        )
    return base / "data"


def identities(stream: TokenStream, places) -> list[bytes]:
    ids, _ = stream.rows(places)
    return [row.numpy().tobytes() for row in ids]


def test_rows_have_shape_and_type(folder):
    ids, lengths = TokenStream(folder, "train", seed=0).rows(torch.tensor([5, 0, 7]))
    assert ids.shape == (3, 4) and ids.dtype == torch.int64
    assert lengths.tolist() == [4, 4, 4] and lengths.dtype == torch.int64
    ids += 1  # writable


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own(folder):
    stream = TokenStream(folder, "train", seed=3)
    epochs = [identities(stream, range(epoch * len(stream), (epoch + 1) * len(stream))) for epoch in range(3)]
    assert len(set(epochs[0])) == len(stream)
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_rows_of_all_shards_are_mixed(folder):
    stream = TokenStream(folder, "train", seed=0)
    sizes = stream.sizes
    assert len(sizes) > 3
    shard = np.repeat(np.arange(len(sizes)), sizes)[stream.order(0)]
    assert len(set(shard[: len(stream) // 4])) > len(sizes) // 2
    assert np.abs(np.diff(stream.order(0))).mean() > len(stream) / 10


def test_the_order_is_a_function_of_seed_and_epoch(folder):
    one, same = TokenStream(folder, "train", seed=1), TokenStream(folder, "train", seed=1)
    last = same.order(4)  # asked for in another sequence
    assert all((one.order(epoch) == same.order(epoch)).all() for epoch in range(4)) and (one.order(4) == last).all()
    orders = {TokenStream(folder, "train", seed=seed).order(epoch).tobytes() for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_resuming_at_a_place_is_exact(folder):
    whole = identities(TokenStream(folder, "train", seed=0), range(900))
    for place in (1, 137, 399, 500, 899):
        assert identities(TokenStream(folder, "train", seed=0), range(place, 900)) == whole[place:]


def test_any_number_of_processes_reads_the_same_global_batches(folder):
    batch, steps = 12, 60
    whole = identities(TokenStream(folder, "train", seed=0), range(batch * steps))
    for processes in (1, 2, 3, 4):
        streams = [TokenStream(folder, "train", seed=0) for _ in range(processes)]
        share = batch // processes
        read = []
        for step in range(steps):
            for rank, stream in enumerate(streams):
                begin = step * batch + rank * share
                read += identities(stream, range(begin, begin + share))
        assert read == whole


def test_a_batch_may_straddle_epochs_in_any_sequence(folder):
    stream = TokenStream(folder, "train", seed=0)
    rows = len(stream)
    places = [rows - 1, rows, 2 * rows, 3 * rows - 1, 0, 5 * rows]
    assert identities(stream, places) == [identities(TokenStream(folder, "train", seed=0), [place])[0] for place in places]


def test_without_shuffle_the_order_is_the_written_one(folder):
    stream = TokenStream(folder, "validation", seed=0, shuffle=False)
    written = [sample["tokens"].astype(np.int64).tobytes() for sample in LocalDataset(str(folder), "validation")]
    assert identities(stream, range(2 * len(stream))) == written * 2


def test_padding_is_zero_and_not_counted(tmp_path):
    (tmp_path / "source.txt").write_text("a|bb|ccc|dddd|eeeee|ffffff")
    config = DataConfig(
        path=str(tmp_path / "data"),
        source=[str(tmp_path / "source.txt")],
        document_separator="|",
        tokenizer="bytes",
        packing="document",
        length=4,
        workers=1,
    )
    rows = prepare(config)["splits"]["train"]["rows"]
    ids, lengths = TokenStream(config.path, "train", seed=0).rows(range(rows))
    assert len(set(lengths.tolist())) > 1
    for row, length in zip(ids, lengths, strict=True):
        assert (row[:length] > 0).all() and (row[length:] == 0).all()


def test_a_damaged_shard_is_found_when_its_first_row_is_read(folder, tmp_path):
    """Not before: a run does not read all shards at its start."""
    copy = Path(shutil.copytree(folder, tmp_path / "data"))
    damaged = copy / "train" / "shard.00002.mds"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    stream = TokenStream(copy, "train", seed=0, shuffle=False)
    first = int(stream.sizes[:2].sum())
    stream.rows(range(first))
    with pytest.raises(UserError, match=r"train/shard.00002.mds is not what prepare wrote \(sha256 differs\)"):
        stream.rows([first])


def test_errors(folder, tmp_path):
    with pytest.raises(UserError, match="no split 'test'"):
        TokenStream(folder, "test", seed=0)
    with pytest.raises(UserError, match="run megaflow prepare"):
        TokenStream(tmp_path / "nowhere", "train", seed=0)
    with pytest.raises(ValueError, match="not negative"):
        TokenStream(folder, "train", seed=0).rows([-1])
