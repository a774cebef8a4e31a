"""Gradient accumulation: loss and gradients of a step are means over all its labels, not over its micro-batches."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.engines.base import Batch
from longctx.engines.router_stats import RouterStats
from longctx.engines.step import accumulate_gradients, configure_activations, update_router_biases, weight_decay_names
from longctx.kernels.loss import IGNORE
from longctx.mixers.linear import LinearConfig
from longctx.model.decoder import Losses
from longctx.moe.report import RouterReport
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Axis, Mesh
from longctx.recipe.tables import TrainConfig
from tests.model.cases import VOCABULARY, decoder, routed, tokens, with_experts

CPU = torch.device("cpu")
MESH = Mesh("cpu", dp=Axis(), cp=Axis())


@pytest.fixture
def one_rank():
    """The default process group, of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def batch(length, labels, seed=0, rows=1):
    """A micro-batch whose last `labels` tokens of each row have a label."""
    y = tokens(length, rows, seed + 50)
    y[:, : length - labels] = IGNORE
    return Batch(tokens(length, rows, seed), y, Layout((0, length)))


def report(loss=0.0, counts=(0, 0)):
    zero = torch.zeros((), dtype=torch.int64)
    return RouterReport(
        torch.tensor(loss, dtype=torch.float64),
        torch.tensor(counts),
        torch.tensor(sum(counts)),
        torch.zeros((), dtype=torch.float64),
        zero,
        torch.tensor(True),
        zero[None, None],
    )


class Bigram(nn.Module):
    """Logits of the next token from the token itself."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
        self.logits = nn.Parameter(logits)

    def forward(self, batch, scale):
        nll = F.cross_entropy(self.logits[batch.tokens[0]], batch.labels[0], ignore_index=IGNORE, reduction="none")
        return Losses(nll.sum() * scale, nll.detach()[None], {})


@pytest.mark.usefixtures("one_rank")
def test_the_loss_and_gradients_are_means_over_the_labels_of_all_micro_batches():
    batches = [batch(8, 8, seed=1), batch(12, 1, seed=2), batch(5, 0, seed=3)]
    model, plain = Bigram(), Bigram()
    loss, stats = accumulate_gradients(batches, MESH, CPU, model, torch.Tensor.backward)

    x, labels = (torch.cat([getattr(b, name)[0] for b in batches]) for name in ("tokens", "labels"))
    want = F.cross_entropy(plain.logits[x], labels, ignore_index=IGNORE)
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-12)
    assert stats.layers == {}
    torch.testing.assert_close(model.logits.grad, plain.logits.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("one_rank")
def test_a_step_without_labels_has_loss_zero_and_zero_gradients():
    model = Bigram()
    loss, _ = accumulate_gradients([batch(6, 0)], MESH, CPU, model, torch.Tensor.backward)
    assert loss == 0.0
    assert torch.equal(model.logits.grad, torch.zeros_like(model.logits))


class Waits(TorchDispatchMode):
    """Counts the operators for which the host waits on a GPU: a number that Python reads."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


@pytest.mark.usefixtures("one_rank")
def test_the_host_waits_for_the_labels_and_for_the_loss_however_many_batches_there_are():
    with Waits() as waits:
        accumulate_gradients([batch(6, 3, n) for n in range(4)], MESH, CPU, Bigram(), torch.Tensor.backward)
    assert waits.count == 2


@pytest.mark.usefixtures("one_rank")
def test_auxiliary_losses_are_means_over_sequences_and_not_part_of_the_loss():
    # One sequence, and three as the rows of one batch.
    batches, auxiliary = [batch(4, 2), batch(4, 4, rows=3)], {1: 2.0, 3: 10.0}
    backpropagated = []

    def forward(batch, scale):
        rows = len(batch.tokens)
        total = (batch.labels != IGNORE).sum().double() * scale
        return Losses(total, torch.zeros(rows, 4), {"a": report(auxiliary[rows]), "b": report(1.0)})

    loss, _ = accumulate_gradients(batches, MESH, CPU, forward, lambda loss: backpropagated.append(loss.item()))
    assert loss == pytest.approx(1.0)
    want = [2 / 14 + (2.0 + 1.0) * 1 / 4, 12 / 14 + (10.0 + 1.0) * 3 / 4]
    assert backpropagated == pytest.approx(want)


@pytest.mark.usefixtures("one_rank")
def test_router_statistics_are_sums_over_micro_batches():
    counts = iter([(3, 1), (0, 4)])

    def forward(batch, scale):
        return Losses(torch.zeros(()), torch.zeros(1, 4), {"blocks.0.ffn": report(counts=next(counts))})

    _, stats = accumulate_gradients([batch(4, 4), batch(4, 4)], MESH, CPU, forward, lambda loss: None)
    assert stats.layers["blocks.0.ffn"].counts.tolist() == [3.0, 5.0]
    assert stats.layers["blocks.0.ffn"].tokens == 8.0


def test_weight_decay_applies_to_matrices_and_never_to_norms_and_biases():
    config = with_experts(layers="BS", linear=LinearConfig(heads=3, feature_map="hedgehog"), lightning=None)
    model = decoder(config)
    names = weight_decay_names(model)
    parameters = dict(model.named_parameters())
    # Biases per head are matrices by their shape.
    assert parameters["blocks.0.mixer.feature_q.bias"].ndim == 2
    want = {name for name in parameters if "norm" not in name and not name.endswith(".bias")}
    assert names == want
    assert {"embedding.weight", "blocks.1.ffn.experts.gate_up", "blocks.0.mixer.feature_q.weight"} <= names


def test_routing_biases_move_towards_the_mean_load_by_their_rate():
    model, stats = decoder(with_experts()), RouterStats()
    stats.add({"blocks.1.ffn": report(counts=(5, 1, 2, 0))})
    update_router_biases(model, stats)
    assert model.blocks[1].ffn.bias.tolist() == pytest.approx([-0.1, 0.1, 0.0, 0.1])
    assert model.blocks[3].ffn.bias.tolist() == [0.0] * 4


def test_routers_of_heads_have_no_routing_bias_to_update():
    model, stats = decoder(routed()), RouterStats()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stats.add({"blocks.0.mixer": report(counts=(4, 1, 0))})
    update_router_biases(model, stats)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "recompute", "tile"),
    [({"activation_checkpointing": "block", "ffn_tile": 5}, True, 5), ({}, False, None)],
)
def test_activation_options_reach_every_block(options, recompute, tile):
    model = decoder(with_experts())
    for block in model.blocks:
        block.recompute, block.ffn.tile = not recompute, 3
    configure_activations(model, TrainConfig(steps=1, **options))
    assert [block.recompute for block in model.blocks] == [recompute] * 4
    assert [block.ffn.tile for block in model.blocks] == [tile] * 4
