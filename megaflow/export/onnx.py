"""`megaflow convert MAP OUT --to onnx`: the one-step map as a single file, noise in and tokens out, that ONNX Runtime runs on any CPU.

The graph is that of the network as transformers has it (export/hf), at the times 0 and 1, and the balanced choice of tokens of `megaflow
sample --steps 1` (flow/balance.py). What times come to is computed when it is made, in fp64; what is left is fp32.
"""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from megaflow.data import shards
from megaflow.data.tokenizer import TOKENIZER_FILE
from megaflow.errors import UserError
from megaflow.export import verify
from megaflow.export.source import Source
from megaflow.train.stages import SHARDS

FILE = "map.onnx"
LARGEST = 2_000_000_000
"""Bytes of weights of one file: the format is a protocol buffer, which holds no more."""
SAME = 0.999
"""Share of tokens that ONNX Runtime must write as torch does: where two are equally likely, the order of a sum decides."""
CHECKED = 4


def refuse(source: Source) -> None:
    """Refuse what has no one-step map, or does not fit in a file. Raises UserError."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--to onnx needs the package {error.name}, which is not here; pip install -e .[onnx]") from None
    if source.kind != "flow_map":
        raise UserError(f"--to onnx: {source.run} is no flow map ({source.kind}), whose one pass would write a text; distill a flow")
    if (size := 4 * sum(torch.Size(shape).numel() for shape in source.shapes.values())) > LARGEST:
        raise UserError(f"--to onnx: its weights are {size / 1e9:.1f} GB, and a file of this format holds 2 GB; use --to hf")


def write(source: Source, partial: Path, out: Path, model: Any) -> str:
    """Write the file and its tokenizer. model: the network as transformers opens it. Returns what was done, a line. Raises UserError."""
    if "balance" not in model.config.fixed:
        raise UserError(f"--to onnx: {source.run} takes more memory than is free; convert it on a machine with more")
    model.whole = True  # one product over all tokens, or the number of texts would be a number of the graph
    one_step = OneStep(model).eval()
    y, lengths = model.noise(list(range(CHECKED)), 0, "initial noise") / model.path.scale, model.drawn_lengths(list(range(CHECKED)), 0)
    inputs = {"noise": y} | ({} if lengths is None else {"lengths": lengths})
    with torch.no_grad():
        wanted = one_step(*inputs.values())
    texts = torch.export.Dim("texts", min=1, max=2**20)
    with quiet():
        made = torch.onnx.export(
            one_step.at_its_times(),
            tuple(value[:2] for value in inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=["tokens"],
            dynamic_shapes=tuple({0: texts} for _ in inputs),
            verbose=False,
        )
    assert made is not None
    about = {"run": source.run, "step": source.found.state["step"], "content": source.found.sha256, "kind": source.kind}
    made.model.metadata_props.update({f"megaflow.{key}": str(value) for key, value in about.items()})
    made.save(partial / FILE, external_data=False)
    shutil.copyfile(source.run / SHARDS / TOKENIZER_FILE, partial / TOKENIZER_FILE)
    for path in (partial / FILE, partial / TOKENIZER_FILE):
        shards.describe_file(path)  # on disk
    same = (run(partial / FILE, inputs) == wanted).double().mean().item()
    if same < SAME:
        raise UserError(verify.failed(out, f"ONNX Runtime writes {same:.1%} of the tokens that transformers writes"))
    size = (partial / FILE).stat().st_size / 1e6
    shapes = ", ".join(f"{name} (texts, {', '.join(map(str, value.shape[1:]))})".replace(", )", ",)") for name, value in inputs.items())
    compared = f"{same:.1%} of {wanted.numel()} tokens are those of transformers"
    return f"{out / FILE}: {size:.1f} MB, {shapes} -> tokens (texts, {y.shape[1]}); {compared}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block in which what the exporter says of itself, its steps and its plans, is not printed; what fails is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


class AtTime(nn.Module):
    """A time embedding at the one time that one step asks it for, (B,) to (B, c): a constant of the graph, for which ONNX Runtime 1.24 and
    before would have no cosine of doubles."""

    def __init__(self, embedding: nn.Module, time: float) -> None:
        super().__init__()
        self.value = nn.Buffer(embedding(torch.tensor([time], dtype=torch.float64)).detach())

    def forward(self, t: Tensor) -> Tensor:
        return self.value.expand(t.shape[0], -1)  # len would make a number of it


class OneStep(nn.Module):
    """Standard noise (B, L, d_c), or a draw of another prior, and of rows of documents their lengths (B,), to tokens (B, L)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.offsets = model, nn.Buffer(model.fixed.balance.detach())

    def at_its_times(self) -> Self:
        """Itself, with the embeddings of its two times as numbers."""
        if self.model.time is not None:
            self.model.time = AtTime(self.model.time, 0.0)
        if self.model.map_time is not None:
            self.model.map_time = AtTime(self.model.map_time, 1.0)
        return self

    def forward(self, noise: Tensor, lengths: Tensor | None = None) -> Tensor:
        zero = torch.zeros(noise.shape[0], dtype=torch.float64)
        return self.model.posterior(self.model.path.scale * noise, zero, zero + 1.0, lengths, None, 1.0, offsets=self.offsets)[1]


def run(file: Path, inputs: dict[str, Tensor]) -> Tensor:
    """What ONNX Runtime writes on this machine's CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
