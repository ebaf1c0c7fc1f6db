"""How likely held-out rows are to a run: a bound with its error for flows and discrete diffusion, exact for the baseline."""

import math
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from megaflow.data import shards
from megaflow.errors import UserError
from megaflow.evaluate.loaded import Run
from megaflow.evaluate.real_text import RealText
from megaflow.flow import context
from megaflow.flow import head as heads
from megaflow.flow.likelihood import Estimate, NoBound
from megaflow.model import discrete_bound, ode_bound
from megaflow.model.autoregressive import Autoregressive
from megaflow.model.bound import bound_of_rows
from megaflow.model.discrete import Discrete
from megaflow.progress import Progress
from megaflow.train.context import Contexts, masks
from megaflow.train.stage import documents_of, end_of_documents
from megaflow.train.stages import SHARDS

STRETCHES = 16
"""Into which a bound is parted, evenly over its range of log-SNR or over time."""
BATCH = 64
BIAS = (
    "an upper bound of -log p of the flow whose equation is solved exactly and whose last posterior draws the tokens; "
    "the probes are unbiased; the steps err to either side, by about a third of the difference from half as many once they are fine enough "
    "for their order, and by up to all of it before"
)


class Ode(NamedTuple):
    """Steps of Heun's method along the flow's equation, and probes of its divergence; None for all of its dimensions."""

    steps: int
    probes: int | None


def check_ode(run: Run, asked: Ode) -> None:
    """Refuse what ode_bound.py does not take. Raises UserError."""
    if run.parts is None:
        raise UserError(f"--ode-likelihood: {run.directory} is a baseline (model.family={run.kind}) and has no equation; give a flow")
    if asked.steps < 4 or asked.steps % 2:
        raise UserError(f"--ode-likelihood: {asked.steps} is no even number of steps of 4 or more, of which half are taken for comparison")
    dims = run.parts.code.dim * run.manifest["length"]
    if asked.probes is None and dims > ode_bound.EXACT:
        raise UserError(f"--probes exact: a row has {dims:,} dimensions, and the limit is {ode_bound.EXACT}; give a number of probes")
    if asked.probes is not None and asked.probes < 1:
        raise UserError(f"--probes: {asked.probes} is no positive number of probes, nor exact")


def by_equation(run: Run, held_out: RealText, asked: Ode, seed: int) -> dict[str, Any]:
    """The bound of the flow as a differential equation on the rows of `likelihood`, of the tokens that are written, in its units."""
    device, lengths = run.network.weight.device, torch.tensor([len(row) for row in held_out.rows])
    given = Contexts(run.config, run.manifest).validation(held_out.ids, lengths, torch.arange(len(lengths)))
    ids, end = held_out.ids.to(device), end_of_documents(run.config, run.manifest)
    progress = Progress(f"equation {run.directory.name}", len(ids) * ode_bound.DRAWS, "draws")
    facts: dict[str, Any] = {"progress": progress, "log_length": shards.log_length_law(run.directory / SHARDS)}
    facts |= {
        "documents": None if end is None else documents_of(ids, end),
        "closing": end,
        "given": None if given is None else given.to(device),
    }
    ragged = None if held_out.lengths is None else held_out.lengths.to(device)
    try:
        bound = ode_bound.ode_bound_of_rows(*run.flow, ids, ragged, asked.steps, asked.probes, seed, **facts)
    except NoBound as error:
        return {"kind": "none", "reason": str(error)}
    found: dict[str, Any] = {
        "kind": "ode",
        "nats_per_token": bound.mean,
        "standard_error_nats": bound.standard_error,
        "half_steps_difference_nats": bound.integration,
        "half_steps_error_nats": bound.integration_error,
        "unigram_nats_per_token": bound.unigram,
        "last_cross_entropy": bound.last_cross_entropy,
        "tokens": bound.tokens,
        "steps": asked.steps,
        "probes": "exact" if asked.probes is None else asked.probes,
        "draws": ode_bound.DRAWS,
        "bias": BIAS,
    }
    found |= in_other_units(found, run, held_out, given)
    return found | {"rows": {"nats": bound.rows.tolist(), "errors": bound.errors.tolist(), "tokens": bound.row_tokens.long().tolist()}}


@torch.no_grad()
def likelihood(run: Run, held_out: RealText, draws: int, seed: int) -> dict[str, Any]:
    """Nats per token and bits per character: a bound with its Monte-Carlo error for flows, exact for the baseline.

    Of a run that writes nothing without being given some (flow.context.share=1) it is that of the tokens that are written, given the
    others, and `given` is the law of those. Where a run can be given the beginning of a text, `continuation` is that of the rest: of the
    second half of every row, given the first, or of what belongs to the source of a pair.
    """
    contexts, pairs = Contexts(run.config, run.manifest), bool(run.manifest["settings"].get("target_field"))
    ids, lengths, places = held_out.ids, torch.tensor([len(row) for row in held_out.rows]), torch.arange(len(held_out.rows))
    given = contexts.validation(ids, lengths, places)
    found = nats(run, held_out, draws, seed, given)
    if given is not None:
        found["given"] = run.config.flow.context.law
    if found["kind"] == "none":
        return found
    laws = context.laws(run.config.flow.context.law)
    begins = bool(laws & {"prefix", "infilling", "random"}) or pairs and "source" in laws
    if run.kind in ("autoregressive", "masked") or contexts.there and begins:
        what = "source" if pairs else "first half"
        half = torch.arange(ids.shape[1]) < (lengths // 2)[:, None]
        given = masks("source", contexts.end, ids, lengths, seed, places, -1) if pairs else half
        rest = nats(run, held_out, draws, seed, given)
        found["continuation"] = {"given": what} | {key: value for key, value in rest.items() if key != "last_cross_entropy"}
    return found


def nats(
    run: Run,
    held_out: RealText,
    draws: int,
    seed: int,
    given: torch.Tensor | None,
    of_lengths: bool = True,
    keys: list[int] | None = None,
) -> dict[str, Any]:
    """The likelihood of the tokens that are not `given` (R, L), given these; of all where that is None. `rows` has nats of each row, their
    error and tokens, for comparisons; `parts` where a bound comes from, see flow.likelihood.Parts. of_lengths: whether a row's length has
    its own likelihood, or is known. keys: of rows that are questions of their own, see model/bound.py."""
    device = run.network.weight.device
    ids = held_out.ids.to(device)
    lengths = None if held_out.lengths is None else held_out.lengths.to(device)
    given = None if given is None else given.to(device)
    law = shards.log_length_law(run.directory / SHARDS) if of_lengths else None
    end = end_of_documents(run.config, run.manifest)
    documents = None if end is None else documents_of(ids, end)
    if isinstance(run.network, Autoregressive):
        errors = torch.zeros(len(ids))
        rows, tokens, unigram = exact(run.network, ids, lengths, documents, given)
        if law is not None and given is None and run.manifest["tokenizer"]["end_id"] is None:  # nothing in a row tells its length
            rows = rows - torch.tensor([law[len(row)] for row in held_out.rows], dtype=torch.float64)
        total = int(tokens.sum())
        found: dict[str, Any] = {"kind": "exact", "nats_per_token": rows.sum().item() / total, "standard_error_nats": 0.0, "tokens": total}
        entropy = unigram / total
    else:
        progress = Progress(f"bound {run.directory.name}" + (" of the rest" if given is not None else ""), len(ids), "rows")
        facts: dict[str, Any] = {
            "progress": progress,
            "log_length": law,
            "documents": documents,
            "closing": end,
            "given": given,
            "stretches": STRETCHES,
            "keys": keys,
        }
        try:
            bound: Estimate
            if isinstance(run.network, Discrete):
                bound = discrete_bound.bound_of_rows(run.network, ids, lengths, draws, seed, **facts)
            else:
                bound = bound_of_rows(*run.flow, ids, lengths, draws, seed, **facts)
        except NoBound as error:
            return {"kind": "none", "reason": str(error)}
        rows, errors, tokens, entropy = bound.rows, bound.errors, bound.row_tokens, bound.unigram
        found = {
            "kind": "bound",
            "nats_per_token": bound.mean,
            "standard_error_nats": bound.standard_error,
            "row_error_nats": bound.row_error if math.isfinite(bound.row_error) else None,
            "last_cross_entropy": bound.last_cross_entropy,
            "tokens": bound.tokens,
        }
        assert bound.parts is not None
        found["parts"] = {"axis": "t" if isinstance(run.network, Discrete) else "log-SNR"} | asdict(bound.parts)
    found["unigram_nats_per_token"] = entropy
    found |= in_other_units(found, run, held_out, given)
    found["rows"] = {"nats": rows.tolist(), "errors": errors.tolist(), "tokens": tokens.long().tolist()}
    return found


def in_other_units(found: dict[str, Any], run: Run, held_out: RealText, given: torch.Tensor | None) -> dict[str, Any]:
    """What is in nats per token as bits per character; the likelihood in bits per byte of UTF-8 and as perplexity besides, and how many
    characters and bytes the tokens have."""
    characters, size = held_out.size_of(run, given)
    per_character, per_byte = (found["tokens"] / max(1, count) / math.log(2.0) for count in (characters, size))
    words = {
        "nats_per_token": "bits_per_char",
        "standard_error_nats": "standard_error_bits_per_char",
        "row_error_nats": "row_error_bits_per_char",
        "unigram_nats_per_token": "unigram_bits_per_char",
    }
    others = {word: None if found[name] is None else found[name] * per_character for name, word in words.items() if name in found}
    others["bits_per_byte"] = found["nats_per_token"] * per_byte
    others["perplexity_per_token"] = math.exp(min(found["nats_per_token"], 700.0))
    return others | {"characters": characters, "bytes": size}


def exact(
    network: Autoregressive, ids: torch.Tensor, lengths: torch.Tensor | None, documents: torch.Tensor | None, given: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(nats (R,) of each row, its tokens (R,), -log pi of all of them) by the baseline, of what is not given."""
    counted = torch.ones_like(ids) if lengths is None else (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    counted = (counted if given is None else counted * ~given).double()
    rows = []
    for start in range(0, len(ids), BATCH):
        part = slice(start, start + BATCH)
        some, of = (None if x is None else x[part] for x in (lengths, documents))
        read = network.read(network(ids[part], some, of))
        nll = heads.negative_log_likelihood(network.head(), read, ids[part].flatten()).double()
        rows.append((nll.view(-1, ids.shape[1]) * counted[part]).sum(1))
    unigram = -(network.log_prior.double()[ids] * counted).sum().item()
    return torch.cat(rows).cpu(), counted.sum(1).cpu(), unigram
