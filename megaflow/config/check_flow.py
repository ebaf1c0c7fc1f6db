"""What the choices of flows and of their maps forbid each other."""

from collections.abc import Callable

from megaflow.config.schema import Config, entries, keys
from megaflow.flow import choice, flow_map, interpolant, laws
from megaflow.flow.code import TRAINED
from megaflow.flow.prior import make, on_simplex
from megaflow.flow.weighting import OF_SNR

LEAST, MOST = 1e-6, 1e6
"""Temperatures of Gaussian noise."""
Refuse = Callable[..., None]
"""(sentence, names of the keys that it is about): raises ConfigError."""


def of_flow(config: Config, vocab: int | None, refuse: Refuse) -> None:
    """What a flow's choices forbid each other; with `vocab` unknown only what does not depend on it."""
    flow, model = config.flow, config.model
    if vocab is not None:
        _of_dimensions(config, vocab, refuse)
    if not interpolant.resolved(interpolant.make(flow.interpolant)):
        refuse(
            f"flow.interpolant={flow.interpolant} turns so steeply that times between 0 and 1 cannot tell its noise levels apart; "
            "use options nearer to their defaults",
            "flow.interpolant",
        )
    if on_simplex(flow.prior):
        _of_simplex(config, refuse)
    rows = config.train.global_batch
    for name, share in (("flow.context.share", flow.context.share), ("flow.self_conditioning", flow.self_conditioning)):
        if share and not round(share * rows) and not config.distill.teacher:
            few = f"{name}={share:g} of train.global_batch={rows} is no row"
            refuse(f"{few}; give {1.0 / rows:g} or more, or 0", name, "train.global_batch")
    if flow.objective == "likelihood" and flow.weighting != "none":
        refuse(
            f"flow.weighting={flow.weighting} contradicts flow.objective=likelihood: the bound has weights of its own, and with others "
            "it is none; use none, or flow.objective=endpoint_mse",
            "flow.weighting",
            "flow.objective",
        )
    if flow.times == "tokens" and flow.objective == "likelihood":
        refuse(
            "flow.objective=likelihood is a bound along one time for all tokens, and flow.times=tokens draws one for each; use rows",
            "flow.times",
            "flow.objective",
        )
    if model.time == "tokens" and (flow.times == "tokens" or flow.context.share):
        key, value = ("flow.times", "tokens") if flow.times == "tokens" else ("flow.context.share", f"{flow.context.share:g}")
        refuse(
            f"{key}={value} gives tokens of a row different times, and model.time=tokens tells one of all; use adaptive",
            key,
            "model.time",
        )
    if flow.objective == "likelihood" and flow.skip == "off" and flow.code not in ("auto", "identity"):
        refuse(
            f"flow.objective=likelihood is the bound, and flow.skip=off with flow.code={flow.code} has none; leave the skip on, or use "
            "cross_entropy",
            "flow.objective",
            "flow.skip",
        )
    if not on_simplex(flow.prior) and not LEAST <= make(flow.prior).temperature <= MOST:
        refuse(
            f"flow.prior={flow.prior} leaves no noise, or nothing but noise, at any time that can be told from 0 and 1; give a temperature "
            f"between {LEAST:g} and {MOST:g}",
            "flow.prior",
        )
    if flow.code_from and flow.code != "semantic":
        what = f"flow.code_from={flow.code_from} belongs to flow.code=semantic, not to flow.code={flow.code}"
        refuse(f"{what}; leave it empty", "flow.code_from", "flow.code")
    if flow.skip == "off" and flow.code in ("frame", "semantic") and not on_simplex(flow.prior):
        refuse(
            f"flow.skip=off contradicts flow.code={flow.code}: without the channel term a coded flow never resolves its tokens "
            "and has no bound",
            "flow.skip",
            "flow.code",
        )


def _of_dimensions(config: Config, vocab: int, refuse: Refuse) -> None:
    """What a code's dimensions must be beside this many tokens."""
    flow = config.flow
    if flow.code == "identity" and flow.code_dim != vocab:
        refuse(
            f"flow.code=identity has as many dimensions as tokens, {vocab}; flow.code_dim={flow.code_dim} contradicts it",
            "flow.code",
            "flow.code_dim",
        )
    if flow.code not in ("identity", "auto") and flow.code_dim >= vocab:
        refuse(
            f"flow.code={flow.code} needs flow.code_dim below the vocabulary of {vocab}, not {flow.code_dim}; or flow.code=identity",
            "flow.code",
            "flow.code_dim",
        )


def _of_simplex(config: Config, refuse: Refuse) -> None:
    """What has no meaning with noise on the simplex."""
    flow, model = config.flow, config.model
    what = f"flow.prior={flow.prior}"
    if flow.skip == "on" or model.input in ("belief", "both"):
        name, value = ("flow.skip", "off") if flow.skip == "on" else ("model.input", "linear")
        given = flow.skip if name == "flow.skip" else model.input
        refuse(f"{name}={given} reads a Gaussian channel, and {what} has none; use {value}, or auto", name, "flow.prior")
    if flow.objective == "likelihood":
        refuse(f"flow.objective=likelihood is the bound of Gaussian noise, and {what} has none", "flow.objective", "flow.prior")
    if not interpolant.make(flow.interpolant).convex:
        refuse(
            f"{what} is on the simplex, which flow.interpolant={flow.interpolant} leaves; use linear or power",
            "flow.interpolant",
            "flow.prior",
        )
    if flow.weighting.partition(":")[0] in OF_SNR:
        refuse(
            f"flow.weighting={flow.weighting} is of a signal in Gaussian noise, and {what} is on the simplex; use none, or balanced",
            "flow.weighting",
            "flow.prior",
        )
    if flow.clock.name != "auto" and (law := laws.gaussian_law(flow.clock.name)) and not config.distill.teacher:
        refuse(
            f"flow.clock.name={flow.clock.name}: {law} describes Gaussian noise, and {what} is on the simplex; use uniform",
            "flow.clock.name",
            "flow.prior",
        )


def of_joint(config: Config, refuse: Refuse) -> None:
    """What training a flow and its map together does not go with."""
    flow, distill, model = config.flow, config.distill, config.model
    if distill.teacher:
        refuse(
            "train.joint=true trains a map with its flow, without distill.teacher; leave one out",
            "train.joint",
            "distill.teacher",
        )
    if model.family != "flow":
        refuse(f"train.joint=true is of a flow, and model.family={model.family} is a baseline; use flow", "train.joint", "model.family")
    if distill.anchor == "teacher":
        refuse("distill.anchor=teacher contradicts train.joint=true, which has none; use data, or auto", "distill.anchor", "train.joint")
    if distill.objective.partition(":")[0] == "dmd":
        refuse("distill.objective=dmd needs a trained flow, and train.joint=true has none; use psd", "distill.objective", "train.joint")
    if flow.code in TRAINED:
        refuse(
            f"train.joint=true with flow.code={flow.code}: a trained code would follow what the map says of itself; use a fixed one, "
            "or two stages",
            "train.joint",
            "flow.code",
        )
    if flow.self_conditioning:
        refuse(
            f"train.joint=true with flow.self_conditioning={flow.self_conditioning:g}: a flow map has no earlier pass to be told of; use 0",
            "train.joint",
            "flow.self_conditioning",
        )
    if flow.times == "tokens":
        refuse("train.joint=true with flow.times=tokens: a map takes whole rows from s to t; use rows", "train.joint", "flow.times")


def of_map(config: Config, refuse: Refuse) -> None:
    """What a map needs of its rows and of its flow."""
    distill, train, model = config.distill, config.train, config.model
    parallel, what = config.parallel, f"distill.objective={distill.objective}"
    table = entries(keys()["distill.objective"])
    objective = choice.call(table, distill.objective)
    anchor = distill.anchor if distill.anchor != "auto" else "data" if train.joint else "teacher"
    if choice.split(table, distill.objective)[1].get("draws", 1.0) % 1.0:
        refuse(f"{what}: draws are a whole number", "distill.objective")
    if objective.one_step and not distill.boundary_fraction:
        refuse(
            f"{what} is of rows from 0 to 1, and distill.boundary_fraction=0 leaves none; give more, or psd",
            "distill.objective",
            "distill.boundary_fraction",
        )
    if parallel.zero == 3 and (objective.derivative or objective.loss):
        has = "forward-mode derivatives, which need" if objective.derivative else "passes that not every process makes, which needs"
        refuse(
            f"{what} has {has} whole weights; parallel.zero=3 scatters them: use 0 to 2, or psd",
            "distill.objective",
            "parallel.zero",
        )
    if parallel.compile and objective.derivative:
        refuse(f"{what} has forward-mode derivatives, which torch.compile has none of; use psd", "distill.objective", "parallel.compile")
    if distill.between == "uniform" and objective.apart:
        refuse(f"distill.between=uniform is of the semigroup identity, and {what} is not; leave it", "distill.between", "distill.objective")
    if objective.one_step and on_simplex(config.flow.prior):
        refuse(f"{what} compares scores, and flow.prior={config.flow.prior} has none; use psd", "distill.objective", "flow.prior")
    if not round(train.global_batch * distill.diagonal_fraction):
        refuse(
            f"distill.diagonal_fraction={distill.diagonal_fraction:g} leaves no row of train.global_batch={train.global_batch} with s = t, "
            f"which alone are trained towards the {anchor}; give more",
            "distill.diagonal_fraction",
            "distill.anchor",
            "train.joint",
        )
    if distill.anchor == "data" and config.flow.objective == "likelihood":
        refuse(
            "flow.objective=likelihood draws times of its own, and rows with s = t that are trained towards the data have the map's; "
            "use another objective" + ("" if train.joint else ", or distill.anchor=teacher"),
            "flow.objective",
            "train.joint",
            "distill.anchor",
        )
    if distill.surgery and parallel.zero == 3:
        refuse("distill.surgery needs whole gradients, and parallel.zero=3 scatters them; use 0 to 2", "distill.surgery", "parallel.zero")
    if objective.derivative == "loss" and parallel.recompute != "off":
        refuse(
            f"{what} has a gradient through a derivative, which nothing that is computed again has; use parallel.recompute=off",
            "distill.objective",
            "parallel.recompute",
        )
    if round(train.global_batch * distill.diagonal_fraction) == train.global_batch:
        refuse(
            f"distill.diagonal_fraction={distill.diagonal_fraction:g} leaves no row of train.global_batch={train.global_batch} "
            "for the map to learn on; give less",
            "distill.diagonal_fraction",
        )
    diagonal, boundary = flow_map.counts(train.global_batch, distill.diagonal_fraction, distill.boundary_fraction)
    if diagonal + boundary == train.global_batch:
        shares = f"distill.diagonal_fraction={distill.diagonal_fraction:g} and distill.boundary_fraction={distill.boundary_fraction:g}"
        if objective.apart:
            why = f"which alone {what} trains"
        else:
            why = "which hold the map to its flow" if objective.one_step else "of whose answers the targets of the others are made"
        refuse(
            f"{shares} leave no inner row of train.global_batch={train.global_batch}, {why}; give less, or more rows",
            "distill.diagonal_fraction",
            "distill.boundary_fraction",
            "distill.objective",
            "train.global_batch",
        )
    if distill.state_input == "hot_belief" and model.input == "linear":
        refuse(
            "distill.state_input=hot_belief needs a flow that reads beliefs, and its model.input is linear; use distill.state_input=linear",
            "distill.state_input",
            "model.input",
        )
