"""Samplers with exact models: what they leave at every grid time, and the tokens they end on, have exactly the flow's law.

One position: the law of the state at time t is the mixture sum_k p_k N(t e_k, (1 - t)^2), whose projection on e_0 - e_1 has a
distribution function in closed form; the exact flow map is integrated numerically.
"""

import math

import pytest
import torch
from torch import Tensor

from megaflow.flow import code as codes
from megaflow.flow import interpolant, sampler
from megaflow.flow.interpolant import LINEAR, Interpolant
from megaflow.flow.sampler import Posterior
from tests.flow import toy as toys

LAW = [0.5, 0.3, 0.2]
TOY = toys.single(LAW)
TIMES = [0.0, 0.35, 0.55, 0.75, 1.0]
FINE = [0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0]
COUNT = 16_000


def posterior_of(psi: Tensor, matrix: Tensor) -> Posterior:
    confidence, tokens = psi.max(-1)
    return Posterior(psi @ matrix, tokens, confidence)


def exact_map(toy: toys.Toy, steps: int = 16):
    return lambda y, s, t: posterior_of(toys.mean_denoiser(toy, y, s, t, steps), toy.matrix)


def exact_denoiser(toy: toys.Toy):
    return lambda y, s, t: posterior_of(toys.denoiser(toy, y, s), toy.matrix)


def watched(denoise, seen: dict[float, Tensor]):
    """The same model; what it was asked about is kept by time."""

    def ask(y: Tensor, s: float, t: float) -> Posterior:
        seen[s] = y
        return denoise(y, s, t)

    return ask


def noise_of(seed: int, shape: tuple[int, ...]):
    """`noise(step)` of a sampler, and the initial state."""

    def noise(step: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + step + 1), dtype=torch.float64)

    return noise, torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed), dtype=torch.float64)


def ks(y: Tensor, t: float) -> float:
    """sqrt(n) times the Kolmogorov distance of (e_0 - e_1) . y from its law at time t; above 1.95 once in a thousand."""
    x = (y[:, 0, 0] - y[:, 0, 1]).sort().values
    means = t * torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    cdf = (torch.tensor(LAW) * torch.special.ndtr((x[:, None] - means) / (math.sqrt(2.0) * (1.0 - t)))).sum(1)
    rank = torch.arange(len(x), dtype=torch.float64) / len(x)
    return math.sqrt(len(x)) * torch.maximum((cdf - rank).max(), (rank + 1.0 / len(x) - cdf).max()).item()


def moments_off(y: Tensor, t: float) -> float:
    """Largest deviation of mean and covariance of y from those of p_t, in standard errors."""
    law, flat = torch.tensor(LAW, dtype=torch.float64), y[:, 0]
    mean, covariance = t * law, t**2 * (law.diag() - law[:, None] * law) + (1.0 - t) ** 2 * torch.eye(3)
    centred = flat - mean
    products = centred[:, :, None] * centred[:, None]
    by_mean = (centred.mean(0) / centred.std(0)).abs().max()
    by_covariance = ((products.mean(0) - covariance) / products.std(0)).abs().max()
    return math.sqrt(len(y)) * max(by_mean.item(), by_covariance.item())


def law_off(tokens: Tensor, law: Tensor) -> float:
    """Pearson's chi-square of token counts against a law, over its degrees of freedom."""
    counts, expected = torch.bincount(tokens.flatten(), minlength=len(law)), tokens.numel() * law
    return ((counts - expected) ** 2 / expected).sum().item() / (len(law) - 1)


def on_line(path: Interpolant, t: float) -> tuple[float, float]:
    """(size, time) of a path's state at t on the linear path: y / size is the linear state of that time."""
    alpha, beta = (f(torch.tensor(t, dtype=torch.float64)).item() for f in (path.alpha, path.beta))
    return alpha + beta, beta / (alpha + beta)


def along(path: Interpolant, denoise):
    """A model of the linear path as one of another."""

    def ask(y: Tensor, s: float, t: float) -> Posterior:
        size, start = on_line(path, s)
        return denoise(y / size, start, on_line(path, t)[1])

    return ask


PATHS = [("linear", 0.0), ("linear", 0.5), ("linear", 0.75), ("linear", 1.0), ("trigonometric", 0.75), ("power", 0.5)]


@pytest.mark.parametrize(("name", "gamma"), PATHS)
def test_the_stochastic_sampler_keeps_the_marginal_at_every_grid_time(name, gamma):
    path, seen = interpolant.make(name), {}
    noise, y = noise_of(1, (COUNT, 1, 3))
    tokens = sampler.stochastic(watched(along(path, exact_map(TOY)), seen), path, y, FINE, gamma, noise)
    assert list(seen) == FINE[:-1]
    for t, state in seen.items():
        size, time = on_line(path, t)
        assert ks(state / size, time) < 1.95 and moments_off(state / size, time) < 4.0
    assert law_off(tokens, torch.tensor(LAW)) < 6.9  # once in a thousand


def published_stochastic(denoise, y: Tensor, times: list[float], gamma: float, noise) -> None:
    """Consistency trajectory sampling as published: keep the noise that the endpoint implies, in part, and add fresh noise."""
    for step, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
        end = denoise(y, s, 1.0 - math.sqrt(1.0 - gamma**2) * (1.0 - t)).mean
        old = (y - s * end) / (1.0 - s)
        y = t * end + (1.0 - t) * (math.sqrt(1.0 - gamma**2) * old + gamma * noise(step))


def test_the_published_stochastic_form_is_seen_to_be_off():
    """The measures above are sharp enough: they refuse a form whose variance is a few per cent too high."""
    seen: dict[float, Tensor] = {}
    noise, y = noise_of(1, (COUNT, 1, 3))
    published_stochastic(watched(exact_map(TOY), seen), y, FINE, 0.75, noise)
    assert max(moments_off(state, t) for t, state in seen.items()) > 6.0


def test_without_noise_the_stochastic_sampler_is_the_flow_map():
    noise, y = noise_of(2, (50, 1, 3))
    seen, plain = {}, {}
    tokens = sampler.stochastic(watched(exact_map(TOY), seen), LINEAR, y, TIMES, 0.0, noise)
    assert torch.equal(tokens, sampler.flow_map(watched(exact_map(TOY), plain), LINEAR, y, TIMES))
    for t in plain:
        torch.testing.assert_close(seen[t], plain[t])


@pytest.mark.parametrize("times", [TIMES, [0.0, 0.6, 1.0], [0.0, 1.0]], ids=["four steps", "two steps", "one step"])
@pytest.mark.parametrize("name", ["linear", "variance_preserving"])
def test_the_ancestral_sampler_is_exact_on_any_grid_at_one_position(times, name):
    path, seen = interpolant.make(name, 1.5), {}
    noise, y = noise_of(3, (COUNT, 1, 3))
    source = torch.Generator().manual_seed(7)

    def drawing(y: Tensor, s: float, t: float) -> Posterior:
        psi = toys.denoiser(TOY, y, s)
        tokens = torch.multinomial(psi[:, 0], 1, generator=source)
        return Posterior(psi, tokens, psi.gather(2, tokens[..., None])[..., 0])

    tokens = sampler.ancestral(watched(along(path, drawing), seen), path, lambda ids: TOY.matrix[ids], y, times, noise)
    for t, state in seen.items():
        size, time = on_line(path, t)
        assert t == 0.0 or (ks(state / size, time) < 1.95 and moments_off(state / size, time) < 4.0)
    assert law_off(tokens, torch.tensor(LAW)) < 6.9


@pytest.mark.parametrize("code", [codes.identity(4), codes.frame(5, 3, torch.Generator().manual_seed(1))], ids=["identity", "frame"])
def test_the_exact_map_writes_the_same_text_in_any_number_of_steps(code):
    """One step, two or four: the same tokens from the same noise, but where two are all but equally likely."""
    toy = toys.make(code, length=2, seed=2)
    _, y = noise_of(4, (500, 2, toy.matrix.shape[1]))
    one, two, four = (sampler.flow_map(exact_map(toy, 200), LINEAR, y, times) for times in ([0.0, 1.0], [0.0, 0.5, 1.0], TIMES))
    assert (one == two).double().mean() > 0.998 and (one == four).double().mean() > 0.998
    for position in range(2):
        assert law_off(one[:, position], toy.marginal[position]) < 4.7  # three or four degrees of freedom, once in a thousand


def test_the_flow_map_writes_the_joint_law_of_texts():
    """For a law of pairs far from independent: 90 % of the weight on two texts."""
    law = torch.tensor([0.45, 0.05, 0.05, 0.45], dtype=torch.float64)
    toy = toys.Toy(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]), law, torch.eye(2, dtype=torch.float64))
    noise, y = noise_of(5, (4000, 2, 2))
    tokens = sampler.flow_map(exact_map(toy, 200), LINEAR, y, [0.0, 1.0])
    assert law_off(2 * tokens[:, 0] + tokens[:, 1], law) < 5.4
    one_step_of_the_flow = sampler.ode(exact_denoiser(toy), LINEAR, y, [0.0, 1.0])
    assert len(one_step_of_the_flow.unique(dim=0)) == 1  # the denoiser at time zero has seen nothing: the same text always


def test_the_ode_with_many_steps_is_the_flow_map():
    toy = toys.make(codes.identity(4), length=2, seed=2)
    _, y = noise_of(6, (500, 2, 4))
    exact = sampler.flow_map(exact_map(toy, 300), LINEAR, y, [0.0, 1.0])
    many, few = (sampler.ode(exact_denoiser(toy), LINEAR, y, torch.linspace(0.0, 1.0, n + 1).tolist()) for n in (400, 4))
    assert (many == exact).double().mean() > 0.99 > (few == exact).double().mean()


def test_the_ode_asks_for_the_diagonal_and_moves_by_eulers_method():
    asked = []
    _, y = noise_of(7, (5, 1, 3))

    def denoise(y: Tensor, s: float, t: float) -> Posterior:
        asked.append((s, t, y))
        return exact_denoiser(TOY)(y, s, t)

    sampler.ode(denoise, LINEAR, y, TIMES)
    assert [(s, t) for s, t, _ in asked] == [(s, s) for s in TIMES[:-1]]
    for (s, _, before), (t, _, after) in zip(asked[:-1], asked[1:], strict=True):
        torch.testing.assert_close(after, before + (t - s) * toys.velocity(TOY, before, s))


def test_one_step_is_an_argmax_all_of_whose_randomness_is_in_the_noise():
    _, y = noise_of(8, (200, 1, 3))
    for method in (sampler.ode, sampler.flow_map):
        assert torch.equal(*(method(exact_map(TOY), LINEAR, y, [0.0, 1.0]) for _ in range(2)))
    tokens = sampler.flow_map(exact_map(TOY), LINEAR, y, [0.0, 1.0])
    assert torch.equal(tokens, toys.mean_denoiser(TOY, y, 0.0, 1.0, 16).argmax(-1)) and len(tokens.unique()) == 3


@pytest.mark.parametrize("method", ["ode", "flow_map", "stochastic", "ancestral"])
def test_the_callback_sees_each_step(method):
    noise, y = noise_of(9, (6, 1, 3))
    steps = []

    def callback(step: int, time: float, posterior: Posterior) -> None:
        assert posterior.mean.shape == y.shape and posterior.tokens.shape == posterior.confidence.shape == (6, 1)
        steps.append((step, time, posterior.tokens))

    model = exact_map(TOY)
    tokens = {
        "ode": lambda: sampler.ode(model, LINEAR, y, TIMES, callback),
        "flow_map": lambda: sampler.flow_map(model, LINEAR, y, TIMES, callback),
        "stochastic": lambda: sampler.stochastic(model, LINEAR, y, TIMES, 0.75, noise, callback),
        "ancestral": lambda: sampler.ancestral(model, LINEAR, lambda ids: TOY.matrix[ids], y, TIMES, noise, callback),
    }[method]()
    assert [(step, time) for step, time, _ in steps] == list(enumerate(TIMES[:-1]))
    assert torch.equal(steps[-1][2], tokens)  # what is returned is what the last step was most sure of


def test_tokens_that_are_drawn_follow_the_posterior_and_not_its_largest_entry():
    """The ancestral sampler returns the tokens that its model drew, in its last step too."""
    noise, y = noise_of(10, (4, 1, 3))
    always = Posterior(torch.zeros_like(y), torch.full((4, 1), 2), torch.full((4, 1), 0.2))
    assert (sampler.ancestral(lambda y, s, t: always, LINEAR, lambda ids: TOY.matrix[ids], y, TIMES, noise) == 2).all()
