"""What a prepared folder holds: what `megaflow inspect` shows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megaflow.data import shards
from megaflow.data.stream import TokenStream
from megaflow.data.tokenizer import decode, load_tokenizer

UNNAMED = 3
"""Files beside those of the manifest that a person is told of; JSON has all."""


def inspect(folder: str | Path, rows: int) -> dict[str, Any]:
    """Everything the manifest says, and of each split its shards, the lengths of its rows and the first `rows` rows decoded.

    Every file is compared with its sha256 before. Raises UserError that names what is missing, cut short or another.
    """
    manifest = shards.verify(folder)
    tokenizer = load_tokenizer(folder)
    found = {name: value for name, value in manifest.items() if name not in ("files", "splits")}
    found |= {"path": str(folder), "format": shards.format_of(manifest), "identity": shards.identity(manifest)}
    found |= {"verified_files": len(manifest["files"]), "bytes": sum(file["bytes"] for file in manifest["files"].values())}
    here = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
    found["unnamed_files"] = sorted(here - manifest["files"].keys() - {shards.MANIFEST_FILE, shards.SECONDS_FILE})
    found["splits"] = {}
    for split, counts in manifest["splits"].items():
        stream = TokenStream(folder, split, seed=0, shuffle=False)
        stream.verified.update(range(len(stream.names)))  # it has been, a moment ago
        ids, lengths = stream.rows(range(min(rows, len(stream))))
        shown = [
            {"row": place, "length": length, "text": decode(tokenizer, row[:length])}
            for place, (row, length) in enumerate(zip(ids.tolist(), lengths.tolist(), strict=True))
        ]
        found["splits"][split] = {**counts, "shards": len(stream.names), "lengths": _lengths(stream), "first_rows": shown}
    return found


def _lengths(stream: TokenStream) -> dict[str, float]:
    """How many tokens of a row count."""
    lengths = stream.lengths()
    return {
        "least": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "most": int(lengths.max()),
    }


def as_text(found: dict[str, Any]) -> str:
    """What inspect has found, for a person."""
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    tokenizer = found["tokenizer"]
    yield f"{found['path']}: {found['verified_files']} files, {found['bytes']:,} bytes, every sha256 as prepare wrote it"
    yield f"  format     {found['format']}"
    yield f"  rows       of {found['length']} tokens, packing {found['packing']}"
    yield f"  tokenizer  {tokenizer.get('kind', '?')}, {tokenizer.get('vocab_size', 0):,} tokens, sha256 {tokenizer['hash'][:12]}"
    yield f"  identity   {found['identity'][:12]}"
    if others := found["unnamed_files"]:
        yield f"  besides    {', '.join(others[:UNNAMED])}{', …' * (len(others) > UNNAMED)}: not prepare's, and nothing reads it"
    for source in found["sources"]:
        yield f"  source     {source['name']} ({source['format']}, {source['bytes']:,} bytes, sha256 {source['sha256'][:12]})"
    for split, counts in found["splits"].items():
        numbers = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items() if isinstance(value, int))
        lengths = ", ".join(f"{name} {value:,.6g}" for name, value in counts["lengths"].items())
        yield f"{split}: {numbers}"
        yield f"  lengths    {lengths}"
        for row in counts["first_rows"]:
            yield f"  row {row['row']:<6} {row['length']} tokens: {row['text']!r}"
