"""The queue against queueing theory and a brute-force simulation."""

import heapq

import numpy as np
import pytest

from fedsim import encoding
from fedsim.workers import Queue, Workers


def workers(count, service=1.0):
    """Workers for whom every job of 1e12 FLOPs takes ``service`` ticks."""
    return Workers(count=count, flops=1e12 / service, startup_seconds=0.0)


def served(who, arrivals, services, poll=1):
    """Start and finish of each job, where the queue is looked at every ``poll`` ticks."""
    queue, found, arrivals = who.init(), {}, list(arrivals)
    job = 0
    tick = 0
    while len(found) < len(arrivals):
        while job < len(arrivals) and arrivals[job] <= tick:
            queue = who.submit(queue, arrivals[job], job, services[job] * 1e12)
            job += 1
        queue, started = who.step(queue, tick)
        found.update({a.job: (a.start, a.finish) for a in started})
        tick += poll
    return np.array([found[j] for j in range(len(arrivals))])


def brute_force(count, arrivals, services):
    free = [0] * count
    out = []
    for arrival, service in zip(arrivals, services, strict=True):
        start = max(arrival, heapq.heappop(free))
        heapq.heappush(free, start + service)
        out.append((start, start + service))
    return np.array(out)


def random_jobs(num=300, seed=0, gap=2):
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.integers(0, 2 * gap, num)).tolist(), rng.integers(1, 12, num).tolist()


@pytest.mark.parametrize("count", [1, 2, 5, 100])
@pytest.mark.parametrize("poll", [1, 7])
def test_starts_equal_a_brute_force_queue_however_often_it_is_looked_at(count, poll):
    arrivals, services = random_jobs()
    np.testing.assert_array_equal(served(workers(count), arrivals, services, poll), brute_force(count, arrivals, services))


def test_no_limit_equals_a_huge_number_of_workers():
    arrivals, services = random_jobs()
    unlimited = served(workers(None), arrivals, services)
    np.testing.assert_array_equal(unlimited, served(workers(10_000), arrivals, services))
    np.testing.assert_array_equal(unlimited[:, 0], arrivals)


@pytest.mark.parametrize("count", [1, 3])
def test_no_worker_idles_while_a_job_waits_and_none_does_two_at_once(count):
    arrivals, services = random_jobs(gap=1)
    times = served(workers(count), arrivals, services)
    for tick in range(times.max()):
        running = ((times[:, 0] <= tick) & (tick < times[:, 1])).sum()
        waiting = ((np.asarray(arrivals) <= tick) & (tick < times[:, 0])).sum()
        assert running <= count
        assert running == count or waiting == 0
    assert (np.diff(times[:, 0]) >= 0).all()


def test_mean_wait_of_poisson_arrivals_is_pollaczek_khinchine():
    rho, service, num = 0.7, 100, 30_000
    waits = []
    for seed in range(4):
        arrivals = np.cumsum(np.random.default_rng(seed).exponential(service / rho, num))
        who, queue, starts = workers(1), Queue(), np.zeros(num)
        for job, arrival in enumerate(np.ceil(arrivals).astype(int).tolist()):
            queue, started = who.step(who.submit(queue, arrival, job, service * 1e12), arrival)
            for a in started:
                starts[a.job] = a.start
        _, started = who.step(queue, 10**12)
        for a in started:
            starts[a.job] = a.start
        waits.append((starts - np.ceil(arrivals)).mean() / service)
    assert np.mean(waits) == pytest.approx(rho / (2 * (1 - rho)), rel=0.05)


def test_service_time_is_start_up_plus_flops_in_whole_ticks():
    who = Workers(count=1, flops=2e12, startup_seconds=0.5, tick_seconds=2.0)
    assert who.seconds(6e12) == 3.5
    assert who.service_ticks(6e12) == 2
    assert who.service_ticks(0.0) == 1


def test_a_result_serves_from_the_later_of_latency_and_finish():
    who = Workers(tick_seconds=2.0)
    assert who.deployed_at(asked=10, latency=5, finish=12) == 15
    assert who.deployed_at(asked=10, latency=5, finish=40) == 40
    assert who.deployed_at(asked=10, latency=5, finish=40, download_seconds=3.0) == 42


def test_the_queue_is_a_value_that_survives_encoding():
    who = workers(1)
    queue = who.submit(who.submit(who.init(), 0, 0, 5e12), 1, 1, 5e12)
    after, started = who.step(queue, 1)
    assert (len(queue), len(after)) == (2, 1)
    assert [(a.job, a.start, a.finish) for a in started] == [(0, 0, 5)]
    again = encoding.decode(*encoding.encode(after))
    assert again == after
    assert who.step(again, 5)[1] == who.step(after, 5)[1]
    assert encoding.decode(*encoding.encode(who)) == who


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 0}, "count"),
        ({"count": 1.5}, "count"),
        ({"flops": 0.0}, "flops"),
        ({"tick_seconds": float("inf")}, "tick_seconds"),
        ({"startup_seconds": -1.0}, "startup_seconds"),
        ({"priority": "gain"}, "priority"),
    ],
)
def test_bad_workers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Workers(**fields)


def test_a_submission_before_an_earlier_one_is_refused():
    who = workers(1)
    with pytest.raises(ValueError, match="order of time"):
        who.submit(who.submit(who.init(), 5, 0, 1e12), 4, 1, 1e12)
