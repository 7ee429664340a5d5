"""Simulated time against hand-computed rounds, FLOPs against counted products."""

import pytest
import torch
from torch import nn

from fedsim.clock import forward_flops, round_seconds, step_flops


def test_flops_of_a_perceptron_are_two_per_multiply_add():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    assert forward_flops(model, torch.zeros(1, 64)) == 2 * (64 * 32 + 32 * 10)
    assert step_flops(100, 16) == 4800


def test_flops_of_a_convolution_count_every_output_pixel():
    assert forward_flops(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 8, 8)) == 2 * 8 * 8 * 8 * 27


def test_measuring_leaves_the_mode_of_the_model():
    model = nn.Linear(2, 2).train()
    forward_flops(model, torch.zeros(1, 2))
    assert model.training


def test_one_upload_each_lasts_as_long_as_the_slowest_client():
    # downloads 1, 2, 4; computes 4 x (.5, 1, .25); uploads 2, 3, 9
    assert round_seconds([(4,)] * 3, [0.5, 1.0, 0.25], [2, 3, 9], [1, 2, 4]) == 14.0


def test_a_group_waits_for_its_slowest_at_every_point():
    # step 1: max(1 + 1 + 1, 1 + 3 + 1) = 5, hand-back 1, step 2: max(6 + 1 + 1, 6 + 3 + 1) = 10
    assert round_seconds([(1, 2), (1, 2)], [1, 3], [1, 1], [1, 1]) == 10.0


def test_a_client_that_only_ends_with_the_round_does_not_wait_before():
    # group as above merges at 5 and would end at 10; the lone client needs 1 + 2 * 6 + 1 = 14
    assert round_seconds([(1, 2), (1, 2), (2,)], [1, 3, 6], [1, 1, 1], [1, 1, 1]) == 14.0


def test_a_client_without_points_costs_no_time():
    assert round_seconds([(2,), ()], [1, 100], [1, 1], [1, 1]) == 4.0


def test_more_than_one_example_is_refused():
    with pytest.raises(ValueError, match="batch of one"):
        forward_flops(nn.Linear(2, 2), torch.zeros(3, 2))
