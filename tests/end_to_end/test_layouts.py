"""The same run on any layout: tensor x data processes and what ZeRO shards change no loss, and a run moves from any to any other.

One process is the oracle. `make test` runs a set in which every layout, every ZeRO stage and every kind of training comes up; `make
test-all` every layout under every ZeRO stage for every kind of training.
"""

import itertools
import shutil

import pytest

from megaflow.train import checkpoint as checkpoints
from megaflow.train import run as runs
from megaflow.train.run import read_config
from tests.layout_job import layout, same_curve, train, train_sharded

COVER = [
    ("coded", "flow", 2, 1, 0),
    ("coded", "flow", 1, 2, 3),
    ("coded", "autoregressive", 4, 1, 1),
    pytest.param("documents", "autoregressive", 2, 2, 3, marks=pytest.mark.long),
    ("char", "flow", 1, 4, 1),
    ("char", "flow_map", 1, 2, 2),
]
SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
KINDS = [
    ("coded", "flow"),
    ("char", "flow"),
    ("coded", "autoregressive"),
    ("char", "autoregressive"),
    ("coded", "flow_map"),
    ("char", "flow_map"),
]
ALL = [(*kind, *shape, zero) for kind, shape, zero in itertools.product(KINDS, SHAPES, range(4))]
REST = [pytest.param(*each, marks=pytest.mark.long) for each in ALL if each not in COVER]
MOVES = [
    # from tensor x data, ZeRO, to tensor x data, ZeRO
    pytest.param("coded", "flow", (2, 2, 1), (1, 1, 0), marks=pytest.mark.long),
    ("coded", "flow", (1, 1, 0), (4, 1, 2)),
    pytest.param("coded", "flow", (1, 4, 3), (2, 1, 3), marks=pytest.mark.long),
    ("coded", "autoregressive", (4, 1, 3), (1, 2, 1)),
    ("char", "flow_map", (1, 2, 2), (2, 2, 0)),
    pytest.param("coded", "flow_map", (2, 1, 0), (1, 4, 3), marks=pytest.mark.long),
]


@pytest.mark.parametrize("kind, family, tensor, data, zero", COVER + REST)
def test_any_layout_has_the_losses_of_one_process(ranks, words, alone, workspace, kind, family, tensor, data, zero):
    name = f"{kind}-{family}-{tensor}x{data}-zero{zero}"
    ranks(tensor * data, train, words(kind, family, name, *layout(20, tensor, data, zero)))
    same_curve(workspace / name, alone(kind, family, 20), 20)
    start = runs.read_json(workspace / name / "run.json")["starts"][0]
    assert start["processes"] == tensor * data and start["parallel"]["tensor"] == tensor


WAYS = {
    "gathered ahead": {"param_persistence_threshold": 0},
    "gathered anew for each use": {"param_persistence_threshold": 0, "max_reuse_distance": 0, "prefetch_bucket_size": 0},
    "some of it ahead": {"param_persistence_threshold": 500, "max_reuse_distance": 5000, "prefetch_bucket_size": 2000},
}


@pytest.mark.parametrize(
    "kind, family, tensor, data",
    [
        ("coded", "flow_map", 1, 2),
        *(
            pytest.param(*kind, *shape, marks=pytest.mark.long)
            for kind, shape in itertools.product(KINDS, [(1, 2), (2, 2), (1, 4)])
            if (*kind, *shape) != ("coded", "flow_map", 1, 2)
        ),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_a_network_of_which_no_weight_stays_whole(ranks, words, alone, workspace, way, kind, family, tensor, data):
    """Under ZeRO 3 DeepSpeed leaves weights of less than 100,000 elements on every process, which here are all."""
    name = f"{kind}-{family}-{tensor}x{data}-{way.replace(' ', '-')}"
    ranks(tensor * data, train_sharded, words(kind, family, name, *layout(8, tensor, data, 3)), WAYS[way])
    same_curve(workspace / name, alone(kind, family, 8), 8)


@pytest.mark.parametrize("way", [next(iter(WAYS)), *(pytest.param(way, marks=pytest.mark.long) for way in list(WAYS)[1:])])
def test_a_trained_code_of_which_nothing_stays_whole(ranks, words, alone, workspace, way):
    """What its rows go into comes before the network, and its gradient after the network's."""
    options, name = DESIGNS["learned code"], f"trained-code-{way.replace(' ', '-')}"
    ranks(2, train_sharded, words("coded", "flow", name, *layout(8, 1, 2, 3), *options), WAYS[way])
    same_curve(workspace / name, alone("coded", "flow", 8, *options), 8)


@pytest.mark.parametrize("kind, family, source, target", MOVES)
def test_a_run_moves_to_any_other_layout(ranks, words, alone, workspace, kind, family, source, target):
    """Four steps in one layout, four in another, by the same command with other parallel.*: the curve of one process all along."""
    name = f"moved-{kind}-{family}-" + "-".join(map(str, source + target))
    ranks(source[0] * source[1], train, words(kind, family, name, *layout(8, *source)))
    directory = workspace / name
    (directory / "summary.json").unlink()
    shutil.rmtree(checkpoints.folder(directory, 8))
    ranks(target[0] * target[1], train, words(kind, family, name, *layout(8, *target)))
    same_curve(directory, alone(kind, family, 8), 8)
    starts = runs.read_json(directory / "run.json")["starts"]
    assert [(start["step"], start["processes"]) for start in starts] == [(0, source[0] * source[1]), (4, target[0] * target[1])]


@pytest.mark.parametrize("options", [("parallel.recompute=selective",), ("parallel.recompute=full",), ("parallel.offload=optimizer",)])
@pytest.mark.parametrize(
    "tensor, data, zero",
    [(2, 1, 1), *(pytest.param(*each, marks=pytest.mark.long) for each in ((1, 2, 3), (2, 2, 1), (2, 2, 2), (2, 2, 3)))],
)
def test_options_change_no_loss(ranks, words, alone, workspace, options, tensor, data, zero):
    name = f"option-{tensor}{data}{zero}-" + "-".join(options)
    ranks(tensor * data, train, words("coded", "flow", name, *layout(8, tensor, data, zero), *options))
    same_curve(workspace / name, alone("coded", "flow", 8), 8)


DESIGNS = {
    "mse": ("flow.objective=endpoint_mse", "flow.weighting=adaptive", "flow.interpolant=trigonometric"),
    "likelihood": ("flow.objective=likelihood",),
    "learned": ("flow.weighting=learned", "flow.clock.name=cdcd"),
    "vertices": ("flow.prior=vertices",),
    "dirichlet": ("flow.prior=dirichlet", "flow.interpolant=power:exponent=2"),
    "dense dirichlet": ("flow.prior=dirichlet", "flow.code=identity"),
    "dense mse": ("flow.objective=velocity_mse", "flow.code=identity", "flow.weighting=adaptive"),
    "learned code": ("flow.code=learned", "model.input=both"),
    "published": ("flow.code=learned", "model.input=linear", "flow.skip=off"),
    "embedding": ("flow.code=embedding", "flow.objective=likelihood"),
    "semantic": ("flow.code=semantic",),
    "another trunk": ("model.time=none", "model.qk_norm=false", "model.head=tied", "model.belief_dim=auto"),
    "beside the text": ("model.time=tokens", "model.registers=4"),
    "told before": ("flow.self_conditioning=0.5", "flow.objective=endpoint_mse"),
    "told before, dense": ("flow.self_conditioning=0.25", "flow.code=identity"),
    "token times": ("flow.times=tokens", "flow.weighting=learned", "model.registers=4", "flow.objective=endpoint_mse"),
    "contexts": ("flow.context.share=0.5", "model.input=both"),
    "all given something": ("flow.context.share=1", "flow.context.law=infilling", "flow.code=learned"),
    "hidden tokens": ("model.family=masked", "model.time=none"),
    "replaced tokens": ("model.family=uniform", "model.head=tied", "model.belief_dim=auto"),
    "joint": ("train.joint=true", "flow.weighting=learned", "distill.weighting=learned", "distill.between=uniform"),
    "joint, tied": ("train.joint=true", "model.head=tied", "model.belief_dim=auto", "flow.objective=endpoint_mse"),
    "joint, dense": ("train.joint=true", "flow.code=identity", "model.input=linear", "flow.context.share=0.5"),
    "by noise": ("flow.weighting=min_snr", "flow.clock.name=gumbel", "flow.interpolant=variance_preserving"),
    "by signal": ("flow.weighting=truncated", "flow.clock.name=mixture:argmax=0.9,uniform=0.1"),
    "by both": ("flow.weighting=sigmoid", "flow.clock.name=logit_normal"),
    "hot noise": ("flow.prior=gaussian:temperature=2", "flow.weighting=balanced", "flow.clock.name=argmax_code"),
}
"""Corners of the design space in which something is computed in parts of its own."""
SHORT = [
    ("mse", 2, 1, 1),
    ("learned", 1, 2, 2),
    ("dense dirichlet", 2, 1, 0),
    ("learned code", 2, 1, 1),
    ("beside the text", 2, 1, 1),
    ("token times", 2, 1, 1),
    ("joint", 2, 1, 1),
    ("hidden tokens", 2, 1, 1),
    ("replaced tokens", 1, 2, 3),
]


@pytest.mark.parametrize(
    "design, tensor, data, zero",
    [
        *SHORT,
        *(
            pytest.param(design, *shape, marks=pytest.mark.long)
            for design, shape in itertools.product(DESIGNS, [(2, 1, 1), (1, 2, 2), (1, 2, 3), (2, 2, 0)])
            if (design, *shape) not in SHORT
        ),
    ],
)
def test_every_design_has_the_losses_of_one_process(ranks, words, alone, workspace, design, tensor, data, zero):
    name = f"design-{design.replace(' ', '-')}-{tensor}{data}{zero}"
    ranks(tensor * data, train, words("coded", "flow", name, *layout(8, tensor, data, zero), *DESIGNS[design]))
    same_curve(workspace / name, alone("coded", "flow", 8, *DESIGNS[design]), 8)


@pytest.mark.parametrize("zero, tensor", [(1, 2), pytest.param(3, 1, marks=pytest.mark.long), pytest.param(2, 1, marks=pytest.mark.long)])
def test_a_map_of_a_flow_that_is_given_tokens(ranks, words, alone, workspace, zero, tensor):
    teacher = f"distill.teacher={alone('coded', 'flow', 8, *DESIGNS['contexts'])}"
    name = f"given-map-{tensor}-{zero}"
    ranks(2, train, words("coded", "flow_map", name, *layout(8, tensor, 2 // tensor, zero), teacher))
    same_curve(workspace / name, alone("coded", "flow_map", 8, teacher), 8)
    config = read_config(workspace / name).config
    assert config.flow.context.share == 0.5  # the teacher's


@pytest.mark.parametrize(
    "objective, zero, tensor",
    [
        pytest.param("esd", 1, 2, marks=pytest.mark.long),
        ("lsd_cfm", 2, 1),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in itertools.product(["fmlm_mse", "lsd", "esd", "lsd_cfm", "ecld"], [0, 2], [2, 1])
            if each != ("lsd_cfm", 2, 1)
        ),
    ],
)
def test_every_objective_of_stage_2_has_the_losses_of_one_process(ranks, words, alone, workspace, objective, zero, tensor):
    name, own = f"objective-{objective}-{zero}{tensor}", f"distill.objective={objective}"
    ranks(2, train, words("coded", "flow_map", name, *layout(8, tensor, 2 // tensor, zero), own))
    same_curve(workspace / name, alone("coded", "flow_map", 8, own), 8, tolerance=1e-3)


@pytest.mark.parametrize(
    "tensor, data, zero, surgery",
    [
        (2, 1, 1, "false"),
        *(pytest.param(*each, marks=pytest.mark.long) for each in ((1, 2, 2, "false"), (1, 2, 2, "true"), (2, 1, 0, "true"))),
    ],
)
def test_joint_training_by_a_residual_has_the_losses_of_one_process(ranks, words, alone, workspace, tensor, data, zero, surgery):
    own = ["train.joint=true", "distill.objective=lsd_cfm", "distill.times=end", f"distill.surgery={surgery}"]
    name = f"joint-residual-{tensor}{data}{zero}-{surgery}"
    ranks(2, train, words("coded", "flow", name, *layout(8, tensor, data, zero), *own))
    same_curve(workspace / name, alone("coded", "flow", 8, *own), 8, tolerance=1e-3)


MAP_DESIGNS = {
    "towards the data": ("distill.anchor=data", "distill.weighting=learned"),
    "surgery": ("distill.surgery=true", "train.micro_batch=2"),
    "laws": ("distill.objective=dmd:draws=2", "distill.boundary_fraction=0.25"),
    "surgery towards the data": ("distill.surgery=true", "distill.anchor=data", "distill.objective=lsd_cfm"),
}


@pytest.mark.parametrize(
    "design, zero, tensor",
    [
        ("surgery", 1, 2),
        ("surgery", 2, 1),
        ("towards the data", 3, 1),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in itertools.product(MAP_DESIGNS, [0, 1, 2, 3], [2, 1])
            if each not in [("surgery", 1, 2), ("surgery", 2, 1), ("towards the data", 3, 1)]
            and (each[1] < 3 or each[0] == "towards the data")
        ),
    ],
)
def test_every_design_of_stage_2_has_the_losses_of_one_process(ranks, words, alone, workspace, design, zero, tensor):
    name = f"map-design-{design.replace(' ', '-')}-{zero}{tensor}"
    ranks(2, train, words("coded", "flow_map", name, *layout(8, tensor, 2 // tensor, zero), *MAP_DESIGNS[design]))
    same_curve(workspace / name, alone("coded", "flow_map", 8, *MAP_DESIGNS[design]), 8, tolerance=1e-3)
    cosines = [
        [line.get("gradient_cosine") for line in runs.lines(run / "metrics.jsonl") if "loss" in line]
        for run in (workspace / name, alone("coded", "flow_map", 8, *MAP_DESIGNS[design]))
    ]
    assert cosines[0] == [None if x is None else pytest.approx(x, abs=2e-3) for x in cosines[1]]


@pytest.mark.parametrize("family, tensor, zero", [("flow", 2, 0), ("autoregressive", 1, 3)])
def test_documents_that_do_not_see_each_other(ranks, words, alone, workspace, family, tensor, zero):
    """With soft-capped scores and padding of the vocabulary as well."""
    options = "data.mask_documents=true", "model.softcap=5"
    name = f"masked-{family}-{tensor}"
    ranks(2, train, words("coded", family, name, *layout(8, tensor, 2 // tensor, zero), *options, "parallel.vocab_multiple=8"))
    same_curve(workspace / name, alone("coded", family, 8, *options), 8)
    assert runs.lines(workspace / name / "metrics.jsonl")[3]["loss"] != runs.lines(alone("coded", family, 8) / "metrics.jsonl")[3]["loss"]


@pytest.mark.parametrize("family, tensor, zero", [("flow", 2, 1), ("autoregressive", 1, 3)])
def test_bf16_in_parts(ranks, words, alone, workspace, family, tensor, zero):
    """To what bf16 holds: partial sums are rounded at other places."""
    name = f"bf16-{family}-{tensor}{zero}"
    ranks(2, train, words("coded", family, name, *layout(8, tensor, 2 // tensor, zero), "train.precision=bf16"))
    same_curve(workspace / name, alone("coded", family, 8, "train.precision=bf16"), 8, tolerance=2e-2)


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, family, tensor, data, zero, recompute",
    [
        ("coded", "flow", 1, 1, 0, "off"),
        ("coded", "flow", 2, 1, 1, "selective"),
        ("coded", "flow", 1, 2, 3, "full"),
        ("coded", "flow", 2, 2, 2, "off"),
        ("char", "flow", 2, 2, 3, "selective"),
        ("coded", "autoregressive", 2, 2, 3, "full"),
        ("coded", "autoregressive", 4, 1, 0, "off"),
        ("coded", "flow_map", 2, 2, 1, "full"),
    ],
)
def test_compiled_blocks_have_the_same_losses(ranks, words, alone, workspace, kind, family, tensor, data, zero, recompute):
    name = f"compiled-{kind}-{family}-{tensor}{data}{zero}"
    options = "parallel.compile=true", f"parallel.recompute={recompute}"
    ranks(tensor * data, train, words(kind, family, name, *layout(8, tensor, data, zero), *options))
    same_curve(workspace / name, alone(kind, family, 8), 8)


@pytest.mark.long
@pytest.mark.parametrize("kind, family", [("coded", "flow"), ("coded", "flow_map")])
def test_bf16_offloaded_over_both_axes(ranks, words, alone, workspace, kind, family):
    name = f"bf16-offloaded-{family}"
    options = "train.precision=bf16", "parallel.offload=optimizer"
    ranks(4, train, words(kind, family, name, *layout(8, 2, 2, 2), *options))
    same_curve(workspace / name, alone(kind, family, 8, "train.precision=bf16"), 8, tolerance=3e-2)
