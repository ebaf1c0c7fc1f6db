"""Muon for the matrices of the blocks and AdamW for the rest: two optimizers that behave as one."""

import pytest
import torch
from torch import nn

from megaflow.config.schema import OptimConfig
from megaflow.train.optimizer import Together, is_block_matrix, make


class Network(nn.Module):
    """Parameters with the names that the trunk gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"qkv": nn.Linear(6, 18, bias=False), "down": nn.Linear(12, 6)})
        self.table, self.gain = nn.Embedding(5, 6), nn.Parameter(torch.ones(6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.block["down"](self.block["qkv"](self.table(ids) * self.gain)[..., :12].tanh()).square().sum()


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def train(network: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 5) -> list[torch.Tensor]:
    for step in range(steps):
        network.zero_grad()
        network(torch.tensor([step % 5, 1, 2])).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in network.parameters()]


OPTIM = OptimConfig(name="muon", learning_rate=0.01, weight_decay=0.1, warmup_steps=0)


class TestMake:
    def test_adamw_owns_everything(self, network):
        optimizer = make(network, OptimConfig(name="adamw", beta1=0.8, beta2=0.95, weight_decay=0.2, learning_rate=0.5))
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.AdamW and len(group["params"]) == len(list(network.parameters()))
        assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.8, 0.95), 0.2, 0.5)

    def test_muon_owns_the_matrices_of_the_blocks_and_nothing_else(self, network):
        muon, adam = make(network, OPTIM).parts
        owned = {name for name, p in network.named_parameters() for q in muon.param_groups[0]["params"] if p is q}
        assert owned == {"block.qkv.weight", "block.down.weight"}
        assert type(muon) is torch.optim.Muon and type(adam) is torch.optim.AdamW
        assert sum(len(group["params"]) for part in (muon, adam) for group in part.param_groups) == len(list(network.parameters()))

    def test_frozen_parameters_belong_to_nobody(self, network):
        network.table.weight.requires_grad_(False)
        owned = [p for group in make(network, OPTIM).param_groups for p in group["params"]]
        assert all(p is not network.table.weight for p in owned) and len(owned) == 4

    def test_every_trunk_has_block_matrices_by_these_names(self):
        """The names are those of the real network: four matrices a block, and Muon gets each."""
        from megaflow.config.schema import Config
        from megaflow.model.build import autoregressive_network

        config = Config()
        network = autoregressive_network(config, torch.zeros(50), torch.device("cpu"))
        found = [name for name, p in network.named_parameters() if is_block_matrix(name, p)]
        assert len(found) == 4 * config.model.layers


class TestTogether:
    def test_the_same_trajectory_as_both_apart(self, network):
        start = [p.detach().clone() for p in network.parameters()]
        together = train(network, [make(network, OPTIM)])
        with torch.no_grad():
            for p, value in zip(network.parameters(), start, strict=True):
                p.copy_(value)
        matrices, others = (
            [network.block["qkv"].weight, network.block["down"].weight],
            [network.block["down"].bias, network.table.weight, network.gain],
        )
        muon = torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
        apart = train(network, [muon, adam])
        assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(together, start, strict=True))

    def test_a_learning_rate_set_on_the_groups_reaches_both(self, network):
        optimizer = make(network, OPTIM)
        before = [p.detach().clone() for p in network.parameters()]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        assert all(torch.equal(a, b) for a, b in zip(train(network, [optimizer]), before, strict=True))

    def test_its_state_is_that_of_the_parts_itself(self, network):
        optimizer = make(network, OPTIM)
        assert isinstance(optimizer, Together) and not optimizer.state
        train(network, [optimizer], steps=1)
        assert set(optimizer.state[network.block["qkv"].weight]) == {"momentum_buffer"}
        assert set(optimizer.state[network.gain]) == {"step", "exp_avg", "exp_avg_sq"}
        before = network.gain.detach().clone()
        optimizer.state[network.gain]["exp_avg"].zero_()
        network.zero_grad(set_to_none=False)
        optimizer.parts[1].param_groups[0]["weight_decay"] = 0.0
        optimizer.step()
        assert torch.equal(network.gain, before)  # no momentum left, and no gradient
