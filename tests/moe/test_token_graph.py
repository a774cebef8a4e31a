"""Scores shared along a graph of tokens, against the dense matrices S and A written out, in float64."""

import itertools
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from longctx.kernels.attention.block import IntervalMask
from longctx.kernels.linear.recurrence import document_ids
from longctx.moe.report import entropy
from longctx.moe.token_graph import attention_aware, one_head_schedule, similarity_aware
from longctx.parallel.attention.api import BETWEEN_OWNERS
from longctx.parallel.layout import Layout
from longctx.parallel.mesh import Grid, Mesh
from longctx.parallel.traffic import count_traffic
from tests.combinations import few, mostly_slow_rows, pairs, pairs_or_everything
from tests.parallel.cases import ORDERS, PACKINGS, UNEVEN

DIM, EXPERTS, WIDTH, HEADS, KV_HEADS = 7, 5, 3, 4, 2
NAMES = {
    "similarity": ("u", "W", "W_a", "W_b"),
    "attention": ("u", "W", "q", "k"),
}
WINDOWS = {"similarity": [None], "attention": [None, 5]}
SHARDED = ("u", "q", "k")


def draw(length):
    generator = torch.Generator().manual_seed(length)
    shapes = {
        "u": (2, length, DIM),
        "W": (EXPERTS, DIM),
        "W_a": (WIDTH, DIM),
        "W_b": (WIDTH, DIM),
        "q": (2, length, HEADS, WIDTH),
        "k": (2, length, KV_HEADS, WIDTH),
        "do": (2, length, EXPERTS),
    }
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def seen(bounds, window):
    """`[T, T]` bool: the tokens that a token's average is over."""
    places = torch.arange(bounds[-1])
    ids = document_ids(bounds[-1], bounds[:-1], torch.device("cpu"))
    distance = places[:, None] - places[None, :]
    mask = (ids[:, None] == ids[None, :]) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def dense(kind, drawn, bounds, window):
    """r~, with S or A in full."""
    r, mask = (drawn["u"] @ drawn["W"].T).softmax(dim=-1), seen(bounds, window)
    if kind == "similarity":
        matrix = drawn["W_a"].T @ drawn["W_b"]
        s = torch.einsum("bid,de,bje->bij", drawn["u"], matrix, drawn["u"]) * 0.6
        return s.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ r
    k = drawn["k"].repeat_interleave(HEADS // KV_HEADS, dim=2)
    a = torch.einsum("bihd,bjhd->bhij", drawn["q"], k) * 0.6
    return a.masked_fill(~mask, -torch.inf).softmax(dim=-1).mean(dim=1) @ r


@cache
def wanted(kind, bounds, window):
    """r~ and gradients of all tokens and weights, on one rank."""
    drawn = draw(bounds[-1])
    leaves = {name: drawn[name].requires_grad_() for name in NAMES[kind]}
    out = dense(kind, drawn, bounds, window)
    out.backward(drawn["do"])
    return {"r~": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def ours(kind, drawn, layout, window):
    r = (drawn["u"] @ drawn["W"].T).softmax(dim=-1)
    if kind == "similarity":
        return similarity_aware(r, drawn["u"] @ drawn["W_a"].T, drawn["u"] @ drawn["W_b"].T, layout, 0.6)
    return attention_aware(r, drawn["q"], drawn["k"], layout, 0.6, IntervalMask(window=window))


def on_rank(kind, cases, ulysses):
    """r~ and gradients of this rank's tokens, and its shares of those of the weights."""
    mesh = Mesh.build("cpu", cp=dist.get_world_size(), ulysses=ulysses)
    answers = []
    for bounds, order, schedule, window in cases:
        layout = Layout.on(mesh, bounds, order, attention=schedule)
        whole = draw(bounds[-1])
        here = {n: layout.shard(x, fill=3.0) if n in (*SHARDED, "do") else x for n, x in whole.items()}
        leaves = {name: here[name].clone().requires_grad_() for name in NAMES[kind]}
        out = ours(kind, here | leaves, layout, window)
        out.backward(here["do"])
        answers.append((out.detach(), *(leaf.grad for leaf in leaves.values())))
    return answers


def schedules(size):
    return [name for name in BETWEEN_OWNERS if size == 4 or not name.startswith("ulysses-")]


@pytest.mark.parametrize(
    ("size", "kind"),
    mostly_slow_rows(itertools.product([1, 2, 4], NAMES), lambda size, kind: size == 4 or kind == "similarity"),
)
@pairs_or_everything
def test_it_is_the_equation_under_every_layout_and_schedule(ranks, size, kind, combinations):
    bounds, orders = [*PACKINGS.values(), *UNEVEN.values()], ORDERS[:1] if size == 1 else ORDERS
    if combinations is pairs and size < 4:
        combinations = few
    cases = combinations(bounds, orders, ["auto"], WINDOWS[kind])
    if combinations is pairs:
        combinations = few
    cases += combinations(bounds[::2], [orders[-1]], schedules(size), WINDOWS[kind])
    answers = ranks.run(on_rank, kind, cases, 2 if size == 4 else 1, size=size)
    for number, (bounds, order, schedule, window) in enumerate(cases):
        layout = Layout(bounds, order, size)
        parts = list(zip(*(answer[number] for answer in answers), strict=True))
        for (name, ref), part in zip(wanted(kind, bounds, window).items(), parts, strict=True):
            got = layout.unshard(part) if name in (*SHARDED, "r~") else sum(part)
            assert (got - ref).norm() <= 1e-10 * max(ref.norm(), 1), f"{name} {bounds} {order} {schedule} {window}"
        for rank, part in enumerate(parts[0]):
            for gap in layout.for_rank(rank).padding:
                assert (part[:, gap] == 0).all(), "padding has no scores"


@pytest.mark.parametrize("kind", NAMES)
def test_what_comes_later_and_other_documents_change_no_bit(kind):
    layout = Layout((0, 3, 21, 30))
    drawn = {name: x.float() for name, x in draw(30).items()}
    before = ours(kind, drawn, layout, None)
    for t in (0, 2, 3, 17, 29):
        changed = {n: x.clone() for n, x in drawn.items()}
        for name in SHARDED:
            changed[name][:, t] += 1
        after = ours(kind, changed, layout, None)
        end = next(end for end in layout.cu_seqlens if end > t)
        assert torch.equal(after[:, :t], before[:, :t])
        assert torch.equal(after[:, end:], before[:, end:])
        moved = (after[:, t:end] != before[:, t:end]).any(dim=-1)
        assert moved[:, 0].all()
        assert moved.float().mean() > 0.5, "the tokens after it do depend on it"


@pytest.mark.parametrize("kind", NAMES)
def test_scores_stay_in_float32_where_the_layer_computes_in_bf16(kind):
    layout, drawn = Layout((0, 13, 48)), draw(48)
    rounded = drawn | {name: drawn[name].bfloat16().double() for name in ("u", "q", "k")}
    r = (rounded["u"] @ drawn["W"].T).softmax(dim=-1)
    if kind == "similarity":
        q, k = ((rounded["u"] @ drawn[name].T).bfloat16() for name in ("W_a", "W_b"))
        got = similarity_aware(r.float(), q, k, layout, 0.6)
        want = similarity_aware(r, q.double(), k.double(), layout, 0.6)
    else:
        got = attention_aware(r.float(), rounded["q"].bfloat16(), rounded["k"].bfloat16(), layout, 0.6)
        want = attention_aware(r, rounded["q"], rounded["k"], layout, 0.6)
    assert got.dtype == torch.float32
    assert (got - want).norm() <= 1e-6 * want.norm()


class _Largest(TorchDispatchMode):
    """The most numbers of a tensor that an operator gives."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("kind", NAMES)
def test_no_matrix_over_pairs_of_tokens_exists(kind):
    length = 4096
    drawn = {n: x.float().requires_grad_() for n, x in draw(length).items()}
    with _Largest() as largest:
        ours(kind, drawn, Layout((0, 1000, length)), None).sum().backward()
    assert length < largest.most < length**2 / 8


GRID = Grid(2, None, None)


@pytest.mark.parametrize(
    ("schedule", "size", "grid", "want"),
    [
        ("auto", 4, GRID, "auto"),
        ("ring", 4, GRID, "ring"),
        ("all-gather", 4, None, "all-gather"),
        ("ulysses", 4, None, "all-gather"),
        ("ulysses-ring", 4, GRID, "all-gather"),
        ("ulysses-all-gather", 4, GRID, "all-gather"),
        ("ulysses", 1, None, "ulysses"),
    ],
)
def test_one_head_goes_by_the_schedule_of_the_layout_or_by_all_gather(schedule, size, grid, want):
    assert one_head_schedule(Layout((0, 8), size=size, grid=grid, attention=schedule)) == want


def calls(schedule):
    layout = Layout.on(Mesh.build("cpu", cp=2), (0, 16), "contiguous", attention=schedule)
    drawn = {n: layout.shard(x) if n in SHARDED else x for n, x in draw(16).items()}
    with count_traffic() as traffic:
        ours("similarity", drawn, layout, None)
    return dict(traffic.bytes)


def test_the_bytes_of_a_pass_are_one_key_and_the_scores_of_each_token_elsewhere(ranks):
    for sent in ranks.run(calls, "ulysses", size=2):
        assert sent == {"all_gather": 2 * 8 * (WIDTH + EXPERTS) * 8}


# What the paper claims of entropy and fluctuation, where it has to hold


def like(clusters):
    """Queries and keys by which only tokens of one cluster see each other."""
    return 30 * torch.nn.functional.one_hot(clusters, WIDTH).double()[None]


def test_entropy_lies_between_the_average_and_that_plus_the_entropy_of_the_weights():
    """Of r~ as a distribution. An average of distributions is never more certain than they are on average; a token
    becomes more certain than it was by itself where those like it are, as the next test has it."""
    drawn, layout = draw(40), Layout((0, 15, 40))
    r = (3 * drawn["u"] @ drawn["W"].T).softmax(dim=-1)
    q, k = drawn["u"] @ drawn["W_a"].T, drawn["u"] @ drawn["W_b"].T
    averaged = similarity_aware(r, q, k, layout, 0.6)
    h = entropy(averaged)
    low = similarity_aware(entropy(r)[..., None], q, k, layout, 0.6)[..., 0]
    s = (torch.einsum("bid,bjd->bij", q, k) * 0.6).masked_fill(~seen((0, 15, 40), None), -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(averaged.sum(dim=-1), torch.ones_like(h))
    assert (h >= low - 1e-12).all()
    assert (h <= low + entropy(s) + 1e-12).all()
    assert (h[:, 1:] > low[:, 1:] + 1e-3).float().mean() > 0.9


def test_an_uncertain_token_takes_the_choice_of_those_like_it():
    clusters = torch.tensor([0, 1, 0, 1, 0, 1])
    logits = torch.zeros(1, 6, EXPERTS, dtype=torch.float64)
    logits[0, :4, 2], logits[0, 1:4:2, 2], logits[0, 1:4:2, 4] = 8, 0, 8
    r = logits.softmax(dim=-1)
    averaged = similarity_aware(r, like(clusters), like(clusters), Layout((0, 6)), 1.0)
    assert averaged.argmax(dim=-1).tolist() == [[2, 4, 2, 4, 2, 4]]
    assert (entropy(averaged)[0, 4:] < entropy(r)[0, 4:] - 0.5).all()


def test_noise_changes_fewer_choices_of_tokens_that_decide_together():
    generator = torch.Generator().manual_seed(0)
    clusters = torch.randint(0, WIDTH, (400,), generator=generator)
    centres = torch.randn(WIDTH, EXPERTS, generator=generator, dtype=torch.float64)
    q = like(clusters)
    choices = []
    for _ in range(2):
        noise = torch.randn(1, 400, EXPERTS, generator=generator, dtype=torch.float64)
        r = (centres[clusters] + noise).softmax(dim=-1)
        averaged = similarity_aware(r, q, q, Layout((0, 400)), 1.0)
        choices.append((r.argmax(dim=-1), averaged.argmax(dim=-1)))
    alone, together = ((a != b).double().mean() for a, b in zip(*choices, strict=True))
    assert together < alone / 3
