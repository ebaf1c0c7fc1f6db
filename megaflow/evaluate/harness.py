"""A run or a converted model in lm-evaluation-harness: `lm_eval --model megaflow --model_args path=RUN,draws=32 --tasks …`.

loglikelihood           -log p of a continuation given its context: exact of an autoregressive network; else the bound, of which every
                        request has its own Monte-Carlo error. A row's length is known, and is not part of it; what is told it
                        closes a row of one document with the end token, as every row of its training was
loglikelihood_rolling   rows of the network's length, one after the other, as `megaflow evaluate --text` packs a document
generate_until          the context is given and the rest of a row is filled in, up to the first stop or end token

Of a run of pairs the context is what is given of one: an end token closes it, and spaces between the two are of neither.

What the bounds' errors were of each task, and how many draws they took, is in the results' `config` (megaflow_…), and what else a reader
has to know: contexts that were cut, settings of generation that nothing here heeds. Texts are tokenized as in training.
This is the only module that needs lm_eval, which calls it: tools/lm_eval_model makes `megaflow` one of the names that it knows.
"""

import difflib
import hashlib
import logging
import math
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from megaflow.data.tokenizer import decode, end_id
from megaflow.errors import UserError
from megaflow.evaluate import real_text
from megaflow.evaluate.generate import check_given, generate, needs_source, ticking
from megaflow.evaluate.likelihood import nats
from megaflow.evaluate.loaded import load_run
from megaflow.evaluate.settings import Settings, check_temperature, resolved
from megaflow.evaluate.template import Template, encoded
from megaflow.flow import discrete
from megaflow.flow import head as heads
from megaflow.model.autoregressive import Autoregressive
from megaflow.model.discrete import Discrete

MOST_DRAWS = 4096
ARGMAX = "one step is an argmax, which no temperature changes"
CHAT = "lm_eval: --apply_chat_template: what is trained here reads texts and has no chat template; leave it out"
GREEDY = 1e-6
"""Temperature of an autoregressive network that is to write its likeliest tokens."""
OPTIONS = {"path": str, "draws": int, "tolerance": float, "seed": int, "steps": int, "temperature": float}
HEEDED = {"until", "max_gen_toks", "do_sample", "temperature"}
"""Of a task's generation_kwargs, after lm_eval has given them one name each."""


class Took(NamedTuple):
    """What the bound of a row came at: its error in nats, its tokens, its draws. question: by number; its choices err together."""

    task: str
    question: int
    error: float
    tokens: int
    draws: int


def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What a person has done wrong is one sentence here too; lm_eval would show where it was raised."""
    if isinstance(error, UserError):
        print(f"megaflow: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = told


class MegaFlow(LM):
    """path: a run or a converted model; draws: of noise and time for every bound, and at least so many where `tolerance`, nats of standard
    error of a request, asks for more; steps, temperature: of generation, None for the run's usual ones.

    lm_eval also passes batch_size, max_batch_size and device, which change nothing: rows go in batches of their own, to a GPU where there
    is one."""

    def __init__(
        self,
        path: str = "",
        draws: int = 32,
        tolerance: float = math.inf,
        seed: int = 0,
        steps: int | None = None,
        temperature: float | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **others: Any,
    ) -> None:
        super().__init__()
        for name in others:
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(OPTIONS)}"
            raise UserError(f"--model_args: there is no {name}{hint}")
        given = {"path": path, "draws": draws, "tolerance": tolerance, "seed": seed, "steps": steps, "temperature": temperature}
        for name, value in given.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if OPTIONS[name] is not str and value is not None and not (number and (OPTIONS[name] is float or isinstance(value, int))):
                raise UserError(f"--model_args: {name}={value} is no {'whole number' if OPTIONS[name] is int else 'number'}")
        path = str(path)
        if not path:
            raise UserError("--model_args: path=RUN_OR_FOLDER is missing")
        if draws < 2:
            raise UserError(f"--model_args: draws={draws} has no error; give 2 or more")
        if not tolerance > 0.0:
            raise UserError(f"--model_args: tolerance={tolerance} is not a number of nats above 0")
        if temperature is not None:
            check_temperature(temperature, "--model_args: temperature")
        self.run = load_run(path)
        self.draws, self.tolerance, self.seed, self.steps, self.temperature = draws, tolerance, seed, steps, temperature
        manifest, end = self.run.manifest, end_id(self.run.tokenizer)
        self.length = manifest["length"]
        # no row of training is without, but full ones
        self.closing = [end] if manifest["packing"] == "document" and end is not None else []
        self.pairs = bool(manifest["settings"].get("target_field"))
        self.took: list[Took] = []
        self.cut_contexts, self.unheeded, self.bytes = 0, set[str](), dict[str, dict[str, int]]()
        self.one_step = self.run.parts is not None and (steps or (1 if self.run.is_map else 64)) == 1
        if self.one_step and temperature not in (None, 1.0):
            raise UserError(f"--model_args: temperature={temperature}: {ARGMAX}; give steps=2 or more")

    def tokens(self, text: str) -> list[int]:
        return encoded(self.run.manifest, self.run.tokenizer, text, "lm_eval") if text else []

    def given(self, context: str) -> list[int]:
        """What is given of a row."""
        return self.tokens(context.rstrip(" ")) + self.closing if self.pairs else self.tokens(context)

    def row(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of both, and how many are the continuation's, with the end token that follows where one has to."""
        if self.pairs:
            rest = self.tokens(continuation.lstrip(" "))
            whole = self.given(context) + rest
        else:
            spaces = len(context) - len(context.rstrip())
            context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
            before, whole = self.tokens(context), self.tokens(context + continuation)
            both = min(len(before), len(whole))
            rest = whole[next((at for at in range(both) if before[at] != whole[at]), both) :]  # from a token that reaches over on
        if not rest:
            raise UserError(f"lm_eval: the continuation {continuation!r} has no token")
        ends = self.closing if self.run.kind != "autoregressive" else []
        if len(rest + ends) > self.length:
            raise UserError(f"lm_eval: a continuation has {len(rest + ends)} tokens, and the network's rows {self.length}")
        return whole + ends, len(rest + ends)

    # -- likelihoods

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        rows, begins = [], []
        for context, continuation in (request.args for request in requests):
            whole, count = self.row(context, continuation)
            rows.append(whole[-self.length :])  # of a context that is too long, its end
            begins.append(len(rows[-1]) - count)
            self.count_cut(len(whole) > self.length)
        tasks = [request.task_name or "" for request in requests]
        # choices of one question have the same noise, in whatever order they are listed
        questions = [
            (request.task_name, number if request.doc_id is None else request.doc_id, request.args[0])
            for number, request in enumerate(requests)
        ]
        least: dict[Any, int] = {}
        for question, row in zip(questions, rows, strict=True):
            least[question] = min(key_of(row), least.get(question, 2**63))
        numbers = {question: number for number, question in enumerate(least)}
        found = self.nats(rows, begins, tasks, [least[question] for question in questions], [numbers[question] for question in questions])
        return list(zip([-each for each in found], self.likeliest(rows, begins), strict=True))

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        if self.pairs:
            raise UserError(f"lm_eval: the rows of {self.run.directory} are pairs, and a text alone is none; give tasks with a context")
        rows, of = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tokens(text) + self.closing
            rows += [ids[start : start + self.length] for start in range(0, len(ids), self.length)]
            of += [number] * -(-len(ids) // self.length)
            self.count_bytes(requests[number].task_name or "", text, ids)
        sums = [0.0] * len(requests)
        tasks = [requests[number].task_name or "" for number in of]
        for number, each in zip(of, self.nats(rows, [0] * len(rows), tasks), strict=True):
            sums[number] -= each
        return sums

    def nats(
        self,
        rows: list[list[int]],
        begins: list[int],
        tasks: list[str],
        keys: list[int] | None = None,
        questions: list[int] | None = None,
    ) -> list[float]:
        """-log p of each row from where it begins, given what is before; with more and more draws where the error is too large.

        keys: of each row, whose value is a function of it and not of the other rows; those of one key have the same noise and times, those
        of one of the questions, by number, as many draws. Without, rows are those of texts, their lengths are priced, and where they stand
        decides their noise.
        """
        found = [(0.0, Took("", 0, 0.0, 0, 0))] * len(rows)
        left, draws = list(range(len(rows))), self.draws
        of = list(range(len(rows))) if questions is None else questions
        while left:
            for i, value, took in zip(left, *self.measured(rows, begins, left, draws, keys), strict=True):
                found[i] = value, took._replace(task=tasks[i], question=of[i])
            worse = {of[i] for i in left if found[i][1].error > self.tolerance}
            if worse and draws >= MOST_DRAWS:
                said = f"{len(worse)} questions have an error above tolerance={self.tolerance:g} after {draws:,} draws, and get no more"
                logging.getLogger(__name__).warning(f"{said} (megaflow_bounds of the results has the worst)")
            left = [i for i in left if draws < MOST_DRAWS and of[i] in worse]
            draws = min(2 * draws, MOST_DRAWS)
        self.took += [took for _, took in found]
        return [value for value, _ in found]

    def measured(
        self, rows: list[list[int]], begins: list[int], some: list[int], draws: int, keys: list[int] | None
    ) -> tuple[list[float], list[Took]]:
        """-log p of `some` of the rows, and what each came at."""
        ids, given = self.padded([rows[i] for i in some], [begins[i] for i in some])
        for there in {begins[i] > 0 for i in some}:
            self.check_given(there)
        text = real_text.made(self.run, ids, [len(rows[i]) for i in some])
        own = None if keys is None else [keys[i] for i in some]
        measured = nats(self.run, text, draws, self.seed, given if bool(given.any()) else None, of_lengths=own is None, keys=own)
        if measured["kind"] == "none":
            raise UserError(f"{self.run.directory}: it has no likelihood ({measured['reason']})")
        each = measured["rows"]
        return each["nats"], [Took("", 0, error, count, draws) for error, count in zip(each["errors"], each["tokens"], strict=True)]

    def padded(self, rows: Sequence[Sequence[int]], begins: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(N, L) tokens, and which of them stand before where a row begins."""
        ids = torch.zeros(len(rows), self.length, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        return ids, torch.arange(self.length) < torch.tensor(begins)[:, None]

    def check_given(self, given: bool) -> None:
        """Refuse a context, or a likelihood without one, which the run was not trained for. Raises UserError."""
        if given and self.run.parts is not None and self.run.config.flow.context.share == 0.0:
            raise UserError(
                f"{self.run.directory} was trained without given tokens (flow.context.share=0): it has a likelihood of whole texts "
                "(rolling tasks), and none of a continuation"
            )
        if given:
            check_given(self.run, "--prompt", "lm_eval, a task with a context")
        elif self.run.parts is not None and self.run.config.flow.context.share == 1.0:
            raise UserError(
                f"{self.run.directory} was given some tokens of every text (flow.context.share=1): its likelihood is of the others, as "
                "`evaluate` has it, and none of a whole text; give tasks with contexts that leave room in a row"
            )

    @torch.no_grad()
    def likeliest(self, rows: list[list[int]], begins: list[int]) -> list[bool]:
        """Whether each continuation is what its network finds likeliest: an autoregressive one token by token; others at every position at
        once, from what is given alone (of a flow, at noise that is its own)."""
        ids, given = self.padded(rows, begins)
        found = []
        for start in range(0, len(rows), 64):
            part = slice(start, start + 64)
            lengths = [len(row) for row in rows[part]]
            top = self.top(ids[part], given[part], torch.tensor(lengths))
            for row, begin, written in zip(rows[part], begins[part], top.tolist(), strict=True):
                found.append(written[begin : len(row)] == row[begin:])
        return found

    def top(self, ids: Tensor, given: Tensor, lengths: Tensor) -> Tensor:
        """(B, L) likeliest tokens."""
        network, device = self.run.network, self.run.network.weight.device
        ids, given, lengths = ids.to(device), given.to(device), lengths.to(device)
        if isinstance(network, Autoregressive):
            read = network.read(network(ids))
        elif isinstance(network, Discrete):
            time = torch.full((len(ids),), discrete.FIRST, dtype=torch.float64, device=device)
            read = network.read(network(ids, time, ~given, lengths))
        else:
            asked = Settings(1, "ode", seed=self.seed)
            template = Template(ids.cpu(), given.cpu(), lengths.tolist())
            written = generate(self.run, len(ids), asked, template)
            return torch.tensor([row + [0] * (self.length - len(row)) for row in written])
        return heads.likeliest(network.head(), read)[1][:, 0].view(ids.shape).cpu()

    # -- text

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        raise UserError(CHAT)

    @property
    def tokenizer_name(self) -> str:
        raise UserError(CHAT)  # lm_eval asks for it where a chat template is to be applied, and only there

    def generate_until(self, requests: list) -> list[str]:
        """Text i of those of a task at one temperature, with a context or without, is a function of the seed, i and its context, whatever
        other tasks ask for: `repeats`, which asks for the same several times, gets several."""
        asked = [self.asked(*request.args) for request in requests]
        alike: dict[tuple[str, float, bool], list[int]] = {}
        for number, (before, heat, _, _) in enumerate(asked):
            alike.setdefault((requests[number].task_name or "", heat, bool(before)), []).append(number)
        texts, counts = [""] * len(asked), [len(each) for each in alike.values()]
        tick = ticking(f"text {self.run.directory.name}", self.run, resolved(self.run, Settings(self.steps)), counts, patience=5.0)
        for (_, heat, with_context), numbers in alike.items():
            settings = resolved(self.run, Settings(self.steps, temperature=heat, seed=self.seed))
            befores = [asked[number][0] for number in numbers]
            template = Template(*self.padded(befores, [len(before) for before in befores])) if with_context else None
            rows = generate(self.run, len(numbers), settings, template, tick=tick)
            for number, row in zip(numbers, rows, strict=True):
                before, _, room, until = asked[number]
                texts[number] = self.cut(row[len(before) :][:room], until)
        return texts

    def asked(self, context: str, settings: dict[str, Any]) -> tuple[list[int], float, int, list[str]]:
        """What is given of a row, the temperature, how many tokens behind it count, and up to which stops. Raises UserError."""
        whole = self.given(context)
        left = self.length - len(whole)
        how: dict[str, Any] = {**normalize_gen_kwargs(settings, left if left > 0 else self.length // 2)}
        self.heed(how)
        room = how["max_gen_toks"]
        if not 0 < room < self.length:
            rows = f"a row of {self.run.directory} has {self.length} tokens, for the context and what is written"
            raise UserError(f"lm_eval: max_gen_toks={room}: {rows}; give fewer, --gen_kwargs max_gen_toks={self.length // 2}")
        before = whole[-(self.length - room) :]
        self.count_cut(len(before) < len(whole))
        if before:
            self.check_given(True)
        elif needs_source(self.run):
            raise UserError(f"lm_eval: {self.run.directory} writes what belongs to a source, and a request has no context")
        return before, 1.0 if self.one_step else self.warmth(how), room, how["until"]

    def count_bytes(self, task: str, text: str, ids: list[int]) -> None:
        """Note how many bytes a text has, and how many of them a run reads; lm_eval's bits per byte are of all."""
        end = end_id(self.run.tokenizer)
        read = len(decode(self.run.tokenizer, [token for token in ids if token != end]).encode())
        sizes = self.bytes.setdefault(task, {"of_the_text": 0, "as_read": 0})
        if (size := len(text.encode())) != read and sizes["of_the_text"] == sizes["as_read"]:
            said = (
                f"{self.run.directory} does not read texts as they are (data.normalize={self.run.manifest['normalize']}, or its tokenizer)"
            )
            logging.getLogger(__name__).warning(
                f"{said}: bits per byte are of other bytes than it has scored; megaflow_bytes has both numbers"
            )
        sizes["of_the_text"] += size
        sizes["as_read"] += read

    def count_cut(self, cut: bool) -> None:
        """Of contexts that are too long the end is kept, which is said once, and counted."""
        if cut and not self.cut_contexts:
            said = (
                f"a context and what follows it have more than the {self.length} tokens of a row of {self.run.directory}; its end is kept"
            )
            logging.getLogger(__name__).warning(f"{said} (megaflow_contexts_cut of the results counts them)")
        self.cut_contexts += cut

    def heed(self, how: dict[str, Any]) -> None:
        """Note, and say once, what a task asks for that no sampler here has."""
        cold = {"temperature"} if self.one_step and self.warmth(how) != 1.0 else set()
        for name in sorted((how.keys() - HEEDED | cold) - self.unheeded):
            self.unheeded.add(name)
            why = f"{', '.join(sorted(HEEDED))} are"
            if name in HEEDED:
                why = f"{ARGMAX}; --model_args steps=2 or more has one"
            logging.getLogger(__name__).warning(f"generation_kwargs {name}={how.get(name)!r} is not heeded; {why}")

    def warmth(self, how: dict[str, Any]) -> float:
        """Of a request that draws its own temperature, else that of model_args, else what writes the likeliest."""
        if how["do_sample"] and (asked := how.get("temperature", self.temperature or 1.0)) > 0.0:
            return float(asked)
        return self.temperature or (GREEDY if self.run.kind == "autoregressive" else 1.0)

    def cut(self, row: list[int], until: Sequence[str]) -> str:
        """The text of tokens up to the first end token, or before the first stop."""
        end = end_id(self.run.tokenizer)
        text = decode(self.run.tokenizer, row[: row.index(end)] if end in row else row)
        return text[: min((place for stop in until if stop and (place := text.find(stop)) >= 0), default=len(text))]

    def get_model_info(self) -> dict[str, Any]:
        """For the results' `config`: what was measured, by how many draws, and with what error."""
        run = self.run
        found: dict[str, Any] = {"path": str(run.directory), "kind": run.kind, "step": run.step, "weights": run.weights, "seed": self.seed}
        found |= {"contexts_cut": self.cut_contexts, "not_heeded": sorted(self.unheeded)}
        found |= {"bytes": self.bytes} if any(each["of_the_text"] != each["as_read"] for each in self.bytes.values()) else {}
        if self.took and run.kind != "autoregressive":
            names = dict.fromkeys(each.task for each in self.took)
            found["bounds"] = {name: summed([each for each in self.took if each.task == name]) for name in names}
        return {f"megaflow_{key}": value for key, value in found.items()}


def key_of(row: list[int]) -> int:
    """A number that is a function of its tokens."""
    return int.from_bytes(hashlib.blake2b(repr(row).encode(), digest_size=7).digest(), "little")


def summed(took: Sequence[Took]) -> dict[str, float]:
    """Of a task's bounds: how many, their draws, and the error of their sum, and of the worst. Those of one question, which have the same
    noise, are taken as if they erred by the same: at most so."""
    draws, errors = [each.draws for each in took], [each.error for each in took]
    questions: dict[int, float] = {}
    for each in took:
        questions[each.question] = questions.get(each.question, 0.0) + each.error
    return {
        "likelihoods": len(took),
        "draws": sum(draws) / len(draws),
        "draws_most": max(draws),
        "standard_error_nats_per_token": math.sqrt(sum(error**2 for error in questions.values())) / sum(each.tokens for each in took),
        "standard_error_nats_most": max(errors),
    }
