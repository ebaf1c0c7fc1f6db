"""Networks from configs: what the config names is what is built."""

import numpy as np
import pytest
import torch

from megaflow.config.schema import Config
from megaflow.model import build
from megaflow.model import parts as made

CPU = torch.device("cpu")


@pytest.fixture
def config():
    """A resolved config: no `auto` is left."""
    config = Config()
    config.model.layers, config.model.hidden, config.model.heads, config.model.belief_dim = 3, 16, 2, 8
    config.model.neighbors, config.model.input = 1, "belief"
    config.flow.code, config.flow.code_dim, config.flow.skip = "frame", 4, "on"
    return config


@pytest.fixture
def parts(config):
    return made.make(config.flow, np.array([50, 30, 10, 5, 3, 1, 1]), 0)


def test_sizes(config, parts):
    network = build.flow_network(config, parts, CPU)
    block = 4 * 16 * 16 + 2 * 4 * 16 * 16 + 5 * 16 + 2 * 8 + 128 * 6 * 16 + 6 * 16  # attention, MLP with biases, gains, modulation
    last = 128 * 2 * 16 + 2 * 16
    time = 32 * 128 + 128 + 128 * 128 + 128
    assert build.parameters(network) == 7 * 8 + 3 * 8 * 16 + 3 * block + last + time + 7 * 16 + 7
    assert len(network.trunk.blocks) == 3 and network.skip and network.code is not None


@pytest.mark.parametrize(("name", "reads"), [("belief", {"table"}), ("linear", {"state"}), ("both", {"table", "state"})])
def test_input(config, parts, name, reads):
    config.model.input = name
    network = build.flow_network(config, parts, CPU)
    assert {part for part in ("table", "state") if getattr(network, part) is not None} == reads


@pytest.mark.parametrize("reads", ["linear", "hot_belief", "none"])
def test_a_flow_map_has_what_the_flow_has_and_more(config, parts, reads):
    config.distill.state_input = reads
    flow, flow_map = build.flow_network(config, parts, CPU), build.flow_network(config, parts, CPU, is_map=True)
    more = set(flow_map.state_dict()) - set(flow.state_dict())
    assert set(flow.state_dict()) < set(flow_map.state_dict())
    own = {"linear": {"map_state"}, "hot_belief": {"map_widen"}, "none": set()}[reads]
    assert {name.split(".")[0] for name in more} == {"map_time"} | own


def test_skip(config, parts):
    config.flow.skip = "off"
    assert build.flow_network(config, parts, CPU).skip is False


def test_the_baseline_has_the_trunk_of_the_flow(config, parts):
    baseline, flow = build.baseline_network(config, parts.log_prior, CPU), build.flow_network(config, parts, CPU)
    without = {k: v.shape for k, v in flow.trunk.state_dict().items() if "modulation" not in k}
    assert without.items() < {k: v.shape for k, v in baseline.trunk.state_dict().items()}.items()
    assert baseline.weight.shape == flow.weight.shape and baseline.table.shape == flow.table.shape
    assert baseline.widen.weight.shape == flow.widen.weight.shape
