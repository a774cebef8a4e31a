"""Options of layers that published models have: what every mixer has to fulfil, of each of them."""

import pytest
import torch

from longctx.model.initialise import initialise
from longctx.parallel.layout import Layout
from tests.mixers import test_contract, test_parity
from tests.mixers import test_head_mixture as test_heads
from tests.mixers import test_tensor_parallel as test_division
from tests.mixers.cases import DIM, OPTIONS, draw, run
from tests.parallel.cases import PACKINGS

each_option = pytest.mark.parametrize("option", OPTIONS)
ROUTED = [name for name, config in OPTIONS.items() if config.routable() is not None]


@each_option
def test_a_packed_document_is_as_it_would_be_alone(option):
    test_contract.test_a_packed_document_is_as_it_would_be_alone(option, PACKINGS["ends inside slices"])


@each_option
def test_ranks_change_nothing(ranks, option):
    """About ten of the combinations that all mixers are tested with."""
    cells = test_parity.combinations(option, 2)
    cells = cells[4 :: len(cells) // 10]
    answers = ranks.run(test_parity.on_rank, option, torch.float64, cells, size=2)
    test_parity.compare(answers, option, 2, torch.float64, cells)


@each_option
@pytest.mark.parametrize("pieces", [(7, 1, 1, 5, 1, 13), (1,) * 28], ids=str)
def test_a_document_in_pieces_is_as_it_would_be_whole(option, pieces):
    test_contract.test_a_document_in_pieces_is_as_it_would_be_whole(option, pieces)


@each_option
def test_heads_divide_over_ranks(ranks, option):
    test_division.test_summands_add_up_to_the_layer(ranks, option, None, 2, 2)
    test_division.test_parts_that_are_put_together_are_the_whole(option, None)


@each_option
def test_half_precision_stays_near_float64(option):
    test_contract.test_bfloat16_stays_near_float64(option)
    test_contract.test_under_autocast_only_projections_are_rounded(option)


@each_option
def test_work_is_counted_and_divided(option):
    test_contract.test_the_ranks_work_adds_up_to_that_of_one(option, "zigzag")


@each_option
def test_shrunk_is_the_same_kind_of_mixer(option):
    test_contract.test_shrunk_is_the_same_kind_of_mixer_and_fits_the_width_that_is_verified_with(option)


@pytest.mark.parametrize("option", ROUTED)
def test_a_mixture_of_heads_divides_over_ranks(ranks, option):
    test_division.test_summands_add_up_to_the_layer(ranks, option, "learned", 2, 2)


@pytest.mark.parametrize("option", ROUTED)
def test_a_mixture_of_heads_equals_all_heads_masked(option):
    test_heads.test_it_equals_all_heads_masked(option, "learned", (0, 5, 17, 18, 31, 48))
    test_heads.test_heads_that_are_not_read_are_not_counted(option)
    test_heads.test_a_document_in_pieces_is_as_it_would_be_whole(option)


def test_every_parameter_of_an_option_reaches_the_output():
    for option, config in OPTIONS.items():
        mixer = config.build(DIM, 1, 4, 1e-5).double()
        initialise(mixer, seed=3)
        x, dy = draw(28)
        run(mixer, x, Layout((0, 28))).backward(dy)
        assert all(p.grad.norm() > 0 for p in mixer.parameters()), option
