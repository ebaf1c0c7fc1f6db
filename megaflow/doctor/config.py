"""What a config needs beyond what every run does: checks for `megaflow doctor`."""

import netrc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megaflow.config.load import Loaded
from megaflow.doctor.findings import Check, Finding, gigabytes, refused
from megaflow.doctor.host import OWN
from megaflow.errors import UserError

CHECKPOINT = 16
"""Bytes of a checkpoint a parameter: weights, their average and two moments, in fp32."""
NAMES = ("api.wandb.ai", "api.forge.coreweave.com")
"""Names that the public server of Weights & Biases has in a netrc file."""


def read(path: str, overrides: list[str]) -> tuple[Loaded, int | None]:
    """A config, resolved where the size of its vocabulary is known, and that size. Raises UserError."""
    from megaflow.config.check import resolve
    from megaflow.show import foreseen, known

    loaded, vocab = known(path, overrides)
    vocab = foreseen(loaded) if vocab is None else vocab
    return (loaded if vocab is None else resolve(loaded, vocab)), vocab


def checks(loaded: Loaded, vocab: int | None, processes: int) -> list[Check]:
    """What this config needs. processes: how many have been started; of one nothing is said, since the run may have more."""
    config = loaded.config
    server = "see whether the file server of {} answers, or take another place".format
    found = [
        Check("data.path", lambda: shards(config.data.path), 30.0, server(config.data.path)),
        Check("run.dir", lambda: run_dir(loaded, vocab), 60.0, server(config.run.dir)),
    ]
    if config.distill.teacher:
        found.append(Check("teacher", lambda: teacher(config.distill.teacher), 20.0, server(config.distill.teacher)))
    if config.train.precision == "bf16":
        found.append(Check("precision", precision, 60.0, needs="torch"))
    if config.model.attention == "flash":
        found.append(Check("attention", lambda: attention(loaded), 20.0, needs="torch"))
    if config.log.wandb == "online":
        found.append(Check("credentials", lambda: credentials(), 10.0, "see whether the home directory answers, or use log.wandb=offline"))
    if processes > 1:
        found.append(Check("layout", lambda: layout(loaded, processes), 10.0))
    return found


def shards(path: str) -> list[Finding]:
    from megaflow.data.shards import open_prepared

    try:
        manifest = open_prepared(path)
    except UserError as error:
        return [refused("data.path", error)]
    rows, vocab = manifest["splits"]["train"]["rows"], manifest["tokenizer"]["vocab_size"]
    return [Finding("data.path", "ok", f"{path}: {rows:,} rows of {manifest['length']} tokens, vocabulary {vocab:,}")]


def teacher(path: str) -> list[Finding]:
    from megaflow.train.outcome import newest_step

    step = newest_step(Path(path))
    if not step:
        mend = "train that flow first, or give another distill.teacher=RUN"
        return [Finding("teacher", "missing", f"{path} is no run with a checkpoint", mend)]
    return [Finding("teacher", "ok", f"{path} at step {step}")]


def run_dir(loaded: Loaded, vocab: int | None) -> list[Finding]:
    """Whether a run can write there, and its checkpoints have room: as many as are kept, and the one that is being written."""
    from megaflow.train.checkpoint import steps

    name, config, directory = "run.dir", loaded.config, Path(loaded.config.run.dir)
    above = next(path for path in (directory.absolute(), *directory.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.NamedTemporaryFile(prefix=OWN, dir=above) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        mend = "choose another run.dir, one that this user may write to and that has room"
        return [Finding(name, "missing", f"{above} cannot be written ({error.strerror or error})", mend)]
    if vocab is None:
        return [Finding(name, "ok", f"{directory} can be written; how large a checkpoint is, only the prepared text tells")]
    free, size = room(above), CHECKPOINT * parameters(loaded, vocab)
    count = 1 + config.train.keep_checkpoints - min(len(steps(directory)), config.train.keep_checkpoints)
    needed = f"{count} checkpoints to come are some {gigabytes(count * size)}"
    if free < count * size:
        mend = "make room, lower train.keep_checkpoints, or choose another run.dir"
        return [Finding(name, "missing", f"{needed}, and at {above} {gigabytes(free)} are free", mend)]
    return [Finding(name, "ok", f"{directory} can be written; {needed}, {gigabytes(free)} are free")]


def room(path: Path) -> int:
    """Bytes that this user may still write there."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def parameters(loaded: Loaded, vocab: int) -> int:
    """Of the network that a resolved config trains, which is built without memory."""
    from megaflow.config.check import is_map
    from megaflow.model import build
    from megaflow.plan.layout import network_of

    return build.parameters(network_of(loaded.config, vocab, 1, is_map(loaded.config)))


def precision(seconds: Callable[[Any], float] | None = None) -> list[Finding]:
    """Whether bf16 is arithmetic of the device, or something slow that stands for it. seconds: of a product on a CPU, by its dtype."""
    import torch

    name, mend = "precision", "use train.precision=fp32 here"
    if torch.cuda.is_available() and seconds is None:
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return [Finding(name, "warn", f"GPUs of compute capability {major}.{minor} only emulate bf16", mend)]
        return [Finding(name, "ok", f"bf16 on compute capability {major}.{minor}")]
    seconds = product_seconds if seconds is None else seconds
    ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    said = f"a product in bf16 takes {ratio:.2g} of one in fp32 on this CPU"
    return [Finding(name, "warn", said, mend) if ratio > 1.0 else Finding(name, "ok", said)]


def product_seconds(dtype: Any, size: int = 512) -> float:
    import torch

    left, right = torch.rand(2, size, size).to(dtype)
    taken = []
    for _ in range(6):
        began = time.perf_counter()
        left @ right
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])  # the first one also makes threads and kernels


def attention(loaded: Loaded) -> list[Finding]:
    """model.attention=flash, by the rule that a run refuses it by."""
    import torch

    from megaflow.config.check import heads
    from megaflow.model.attention import choose

    model = loaded.config.model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head_dim = model.hidden // (heads(model.hidden) if model.heads == "auto" else model.heads)
    try:
        choose("flash", device, loaded.config.train.precision == "bf16", head_dim)
    except UserError as error:
        return [refused("attention", error)]
    return [Finding("attention", "ok", f"flash, heads of {head_dim} dimensions")]


def credentials(home: Path | None = None) -> list[Finding]:
    """Whether wandb will find any for its server; whether they are good only the server knows, which is not asked."""
    name, mend = "credentials", "run wandb login on this host, set WANDB_API_KEY, or use log.wandb=offline and wandb sync later"
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return [Finding(name, "ok", f"{variable} is set")]
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    home = Path.home() if home is None else home
    file = Path(os.environ.get("NETRC") or home / ".netrc").expanduser()
    try:
        known = netrc.netrc(str(file))
    except FileNotFoundError:
        return [Finding(name, "missing", f"WANDB_API_KEY is not set, and there is no {file}", mend)]
    except (OSError, netrc.NetrcParseError) as error:
        return [Finding(name, "missing", f"{file} cannot be read ({type(error).__name__})", mend)]
    names = [server] if server and server not in NAMES else list(NAMES)
    if not any((found := known.authenticators(each)) and found[2] for each in names):
        return [Finding(name, "missing", f"{file} has none for {' or '.join(names)}", mend)]
    return [Finding(name, "ok", f"in {file}")]


def layout(loaded: Loaded, processes: int) -> list[Finding]:
    """Whether so many processes can train it."""
    from megaflow.config.check import batch_split
    from megaflow.parallel.mesh import check

    tensor = loaded.config.parallel.tensor
    try:
        check(tensor, processes)
        micro, passes = batch_split(loaded.config, processes // tensor)
    except UserError as error:
        return [refused("layout", error)]
    return [Finding("layout", "ok", f"tensor {tensor} x data {processes // tensor}, {passes} passes of {micro} rows each")]
