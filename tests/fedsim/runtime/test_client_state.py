"""What clients keep between rounds, against a plain dictionary; files that are missing, damaged, written twice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from fedsim.encoding import decode, encode
from fedsim.errors import CheckpointError
from fedsim.runtime.client_state import ClientLog, ClientStates, retain


def rows_of(rng, count, size=3):
    return rng.normal(size=(count, size)).astype(np.float32)


@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=30), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_reads_what_a_dictionary_would(tmp_path_factory, cohorts, seed):
    log, rng = ClientLog(tmp_path_factory.mktemp("log"), 3, "float32"), np.random.default_rng(seed)
    states, held = ClientStates.empty(10), {}
    for round, cohort in enumerate(cohorts):
        clients = np.array(sorted(cohort))
        values = rows_of(rng, len(clients))
        states = log.write(states, round, clients, values)
        held |= dict(zip(clients.tolist(), values, strict=True))
    everyone = rng.permutation(10)
    assert_array_equal(log.read(states, everyone), [held.get(c, np.zeros(3)) for c in everyone.tolist()])


def test_files_stay_few_and_mostly_alive(tmp_path):
    log, rng = ClientLog(tmp_path, 3, "float32"), np.random.default_rng(0)
    states = ClientStates.empty(1000)
    for round in range(300):
        before, states = states, log.write(states, round, rng.choice(1000, 20, replace=False), rows_of(rng, 20))
        assert len(states.segments) <= 64
        assert sum(s.rows for s in states.segments) <= 2 * (states.segment >= 0).sum()
        retain(tmp_path, [before, states])
        assert len(list(tmp_path.iterdir())) <= 130


def test_a_round_done_again_writes_the_same_bytes_and_is_applied_once(tmp_path):
    log, rng = ClientLog(tmp_path, 3, "float32"), np.random.default_rng(0)
    first = log.write(ClientStates.empty(5), 0, np.array([1, 2]), rows_of(rng, 2))
    values = log.read(first, np.array([1, 3])) + 1
    once = log.write(first, 1, np.array([1, 3]), values)
    twice = log.write(first, 1, np.array([1, 3]), log.read(first, np.array([1, 3])) + 1)
    assert once.segments == twice.segments
    assert_array_equal(log.read(once, np.arange(5)), log.read(twice, np.arange(5)))


def test_an_older_state_still_reads_its_own_values(tmp_path):
    log = ClientLog(tmp_path, 1, "float64")
    old = log.write(ClientStates.empty(3), 0, np.array([0]), np.array([[1.0]]))
    new = log.write(old, 1, np.array([0]), np.array([[2.0]]))
    assert log.read(old, np.array([0])) == 1.0
    assert log.read(new, np.array([0])) == 2.0


def test_states_survive_encoding_and_another_process_reads_them(tmp_path):
    states = ClientLog(tmp_path, 2, "float32").write(ClientStates.empty(4), 0, np.array([2]), np.ones((1, 2), np.float32))
    again = decode(*encode(states))
    assert again.segments == states.segments
    assert_array_equal(ClientLog(tmp_path, 2, "float32").read(again, np.array([1, 2])), [[0, 0], [1, 1]])


def test_a_damaged_or_missing_file_is_named(tmp_path):
    states = ClientLog(tmp_path, 2, "float32").write(ClientStates.empty(4), 0, np.array([2]), np.ones((1, 2), np.float32))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged or of another run"):
        ClientLog(tmp_path, 2, "float32").read(states, np.array([2]))
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ClientLog(tmp_path, 2, "float32").read(states, np.array([2]))
