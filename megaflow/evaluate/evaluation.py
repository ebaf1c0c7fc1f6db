"""`megaflow evaluate RUN`: likelihood with its error, and samples judged at several numbers of steps, or along a frontier.

Everything is computed from the run's newest checkpoint (averaged weights) and the shards it was trained on; asking again for what is
already there, of the same checkpoint with the same settings, computes nothing.
"""

import contextlib
import hashlib
import math
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaflow.data import shards
from megaflow.data.stream import TokenStream
from megaflow.data.tokenizer import decode
from megaflow.errors import UserError
from megaflow.evaluate import answers, causal_judge, frontier, kept, mauve_score, repetition, verifiable
from megaflow.evaluate import judge as judges
from megaflow.evaluate.causal_judge import CausalJudge
from megaflow.evaluate.flow_text import grid_clock
from megaflow.evaluate.gather import evaluation_command, machine
from megaflow.evaluate.generate import generate
from megaflow.evaluate.judge import Judge
from megaflow.evaluate.likelihood import Ode, by_equation, check_ode, likelihood
from megaflow.evaluate.loaded import Run, documents, load_run, text_of, up_to_end
from megaflow.evaluate.real_text import RealText, of_file, of_split, spread
from megaflow.evaluate.repetition import Training
from megaflow.evaluate.settings import LAST_STEP, Settings, check_temperature, last_step
from megaflow.evaluate.template import Template
from megaflow.evaluation_file import FILE, MEASURES
from megaflow.export import one_step
from megaflow.files import write_atomically
from megaflow.flow import choice, laws
from megaflow.flow import profile as profiles
from megaflow.flow.interpolant import time_of
from megaflow.parallel import random
from megaflow.progress import Progress
from megaflow.train.context import Contexts
from megaflow.train.run import read_config, source_digest, versions
from megaflow.train.stages import check_same_shards

JUDGE_CHARACTERS = 8_000_000
"""The judge is fitted to at most this many characters of the training split, from its beginning."""
AT_ONCE = 1024
"""Rows of it that are read at once."""
JUDGE_FILE = "judge.npz"
COOLED, COOLED_STEPS = (0.7,), 4
"""Texts at temperature 1 are also judged at these, up to this many steps: fewer steps write with less entropy, and so does a lower
temperature; only at equal entropy do judged values compare."""
EVEN_STEPS = 16
"""A flow map's texts of up to so many steps are also written on a grid that is even to its end, without a longer last step."""
CONTEXTS_CHECKED = 256
SHOWN_TEXTS = 8
METHODS = {"flow": "ode", "flow_map": "flow_map", "autoregressive": "autoregressive"}
"""How texts are written that are judged; those of other baselines by their ancestral samplers."""


def evaluate(
    directory: str | Path,
    steps: list[int],
    samples: int,
    rows: int,
    draws: int,
    seed: int,
    temperature: float = 1.0,
    out: str | None = None,
    began: float | None = None,
    data: str | None = None,
    clock: str = "auto",
    texts: list[str] | None = None,
    causal: list[str] | None = None,
    along: frontier.Asked | None = None,
    mauve: bool = False,
    verify: str | None = None,
    ode: Ode | None = None,
) -> dict[str, Any]:
    """Evaluate a run, write RUN/evaluation.json, and copy it to `out`; its seconds count from `began`, a time.monotonic(), now if None.

    `clock` is the law that texts' grids are even on, see generate.sample; `data` is where the run's shards are, if not where they were in
    training; `texts` are files whose likelihood is measured besides; `causal` are folders of causal language models that judge texts too,
    `along` a frontier to write texts on, `mauve` asks for that of the first such folder, `verify` names a task whose problems are to be
    solved, and `ode` asks for the likelihood of the flow's equation. A run that cannot be written to is evaluated into `out`
    alone. Raises UserError.
    """
    began = time.monotonic() if began is None else began
    check(Path(directory), steps, samples, rows, draws, out)
    check_temperature(temperature)
    if mauve:
        mauve_score.check(causal or [])  # the first is the one
    identities = {path: causal_judge.identity(path) for path in causal or []}
    if len(set(identities.values())) < len(causal or []):
        raise UserError(f"--judge: two of {', '.join(causal or [])} are the same model; give each once")
    run = load_run(directory)
    run.config.data.path = data or run.config.data.path
    check_shards(run)
    settings = {"steps": steps, "samples": samples, "rows": rows, "draws": draws, "seed": seed, "temperature": temperature}
    settings |= {"cooled": list(COOLED) if temperature == 1.0 else [], "order": judges.ORDER}
    settings |= {"last": LAST_STEP, "balance": one_step.TOKENS} if run.is_map else {"last": None, "balance": None}
    if clock != "auto":
        settings |= {"clock": clock}
        grid_clock(run, clock)  # is there
    if texts:
        settings |= {"texts": {path: hashed(path) for path in texts}}
    if identities:
        settings |= {"judges": identities}
    if along is not None:
        frontier.check(run, along)
        settings |= {"frontier": along._asdict()}
    if mauve:
        settings |= {"mauve": next(iter(identities))}
    if verify is not None:
        settings |= {"verify": answers.asked_task(run, verify).name}
    if ode is not None:
        check_ode(run, ode)
        settings |= {"ode": ode._asdict()}
    identity = {
        "measures": MEASURES,
        "step": run.step,
        "weights": run.weights,
        "shards": shards.identity(run.manifest),
        "settings": settings,
    }
    with kept.alone(run.directory):
        result = before = kept.read(run.directory)
        if not kept.is_of(result, identity):
            result = measure(run, identity, began) | {"made_by": made_by(run, settings, data)}
            if kept.writable(run.directory):
                if before and before.get("weights") == run.weights:  # by other settings: hours, maybe
                    write_atomically(run.directory / kept.BEFORE, kept.as_json(before, run.directory))
                    print(
                        f"{run.directory / FILE} was of other settings, or of another version; it is {kept.BEFORE} now",
                        file=sys.stderr,
                    )
                write_atomically(run.directory / FILE, kept.as_json(result, run.directory))
    result["run"] = str(directory)  # the same run may be called by another path
    if out:
        kept.write_out(out, kept.as_json(result, run.directory))
    return result


def made_by(run: Run, settings: dict[str, Any], data: str | None) -> dict[str, Any]:
    """What an evaluation was made with, to repeat it: the command, in which folder, the shards, versions, device and threads.

    data: where the shards were said to be."""
    device = run.network.weight.device
    return {
        "command": shlex.join(evaluation_command(str(run.directory), settings, data)),
        "folder": str(Path.cwd()),
        "data": run.config.data.path,
        "versions": versions(),
        "source": source_digest(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "time": time.time(),
    }


def hashed(path: str) -> str:
    """The SHA-256 of a file. Raises UserError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--text {path}: cannot be read ({error.strerror}); give a file of text") from None


def check(directory: Path, steps: list[int], samples: int, rows: int, draws: int, out: str | None) -> None:
    """Refuse, before anything is loaded, what would fail after all the work. Raises UserError."""
    check_numbers(steps, samples, rows, draws)
    if draws < 2 and read_config(directory).config.model.family != "autoregressive":
        raise UserError(f"--draws: {draws} draw of noise and time per row has no error estimate; give 2 or more")
    if not out:
        if directory.is_dir() and not kept.writable(directory):
            raise UserError(f"{directory}: this folder is not writable, it cannot keep the result; give --json FILE to write it there")
        return
    kept.check_out("--json", out, "evaluation", directory)


def check_numbers(steps: list[int], samples: int, rows: int, draws: int, temperature: float = 1.0, clock: str = "auto") -> None:
    """What can be refused without a run. Raises UserError."""
    for option, value in (("--samples", samples), ("--rows", rows), ("--draws", draws), *(("--steps", step) for step in steps)):
        if value < 1:
            raise UserError(f"{option}: {value} is not a positive whole number")
    if not steps:
        raise UserError("--steps: no number of steps is given")
    if len(set(steps)) < len(steps):
        raise UserError(f"--steps: {','.join(map(str, steps))} has a number twice")
    check_temperature(temperature)
    if clock != "auto":
        try:
            choice.split(laws.LAWS, clock)
        except choice.ChoiceError as error:
            raise UserError(f"--clock must be {error}") from None


def check_shards(run: Run) -> None:
    """Refuse to measure on other shards than the run was trained on, whose validation rows it may have learned; where they are missing,
    say where from and what helps: a relative path counts from where the run was started. Raises UserError."""
    directory, path = run.directory, Path(run.config.data.path)
    if path.is_dir():
        check_same_shards(directory, shards.open_prepared(path))
        return
    beside = next((parent for parent in directory.resolve().parents if (parent / path).is_dir()), None)
    if path.is_absolute():
        advice = "put them back there, or prepare them there again with megaflow prepare"
    elif beside is not None:
        advice = f"run this command in {beside}"
    else:
        advice = "run this command in the folder that the run was started in"
    where = path if path.is_absolute() else f"{path} of the present folder {Path.cwd()}"
    raise UserError(f"{directory}: the run's shards are not at {where}; {advice}, or say where they are, --data PATH")


def measure(run: Run, identity: dict[str, Any], began: float) -> dict[str, Any]:
    """Everything an evaluation holds, from the start."""
    settings = identity["settings"]
    samples, rows, draws, seed = (settings[key] for key in ("samples", "rows", "draws", "seed"))
    held_out = of_split(run, "validation", rows)
    if "verify" in settings:
        answers.check_rows(run, verifiable.task(settings["verify"]), held_out)
    causal = {path: causal_judge.open_judge(path) for path in settings.get("judges", {})}
    judge, training = fitted_judge(run), training_text(run)
    result: dict[str, Any] = {
        "run": str(run.directory),
        **identity,
        "kind": run.kind,
        "likelihood": likelihood(run, held_out, draws, seed),
        "texts": {path: of_text(run, path, settings) for path in settings.get("texts", {})},
        "judge": {
            "name": f"smoothed character n-gram, order {judge.order}, of the training split",
            "order": judge.order,
            "symbols": judge.symbols,
            "training_characters": min(run.manifest["splits"]["train"]["characters"], JUDGE_CHARACTERS),
            "contexts_checked": CONTEXTS_CHECKED,
            "sum_error": judges.sum_error(judge, contexts(held_out, judge.order)),
        },
        "reference": reference(run, held_out, judge, samples, seed, causal),
    }
    if "ode" in settings:
        result["likelihood"]["ode"] = by_equation(run, held_out, Ode(**settings["ode"]), seed)
    if causal:
        result["judges"] = {path: {"sha256": settings["judges"][path]} | each.about for path, each in causal.items()}
    result |= written(run, settings, judge, held_out, training, causal, result["reference"]["data"]["entropy"])
    if run.parts is not None:
        result["profile"] = profile(run)
        result["trajectory"] = trajectory(run, seed, given_of(run, held_out))
    result["seconds"] = time.monotonic() - began
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def of_text(run: Run, path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The likelihood of another text file, which the run was not trained on, in rows of the run's own. Raises UserError."""
    text, counts = of_file(run, path, settings["rows"])
    found = likelihood(run, text, settings["draws"], settings["seed"])
    return counts | found | ({"scored_tokens": found["tokens"]} if "tokens" in found else {})  # but what is given


def fitted_judge(run: Run) -> Judge:
    """The judge of the run's training split, fitted once and kept in the run, if that can be written to; anew if it is damaged, or of
    another text."""
    path, text = run.directory / JUDGE_FILE, f"{shards.identity(run.manifest)}, {JUDGE_CHARACTERS} characters"
    if path.exists():
        with contextlib.suppress(UserError):
            return judges.load(path, text)
    pieces = [decode(run.tokenizer, flat) for flat, _ in training_rows(run, "judge")]
    judge = judges.fit("".join(pieces)[:JUDGE_CHARACTERS])
    if kept.writable(run.directory):
        judges.save(judge, path, text)
    return judge


def training_text(run: Run) -> Training:
    """As one text: runs of tokens go on from one row to the next."""
    return Training(*([np.concatenate(each)] for each in zip(*training_rows(run, "training text"), strict=True)))


def training_rows(run: Run, label: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The tokens of the training split's first JUDGE_CHARACTERS or so, (n,) each of as many rows as are read at once, and the lengths of
    these."""
    stream, split = TokenStream(run.config.data.path, "train", run.config.run.seed, shuffle=False), run.manifest["splits"]["train"]
    most = math.ceil(JUDGE_CHARACTERS * split["tokens"] / split["characters"])
    progress, tokens = Progress(label, len(stream), "rows"), 0
    for start in range(0, len(stream), AT_ONCE):
        ids, lengths = stream.rows(torch.arange(start, min(start + AT_ONCE, len(stream))))
        yield np.concatenate([row[:length] for row, length in zip(ids.numpy(), lengths.tolist(), strict=True)]), lengths.numpy()
        tokens += int(lengths.sum())
        progress.update(min(start + AT_ONCE, len(stream)))
        if tokens >= most:
            return


def contexts(held_out: RealText, order: int) -> list[str]:
    """CONTEXTS_CHECKED contexts of the judge from validation text, of every length it uses."""
    text = "".join(held_out.texts)
    starts = np.linspace(0, len(text) - order, CONTEXTS_CHECKED).round().astype(int)
    return [text[start : start + index % order] for index, start in enumerate(starts)]


def judged(run: Run, rows: list[list[int]], judge: Judge, real: list[str], causal: dict[str, CausalJudge] | None = None) -> dict[str, Any]:
    """Bits per character under the judge and entropy within a text, with their standard errors over texts, bits per character of
    `real` texts under an n-gram of the texts, the same texts under `causal` judges, and the first texts."""
    rows = [up_to_end(run, row) for row in rows]  # what is judged is what a reader has
    texts = [text_of(run, row) for row in rows]
    per_text = np.array([[judges.bits(judge, text).sum(), len(text)] for text in texts if text])
    mean = float(per_text[:, 0].sum() / per_text[:, 1].sum()) if len(per_text) else None
    error = None
    if len(per_text) > 1:
        residual = per_text[:, 0] - mean * per_text[:, 1]
        error = float(np.sqrt((residual**2).sum() * len(per_text) / (len(per_text) - 1)) / per_text[:, 1].sum())
    entropies = judges.token_entropies(rows)
    found: dict[str, Any] = {
        "judge_bits_per_char": mean,
        "judge_standard_error": error,
        "entropy": judges.token_entropy(rows),
        "entropy_standard_error": float(np.std(entropies, ddof=1) / math.sqrt(len(entropies))) if len(entropies) > 1 else None,
        "reverse_bits_per_char": judges.reverse(judge, texts, real) if any(texts) else None,
        "distinct": len(set(texts)),
        "count": len(rows),
        "texts": texts[:SHOWN_TEXTS],
    }
    if causal:
        parts = [documents(run, row) for row in rows]
        found["judges"] = {path: causal_judge.summary(causal_judge.score(each, parts)) for path, each in causal.items()}
    return found


def written(
    run: Run,
    settings: dict[str, Any],
    judge: Judge,
    held_out: RealText,
    training: Training,
    causal: dict[str, CausalJudge],
    entropy: float,
) -> dict[str, Any]:
    """Judged `samples` by number of steps ('autoregressive' for the baseline), the same `cooled`, without texts; of a flow map also
    those it writes on a grid without a longer last step, `even`, and its one-step text as the plain argmax, `unbalanced`. A run that writes
    nothing without being given some is given what its law gives of held-out rows, which is part of its texts.

    `nearest` has the most copied of the samples beside the training text, `mauve` that of the samples, `frontier` what is asked for, read
    at the `entropy` of real text unless at another, and `verify` the solved problems of a task."""
    method = METHODS.get(run.kind, "ancestral")
    counts, temperature = [None] if run.kind == "autoregressive" else settings["steps"], settings["temperature"]
    plan = [("samples", count, temperature) for count in counts]
    plan += [("cooled", n, cold) for n in counts if n is None or 1 < n <= COOLED_STEPS for cold in settings["cooled"]]
    if run.is_map:
        plan += [("even", n, temperature) for n in counts if n and 2 < n <= EVEN_STEPS]  # two steps are even
        plan += [("unbalanced", n, temperature) for n in counts if n == 1]
    found: dict[str, Any] = {"samples": {}, "cooled": {}, "even": {}, "unbalanced": {}}
    # real text is compared with other real text, of as many rows as there are texts; every second, since books are not alike
    some, others = held_out.rows[0::2], held_out.rows[1::2]
    real = [some[place] for place in spread(len(some), settings["samples"]).tolist()]
    found["repetition"] = {"data": repetition.measured(real, others, training)}
    template = given_of(run, held_out)
    if run.is_map and 1 in counts:
        run.balance()  # has a progress of its own
    run = run if "clock" not in settings else replace(run, clock=grid_clock(run, settings["clock"]))
    along = frontier.Asked(**settings["frontier"]) if "frontier" in settings else None
    ways = [] if along is None else frontier.ways(run, along, counts, settings["seed"])
    asked = counts if "verify" in settings else []
    problems = [Settings(n, method, temperature, None, settings["seed"], last_step(method, n)) for n in asked]
    total = sum(count or 1 for _, count, _ in plan) + sum(way.steps or 1 for way in [*ways, *problems])
    progress, done = Progress(f"samples {run.directory.name}", total, "steps"), 0
    entries: dict[Settings, dict[str, Any]] = {}
    found["nearest"], near = {}, None
    if settings.get("mauve"):
        near = mauve_score.Real.of(run, settings["mauve"], causal[settings["mauve"]], settings["samples"])
        found["mauve"] = near.about(settings["seed"])
    for kind, count, heat in plan:
        last = None if kind == "even" else last_step(method, count)
        way = Settings(count, method, heat, None, settings["seed"], last)
        drawn = generate(run, settings["samples"], way, template, unbalanced=kind == "unbalanced")
        rows = [up_to_end(run, row) for row in drawn]
        entry = judged(run, rows, judge, held_out.texts, causal)
        name = "autoregressive" if count is None else str(count)
        numbers = {key: value for key, value in entry.items() if key != "texts"}
        if kind == "cooled":
            found[kind].setdefault(name, []).append({"temperature": heat, **numbers})
        else:
            found[kind][name] = entry
        if kind in ("samples", "cooled"):
            entries[way] = numbers
        if kind == "samples":
            found["repetition"][name] = repetition.measured(rows[: len(real)], others, training)  # whose numbers hang on how many they are
            found["nearest"][name] = nearest(run, rows, training)
            if near is not None:
                found["mauve"]["samples"][name] = near.against([text_of(run, row) for row in rows], settings["seed"])
        progress.update(done := done + (count or 1))
    for way in ways:
        if way not in entries:
            entry = judged(run, generate(run, settings["samples"], way, template), judge, held_out.texts, causal)
            entries[way] = {key: value for key, value in entry.items() if key != "texts"}
        progress.update(done := done + (way.steps or 1))
    if problems:

        def tick(way: Settings) -> None:
            nonlocal done
            progress.update(done := done + (way.steps or 1))

        found["verify"] = answers.measured(run, settings["verify"], settings["samples"], settings["seed"], problems, tick)
    if along is not None:
        found["frontier"] = frontier.read([(way, entries[way]) for way in ways], entropy if along.entropy is None else along.entropy)
    return found


def nearest(run: Run, rows: list[list[int]], training: Training) -> list[dict[str, Any]]:
    """The texts that have the longest runs of the training text: which they are, how long the run is, and the training row it begins in,
    both as text."""
    return [
        {
            "text": found.text,
            "tokens": found.tokens,
            "copied": decode(run.tokenizer, rows[found.text][found.start : found.start + found.tokens]),
            "generated": text_of(run, rows[found.text]),
            "training_row": found.row,
            "training": text_of(run, training.row(found.row)),
        }
        for found in training.nearest(rows)
    ]


def given_of(run: Run, held_out: RealText) -> Template | None:
    """Of a run that writes nothing without being given some: what its law gives of the held-out rows, one after the other."""
    lengths = torch.tensor([len(row) for row in held_out.rows])
    given = Contexts(run.config, run.manifest).validation(held_out.ids, lengths, torch.arange(len(lengths)))
    return None if given is None else Template(held_out.ids, given, None if held_out.lengths is None else lengths.tolist())


def reference(
    run: Run, held_out: RealText, judge: Judge, samples: int, seed: int, causal: dict[str, CausalJudge] | None = None
) -> dict[str, Any]:
    """Real validation text, and tokens drawn one by one from the unigram law, through the same judge.

    The text that an n-gram of real text reads is not its own: for that one number it learns from as many rows of the training split.
    """
    law = (run.network.log_prior if run.parts is None else run.parts.log_prior).double().cpu().exp()
    source = random.generator(seed, "unigram texts")
    drawn = torch.multinomial(law, samples * run.manifest["length"], replacement=True, generator=source).view(samples, -1)
    data = judged(run, [held_out.rows[i] for i in spread(len(held_out.rows), samples).tolist()], judge, held_out.texts, causal)
    data["reverse_bits_per_char"] = judges.reverse(judge, of_split(run, "train", samples).texts, held_out.texts)
    return {"data": data, "unigram": judged(run, drawn.tolist(), judge, held_out.texts, causal)}


def profile(run: Run) -> dict[str, Any] | None:
    """Cross-entropy against time as measured in training, and the clock that was fitted to it."""
    (_, fixed, clock), stage = run.flow, run.kept
    found: dict[str, Any] = {"clock": run.config.flow.clock.name, "clock_t": clock.times.tolist(), "clock_cdf": clock.tau.tolist()}
    scores = profiles.kept(stage)
    if scores is not None:
        found["t"] = time_of(fixed.path, scores.centres).tolist()
        found["cross_entropy"] = scores.mean(profiles.CROSS_ENTROPY).tolist()
    return found


def trajectory(run: Run, seed: int, template: Template | None = None, steps: int = 16) -> dict[str, Any]:
    """One text on its way, of which something is given where the run asks for that: at every step the most likely token of every position
    and its probability."""
    times, tokens, confidence = [], [], []

    def see(step: int, time: float, posterior: Any) -> None:
        times.append(time)
        tokens.append([run.tokenizer.decode([i], skip_special_tokens=False) for i in posterior.tokens[0].tolist()])
        confidence.append([round(p, 4) for p in posterior.confidence[0].tolist()])

    method = "flow_map" if run.is_map else "ode"
    generate(run, 1, Settings(steps, method, seed=seed, last=last_step(method, steps)), template, callback=see)
    return {"times": times, "tokens": tokens, "confidence": confidence}


def of_equation(found: dict[str, Any]) -> list[str]:
    """Lines of the table for the likelihood of a flow's equation."""
    if found["kind"] == "none":
        return [f"equation          none: {found['reason']}"]
    divergence = "exact divergence" if found["probes"] == "exact" else f"{found['probes']} probe{'s' if found['probes'] > 1 else ''}"
    units = (
        f"{found['bits_per_char']:.4f} bits/char ({found['nats_per_token']:.4f} nats/token; {found['steps']} steps, {divergence}); "
        "a bound if the steps are many"
    )
    coarse = abs(found["half_steps_difference_nats"]) > 3.0 * found["standard_error_nats"]
    few = "; too few steps, their error is more than that of the noises" if coarse else ""
    return [
        f"equation          {units}",
        f"  standard error  {found['standard_error_bits_per_char']:.4f} bits/char of {found['draws']} noises a row",
        f"  half the steps  {found['half_steps_difference_nats']:+.4f} +- {found['half_steps_error_nats']:.4f} nats/token from them" + few,
    ]


def table(result: dict[str, Any]) -> str:
    """The evaluation as a person reads it."""
    found = result["likelihood"]
    temperature = result["settings"]["temperature"]
    lines = [f"{result['run']}  step {result['step']}  {result['kind']}" + (f"  temperature {temperature:g}" if temperature != 1.0 else "")]
    if "clock" in result["settings"]:
        lines[0] += f"  grids even on the clock {result['settings']['clock']}"
    if found["kind"] == "none":
        lines.append(f"likelihood        none: {found['reason']}")
    else:
        word = "bound" if found["kind"] == "bound" else "exact"
        lines.append(f"likelihood        {found['bits_per_char']:.4f} bits/char ({word}; {found['nats_per_token']:.4f} nats/token)")
        if word == "bound":
            lines.append(f"  standard error  {found['standard_error_bits_per_char']:.4f} bits/char of noise and times")
            if (spread := found["row_error_bits_per_char"]) is not None:
                lines.append(f"  over rows       {spread:.4f} bits/char of bound minus unigram entropy")
        lines.append(f"  in other units  {found['bits_per_byte']:.4f} bits/byte, perplexity {found['perplexity_per_token']:,.2f} per token")
        lines.append(f"unigram entropy   {found['unigram_bits_per_char']:.4f} bits/char")
    if ode := found.get("ode"):
        lines += of_equation(ode)
    if "given" in found:
        lines.append(f"given             of held-out rows by flow.context.law={found['given']}; likelihood is of the rest, texts hold both")
    if rest := found.get("continuation"):
        of = "what follows the source" if rest["given"] == "source" else "the second half of a row, given the first"
        entropy = rest["unigram_nats_per_token"]
        lines.append(f"continuation      {rest['nats_per_token']:.4f} nats/token of {of}; unigram entropy {entropy:.4f}")
    for path, entry in result["texts"].items():
        measured = f"none: {entry.get('reason')}"
        if entry["kind"] != "none":
            units = (
                f"{entry['bits_per_char']:.4f} bits/char, {entry['bits_per_byte']:.4f} bits/byte, {entry['nats_per_token']:.4f} nats/token"
            )
            measured = f"{units}, unigram entropy {entry['unigram_nats_per_token']:.4f}"
            measured += f", of what is not given by flow.context.law={entry['given']}" if "given" in entry else ""
        lines.append(f"{path}: {measured}; {entry['scored_tokens']:,} of {entry['file_tokens']:,} tokens")
    lines.append(f"judge             {result['judge']['name']}; sums to one within {result['judge']['sum_error']:.0e}")
    lines.append("reverse           real text under an n-gram of the texts, bits/char: what they leave out")
    lines.append(f"{'text':<34}{'judge bits/char':>16}{'+-':>8}{'entropy nats':>14}{'+-':>8}{'reverse':>9}{'distinct':>10}")
    shown = {}
    for name, entry in result["samples"].items():
        label = f"{name} steps" if name.isdigit() else name
        if name == "1" and temperature != 1.0 and result["kind"] in METHODS:
            label = "1 steps, an argmax"  # which no temperature changes
        shown[label] = entry
        shown |= {f"  temperature {cold['temperature']:g} ({label})": cold for cold in result["cooled"].get(name, [])}
        if name in result["even"]:
            shown[f"  even grid ({label})"] = result["even"][name]
        if name in result["unbalanced"]:
            shown[f"  unbalanced ({label})"] = result["unbalanced"][name]
    shown |= result["reference"]
    for name, value in shown.items():
        bits, back = ("none" if x is None else f"{x:.3f}" for x in (value["judge_bits_per_char"], value["reverse_bits_per_char"]))
        error = "" if value["judge_standard_error"] is None else f"{value['judge_standard_error']:.3f}"
        spread = "" if value["entropy_standard_error"] is None else f"{value['entropy_standard_error']:.3f}"
        lines.append(f"{name:<34}{bits:>16}{error:>8}{value['entropy']:>14.3f}{spread:>8}{back:>9}{value['distinct']:>6}/{value['count']}")
    for path, about in result.get("judges", {}).items():
        lines += ["", *causal_judge.table(path, about, {name: entry["judges"][path] for name, entry in shown.items()})]
    lines += [
        "",
        f"{'tokens':<34}{'texts':>7}{'distinct-2':>12}{'repeated-4':>12}{'JS-1 bits':>11}{'JS-2 bits':>11}{'copied of 8':>13}{'of 32':>8}",
    ]
    for name, entry in result["repetition"].items():
        numbers = [entry[key] for key in ("distinct_2", "repetition_4", "divergence_1", "divergence_2")]
        numbers += [entry["copied"][length] for length in ("8", "32")]
        cells = [str(entry["texts"]), *("none" if x is None else f"{x:.3f}" for x in numbers)]
        label = f"{name} steps" if name.isdigit() else name
        lines.append(f"{label:<34}" + "".join(cell.rjust(width) for cell, width in zip(cells, (7, 12, 12, 11, 11, 13, 8), strict=True)))
    if "verify" in result:
        lines += ["", *answers.table(result["verify"])]
    if "mauve" in result:
        lines += ["", *mauve_score.table(result["mauve"])]
    if "frontier" in result:
        lines += ["", *frontier.table(result["frontier"], list(result.get("judges", {})))]
    return "\n".join(lines)
