"""Muon for the matrices of the blocks and AdamW for the rest: two optimizers that behave as one."""

import pytest
import torch
from torch import nn

from megaflow.config.schema import OptimConfig
from megaflow.parallel.cut import cut_of, even, parameter
from megaflow.parallel.mesh import ALONE, Axis, Mesh, grid
from megaflow.train.optimizer import NEWTON_SCHULZ, Matrix, Muon, Together, is_block_matrix, make, orthogonal


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


HERE = Mesh(ALONE, ALONE, ALONE, torch.device("cpu"))
OPTIM = OptimConfig(name="muon", learning_rate=0.01, weight_decay=0.1, warmup_steps=0)


class TestMake:
    def test_adamw_owns_everything(self, network):
        optimizer = make(network, OptimConfig(name="adamw", beta1=0.8, beta2=0.95, weight_decay=0.2, learning_rate=0.5), HERE)
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.AdamW and len(group["params"]) == len(list(network.parameters()))
        assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.8, 0.95), 0.2, 0.5)

    def test_muon_owns_the_matrices_of_the_blocks_and_nothing_else(self, network):
        muon, adam = (lambda made: (made.muon, made.adam))(make(network, OPTIM, HERE))
        owned = {name for name, p in network.named_parameters() for q in muon.param_groups[0]["params"] if p is q}
        assert owned == {"block.qkv.weight", "block.down.weight"}
        assert type(muon) is Muon and type(adam) is torch.optim.AdamW
        assert sum(len(group["params"]) for part in (muon, adam) for group in part.param_groups) == len(list(network.parameters()))

    def test_frozen_parameters_belong_to_nobody(self, network):
        network.table.weight.requires_grad_(False)
        owned = [p for group in make(network, OPTIM, HERE).param_groups for p in group["params"]]
        assert all(p is not network.table.weight for p in owned) and len(owned) == 4

    def test_every_trunk_has_block_matrices_by_these_names(self):
        """The names are those of the real network: four matrices a block, and Muon gets each."""
        from megaflow.config.schema import Config
        from megaflow.model.build import baseline_network

        config = Config()
        config.model.heads, config.model.belief_dim = 4, 16
        network = baseline_network(config, torch.zeros(50), torch.device("cpu"))
        found = [name for name, p in network.named_parameters() if is_block_matrix(name, p)]
        assert len(found) == 4 * config.model.layers


class TestTogether:
    def test_the_same_trajectory_as_both_apart(self, network):
        start = [p.detach().clone() for p in network.parameters()]
        together = train(network, [make(network, OPTIM, HERE)])
        with torch.no_grad():
            for p, value in zip(network.parameters(), start, strict=True):
                p.copy_(value)
        matrices, others = (
            [network.block["qkv"].weight, network.block["down"].weight],
            [network.block["down"].bias, network.table.weight, network.gain],
        )
        muon = Muon(matrices, torch.float32, HERE, lr=0.01, weight_decay=0.1)
        adam = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
        apart = train(network, [muon, adam])
        assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(together, start, strict=True))

    def test_a_learning_rate_set_on_the_groups_reaches_both(self, network):
        optimizer = make(network, OPTIM, HERE)
        before = [p.detach().clone() for p in network.parameters()]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        assert all(torch.equal(a, b) for a, b in zip(train(network, [optimizer]), before, strict=True))

    def test_each_takes_its_turn_where_one_group_is_shown_alone(self, network):
        """As ZeRO shows them, with gradients of both at hand."""
        optimizer = make(network, OPTIM, HERE)
        network(torch.tensor([0, 1, 2])).backward()
        groups, before = optimizer.param_groups, [p.detach().clone() for p in network.parameters()]
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
            moved = [not torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True)]
            assert moved == [any(p is q for q in group["params"]) for p in network.parameters()]
            before = [p.detach().clone() for p in network.parameters()]

    def test_its_state_is_that_of_the_parts_itself(self, network):
        optimizer = make(network, OPTIM, HERE)
        assert isinstance(optimizer, Together) and not optimizer.state
        train(network, [optimizer], steps=1)
        assert set(optimizer.state[network.block["qkv"].weight]) == {"momentum_buffer"}
        assert set(optimizer.state[network.gain]) == {"step", "exp_avg", "exp_avg_sq"}
        before = network.gain.detach().clone()
        optimizer.state[network.gain]["exp_avg"].zero_()
        network.zero_grad(set_to_none=False)
        optimizer.adam.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()
        assert torch.equal(network.gain, before)  # no momentum left, and no gradient


class TestMuon:
    @pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5), (1, 3)])
    def test_orthogonalising_acts_on_the_singular_values_alone(self, shape):
        """Five times the polynomial on singular values of a matrix of norm one, in fp64."""
        update = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        left, values, right = torch.linalg.svd(update / update.norm(), full_matrices=False)
        a, b, c = NEWTON_SCHULZ
        for _ in range(5):
            values = a * values + b * values**3 + c * values**5
        torch.testing.assert_close(orthogonal(update, torch.float64), left @ values.diag() @ right, rtol=1e-10, atol=1e-10)
        assert 0.6 < values.min() and values.max() < 1.3

    def test_the_precision_is_that_asked_for(self):
        update = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
        exact = orthogonal(update.double(), torch.float64)
        errors = [(orthogonal(update, dtype).double() - exact).abs().max() for dtype in (torch.float32, torch.bfloat16)]
        assert errors[0] < 1e-5 < 1e-3 < errors[1] < 0.1
        assert orthogonal(update, torch.bfloat16).dtype == torch.float32

    def test_its_steps_are_those_of_torch_but_for_the_precision(self):
        """Momentum, Nesterov, decay and scale, over several steps; torch orthogonalises in bf16."""
        draw = torch.Generator().manual_seed(3)
        ours, theirs = (nn.Parameter(torch.ones(6, 10)) for _ in range(2))
        settings = dict(lr=0.02, weight_decay=0.1)
        half = Muon([ours], torch.bfloat16, HERE, **settings)
        reference = torch.optim.Muon([theirs], momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings)
        for _ in range(4):
            ours.grad = torch.randn(6, 10, generator=draw)
            theirs.grad = ours.grad.clone()
            half.step()
            reference.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
        assert (ours - 1.0).abs().max() > 0.02

    def test_a_small_change_of_a_gradient_is_a_small_change_of_the_step(self):
        """To fp32's digits: what several processes sum in another order is the same run."""
        update = torch.randn(64, 96, generator=torch.Generator().manual_seed(4))
        moved = update * (1.0 + 1e-7 * torch.randn(update.shape, generator=torch.Generator().manual_seed(5)))
        assert (orthogonal(moved, torch.float32) - orthogonal(update, torch.float32)).abs().max() < 1e-5


SHAPES = [(6, 4), (4, 9), (5, 8)]
SIZES = [rows * columns for rows, columns in SHAPES]
CUTS = {(6, 4): (0, 3), (4, 9): (0, 1), (5, 8): (1, 1)}
"""Dimension and blocks along which tensor parallelism cuts a matrix of this shape."""
PADDING = 3


def logical_run() -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Matrices and four steps of gradients."""
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in SHAPES]
    return start, [[torch.randn(shape, generator=draw) for shape in SHAPES] for _ in range(4)]


def muon_over(parameters: list[nn.Parameter], mesh: Mesh) -> Muon:
    return Muon(parameters, torch.float32, mesh, lr=0.02, weight_decay=0.1)


def sliced(tensor: int, borders: list[int]) -> list[torch.Tensor]:
    """This process's elements after four steps of Muon, where its part of the matrices, laid end to end with padding behind, is cut at
    `borders` into slices, one for each data-parallel process."""
    mesh = grid(tensor, torch.device("cpu"))
    start, gradients = logical_run()
    parts = [parameter(shape, even(CUTS[shape][0], shape[CUTS[shape][0]], mesh.tensor, CUTS[shape][1])) for shape in SHAPES]

    def flat(matrices: list[torch.Tensor]) -> torch.Tensor:
        held = [m if cut_of(p) is None else cut_of(p).take(m) for m, p in zip(matrices, parts, strict=True)]
        return torch.cat([*(m.flatten() for m in held), torch.zeros(PADDING)])

    total = len(flat(start))
    ends = [*borders, total]
    low, high = ([0, *ends])[mesh.data.rank], ends[mesh.data.rank]
    weights = nn.Parameter(flat(start)[low:high].clone())
    muon = muon_over([weights], mesh)
    found, offset = [], 0
    for p in parts:
        size = p.numel()
        inside, until = max(offset, low), min(offset + size, high)
        count, split = max(until - inside, 0), any(offset < border < offset + size for border in borders)
        if count or split:
            found.append(Matrix(p.shape, cut_of(p), inside - offset if count else 0, count, inside - low if count else 0, split))
        offset += size
    muon.matrices = {weights: found}
    for number in range(4):
        weights.grad = flat(gradients[number])[low:high].clone()
        muon.step()
    return weights.detach()


def expected(tensor: int, rank: int, matrices: list[torch.Tensor]) -> torch.Tensor:
    """The part of tensor-parallel process `rank` of the matrices, laid end to end with padding behind."""
    cuts = [even(CUTS[shape][0], shape[CUTS[shape][0]], Axis(rank, tensor), CUTS[shape][1]) for shape in SHAPES]
    return torch.cat([*(cut.take(m).flatten() for cut, m in zip(cuts, matrices, strict=True)), torch.zeros(PADDING)])


class TestMuonInParts:
    @pytest.mark.parametrize(
        "size, tensor, borders",
        [(2, 1, [24]), (2, 1, [30]), (4, 1, [10, 12, 20]), (2, 2, []), (4, 2, [35])]
        + [
            pytest.param(*case, marks=pytest.mark.long)
            for case in [(2, 1, [60]), (2, 1, [10]), (2, 1, [100]), (4, 1, [24, 60, 100]), (4, 1, [1, 2, 103])]
            + [(4, 2, [12]), (4, 2, [5]), (4, 2, [50])]
        ],
    )
    def test_parts_and_slices_take_the_steps_of_whole_matrices(self, ranks, size, tensor, borders):
        """Wherever the borders lie: between matrices, within one, several in the same one, in the padding; with tensor parts as well."""
        start, gradients = logical_run()
        whole = [nn.Parameter(matrix.clone()) for matrix in start]
        muon = muon_over(whole, HERE)
        for number in range(4):
            for p, gradient in zip(whole, gradients[number], strict=True):
                p.grad = gradient
            muon.step()
        found = ranks(size, sliced, tensor, borders)
        for rank in range(tensor):
            ours = torch.cat(found[rank::tensor])
            torch.testing.assert_close(ours, expected(tensor, rank, [p.detach() for p in whole]), rtol=1e-5, atol=1e-6)
        assert not any(torch.equal(p, before) for p, before in zip(whole, start, strict=True))

    def test_it_waits_for_a_gradient_of_its_own(self):
        """Nothing moves or decays, and no momentum fades, where there is none."""
        flat = nn.Parameter(torch.ones(6))
        muon = muon_over([flat], HERE)
        muon.matrices = {flat: [Matrix(torch.Size((2, 3)), None, 0, 6, 0, False)]}
        muon.state[flat]["momentum_buffer"] = torch.ones(6)
        muon.step()
        assert torch.equal(flat, torch.ones(6)) and torch.equal(muon.state[flat]["momentum_buffer"], torch.ones(6))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_of_odd_sizes_come_last(name):
    """Whatever lies after them in one flat tensor would begin at an odd address."""
    block = nn.ModuleDict({"qkv": nn.Linear(64, 192, bias=False), "out": nn.Linear(64, 64)})
    network = nn.ModuleDict({"head": nn.Linear(64, 257), "block": block})
    made = make(network, OptimConfig(name=name), HERE)
    for part in (made,) if name == "adamw" else (made.muon, made.adam):
        odd = [p.numel() % 64 != 0 for group in part.param_groups for p in group["params"]]
        assert odd == sorted(odd)
    assert any(p is network["head"].bias for group in made.param_groups for p in group["params"])
