"""How texts are written: the sampler, its steps and its noise."""

import math
from typing import NamedTuple

from megaflow.errors import UserError
from megaflow.evaluate.loaded import Run

LAST_STEP = 0.5
"""Share of the clock that the last step of --method flow_map covers, unless asked otherwise: more steps refine the way to there."""


class Settings(NamedTuple):
    """Resolved, `steps` is None of a baseline that writes one token after another, gamma the share of fresh noise of `stochastic`, and last
    the share of the clock that the last step covers, None of an even grid. As asked for, None and auto leave a choice to `resolved`."""

    steps: int | None
    method: str = "auto"
    temperature: float = 1.0
    gamma: float | None = None
    seed: int = 0
    last: float | None = None


def check_temperature(temperature: float, option: str = "--temperature") -> None:
    if not 0.0 < temperature < math.inf:
        raise UserError(f"{option}: {temperature} is not a finite number above 0")


def resolved(run: Run, asked: Settings) -> Settings:
    """Settings after `auto`; refuses what this run cannot do. Raises UserError."""
    method, steps, gamma, last = asked.method, asked.steps, asked.gamma, asked.last
    if run.kind in ("masked", "uniform"):
        if method not in ("auto", "ancestral") or gamma is not None or last is not None:
            family = f"model.family={run.kind}"
            raise UserError(f"{run.directory} is a baseline ({family}): it takes --steps, and no other --method, --last or --gamma")
        if steps is not None and steps < 1:
            raise UserError(f"--steps: {steps} is not a positive number of steps")
        return asked._replace(method="ancestral", steps=steps or 64)
    if run.parts is None:
        if method != "auto" or any(given is not None for given in (steps, gamma, last)):
            raise UserError(
                f"{run.directory} is autoregressive: it writes one token after another and takes no --method, --steps, --last or --gamma"
            )
        return asked._replace(method="autoregressive")
    if method == "auto":
        method = "stochastic" if gamma is not None else ("flow_map" if run.is_map else "ode")
    if method == "flow_map" and not run.is_map:
        raise UserError(f"{run.directory} is a flow, not a flow map: use --method ode, stochastic or ancestral, or distill it first")
    if method in ("stochastic", "ancestral") and run.parts.prior.law != "gaussian":
        raise UserError(
            f"--method {method} adds Gaussian noise, and {run.directory} has flow.prior={run.parts.prior.name}; use ode or flow_map"
        )
    if gamma is not None and method != "stochastic":
        raise UserError(f"--gamma belongs to --method stochastic, not {method}")
    if method == "stochastic":
        gamma = 0.75 if gamma is None else gamma
        if not 0.0 <= gamma <= 1.0:
            raise UserError(f"--gamma: {gamma} is not between 0 and 1")
    steps = (1 if run.is_map else 64) if steps is None else steps
    if steps < 1:
        raise UserError(f"--steps: {steps} is not a positive number of steps")
    if last is not None and steps == 1:
        raise UserError("--last: with one step there is no other for the last one to differ from; give --steps 2 or more")
    if last is not None and not 0.0 < last < 1.0:
        raise UserError(f"--last: {last} is not a share of the clock between 0 and 1")
    if steps == 1 and method != "ancestral" and asked.temperature != 1.0:
        raise UserError(f"--temperature: one step of {method} is an argmax, which no temperature changes; give --steps 2 or more")
    last = last_step(method, steps) if last is None else last
    return Settings(steps, method, asked.temperature, gamma, asked.seed, last)


def last_step(method: str, steps: int | None) -> float | None:
    """Share of the clock that the last step covers unless asked otherwise; None: as much as any other."""
    return LAST_STEP if method == "flow_map" and steps is not None and steps > 1 else None
