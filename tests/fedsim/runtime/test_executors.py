"""The serial executor: the reference every other one must equal."""

import numpy as np
import pytest
import torch

from fedsim.errors import CapacityError
from fedsim.runtime import Needs, SerialExecutor
from fedsim.runtime.executor import Recent


def scaled(unit, shared, cache):
    cache["calls"] = cache.get("calls", 0) + 1
    return unit * shared["factor"], cache["calls"], torch.get_num_threads()


def test_results_come_in_unit_order_with_shared_values_and_a_cache_that_lasts():
    with SerialExecutor() as executor:
        handle = executor.share(np.array([1.0, 2.0]))
        first = executor.map(scaled, [3, 1, 2], {"factor": handle})
        assert [r[0].tolist() for r in first] == [[3, 6], [1, 2], [2, 4]]
        assert executor.map(scaled, [1], {"factor": 5})[0][:2] == (5, 4)


def test_units_run_on_one_thread_and_the_callers_setting_returns():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert SerialExecutor().map(scaled, [1], {"factor": 1})[0][2] == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_users_exception_passes_as_it_is():
    with pytest.raises(KeyError, match="factor"):
        SerialExecutor().map(scaled, [1], {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_an_error():
    with pytest.raises(CapacityError, match="needs 1 GPU"):
        SerialExecutor().map(scaled, [1], {"factor": 1}, Needs(gpus=1))


def test_negative_needs_are_refused():
    with pytest.raises(ValueError, match="gpus"):
        Needs(gpus=-1)


def test_the_cache_forgets_what_was_not_used_for_longest():
    cache = Recent(2)
    cache["a"], cache["b"] = 1, 2
    assert cache["a"] == 1
    cache["c"] = 3
    assert sorted(cache) == ["a", "c"]
    assert "b" not in cache
