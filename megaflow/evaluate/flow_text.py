"""Text from a flow or a flow map: a grid of its clock, and one of the samplers."""

from collections.abc import Callable

import torch
from torch import Tensor

from megaflow.errors import UserError
from megaflow.evaluate.loaded import Run
from megaflow.evaluate.settings import Settings
from megaflow.evaluate.template import Template
from megaflow.flow import choice, laws, sampler
from megaflow.flow import clock as clocks
from megaflow.flow import head as heads
from megaflow.flow import profile as profiles
from megaflow.flow.clock import Clock
from megaflow.flow.code import lookup
from megaflow.flow.context import told
from megaflow.flow.sampler import Callback, Posterior
from megaflow.model.parts import draw_noise
from megaflow.parallel import random

BATCH = 64
"""Rows that are written at a time."""


def grid_clock(run: Run, name: str) -> Clock:
    """The clock of a law by name, fitted to what the run has measured. Raises UserError."""
    if run.parts is None:
        raise UserError(f"--clock: {run.directory} is a baseline (model.family={run.kind}) and has no clock")
    profile = profiles.kept(run.kept)
    try:
        if run.parts.prior.law != "gaussian" and (law := laws.gaussian_law(name)):
            prior = run.parts.prior.name
            raise UserError(f"--clock {name}: {law} describes Gaussian noise, and {run.directory} has flow.prior={prior}; use uniform")
        return choice.call(laws.LAWS, name, laws.Measured(run.parts.path, run.parts.code.vocab, profile))
    except choice.ChoiceError as error:
        raise UserError(f"--clock must be {error}") from None
    except laws.NotMeasured as error:
        raise UserError(f"--clock {name} is fitted to {error}; use uniform or logit_normal, or the clock of training, auto") from None


def write(
    run: Run,
    settings: Settings,
    places: list[int],
    lengths: list[int] | None,
    template: Template | None,
    tick: Callable[[], None],
    see: Callback,
    offset: Tensor | None,
) -> Tensor:
    """(B, L) tokens by one of the samplers, on steps of the run's clock. `offset` is added to log-probabilities before tokens are taken."""
    method, seed = settings.method, settings.seed
    assert settings.steps is not None
    network, parts, clock = run.flow
    device = network.weight.device
    shape = (run.manifest["length"], parts.code.dim)
    counted = None if lengths is None else torch.tensor(lengths, device=device)

    def fresh(step: int) -> Tensor:
        return random.normal(places, shape, seed, "sampler noise", step).to(device)

    denoise = denoiser(run, settings, places, counted, template, tick, offset)
    path = parts.path
    y = path.scale * draw_noise(parts, places, shape[0], seed, "initial noise")
    times = clocks.grid(clock, settings.steps, settings.last).tolist()
    if method == "ode":
        return sampler.ode(denoise, path, y, times, see)
    if method == "flow_map":
        return sampler.flow_map(denoise, path, y, times, see)
    if method == "stochastic":
        assert settings.gamma is not None
        towards = denoise if run.is_map else (lambda y, s, t: denoise(y, s, s))
        return sampler.stochastic(towards, path, y, times, settings.gamma, fresh, see)
    return sampler.ancestral(denoise, path, lambda ids: lookup(parts.code, ids), y, times, fresh, see)


def denoiser(
    run: Run,
    settings: Settings,
    places: list[int],
    lengths: Tensor | None,
    template: Template | None,
    tick: Callable[[], None],
    offset: Tensor | None,
) -> Callable[[Tensor, float, float], Posterior]:
    """The network as samplers see it. For the ancestral one tokens are drawn from the posterior; for others they are its most likely ones,
    after `offset`. A network that recalls is told what it said a step before. What a template gives is clean in every state that the
    network sees, and certain in what it says."""
    network, parts, _ = run.flow
    known, given = (None, None) if template is None else template.rows(places, network.weight.device)
    clean = None if known is None else lookup(parts.code, known)
    calls = iter(range(10**9))
    said: list[Tensor | None] = [None]

    def denoise(y: Tensor, s: float, t: float) -> Posterior:
        start, end = (told(torch.full((len(y),), x, dtype=torch.float64, device=y.device), given) for x in (s, t))
        if clean is not None and given is not None:
            y = torch.where(given[..., None], clean, y)
        hidden = network(y, start, end if run.is_map else None, lengths, said=said[0])
        read, shape = network.read(hidden, y, start), y.shape[:2]
        mean, tokens, confidence = heads.posterior(network.head(), read, settings.temperature, offset)
        if settings.method == "ancestral":
            step = next(calls)
            uniform = torch.stack(
                [torch.rand(shape[1], generator=random.generator(settings.seed, "token draws", step, place)) for place in places]
            )
            tokens, confidence = heads.draw(network.head(), read, uniform.flatten().to(y.device), settings.temperature)
        tick()
        said[0] = mean.view(y.shape) if network.recall is not None else None
        found = Posterior(mean.view(y.shape), tokens.view(shape), confidence.view(shape))
        if clean is None or known is None or given is None:
            return found
        certain = torch.where(given, 1.0, found.confidence)
        return Posterior(torch.where(given[..., None], clean, found.mean), torch.where(given, known, found.tokens), certain)

    return denoise
