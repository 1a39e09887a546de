"""Tests that clients share limits and threads fairly."""

import functools
import itertools
import threading

from cnn_jax.serve.fairness import FairThreads, Quota


def fill(quota, client):
    """Adds 1 for a client until this is refused; returns how often 1 was added."""
    count = 0
    while quota.fits(client, 1):
        quota.add(client, 1)
        count += 1
    return count


def test_one_client_can_use_half_of_a_quota():
    quota = Quota(100)
    assert fill(quota, "a") == quota.used == 50
    assert quota.fits("a", 0)
    quota.add("a", -50)
    assert quota.fits("a", 50)
    assert not quota.fits("a", 51)
    assert not quota._by_client


def test_as_much_as_each_client_uses_remains_free():
    quota = Quota(120)
    for _ in range(100):  # A client that has too much gives 1 back.
        for client in "abc":
            fill(quota, client)
            if not quota.fits(client, 1):
                quota.add(client, -1)
    assert all(29 <= quota._by_client[client] <= 30 for client in "abc")
    assert quota.fits("d", 15)


def run(submit):
    """Submits calls while the only thread is busy; returns the order in which the calls ran."""
    threads, gate, order = FairThreads(1, "test"), threading.Event(), []

    def add(client, *names):
        return threads.submit(client, [functools.partial(order.append, name) for name in names])

    first, end = threading.Event(), threading.Event()
    threads.submit("first", [lambda: (first.set(), gate.wait(20))])
    assert first.wait(20)
    submit(add)
    threads._executor.submit(end.set)
    gate.set()
    assert end.wait(20)
    assert not threads._waiting
    threads.shut_down()
    return order


def test_clients_take_turns():
    def submit(add):
        add("a", *[f"a{n}" for n in range(4)])
        add("b", "b0")
        add("c", "c0", "c1")
        add("b", "b1")

    assert run(submit) == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "a3"]


def test_requests_of_a_client_take_turns():
    order = run(lambda add: [add("a", f"{name}0", f"{name}1") for name in "xyz"])
    assert order == ["x0", "y0", "z0", "x1", "y1", "z1"]


def test_cancelled_calls_do_not_run():
    def submit(add):
        waiting = add("a", "a0", "a1")
        add("b", "b0")
        waiting.clear()

    assert run(submit) == ["b0"]


def test_new_clients_do_not_starve_a_known_client():
    threads, numbers, done = FairThreads(1, "test"), itertools.count(), threading.Event()

    def arrive():  # Whenever a new client is answered, a further new client arrives.
        if not done.is_set() and (number := next(numbers)) < 1_000:
            threads.submit(f"new{number}", [arrive])

    first = threading.Event()
    threads.submit("known", [lambda: first.wait(20), done.set])
    arrive()
    arrive()
    first.set()
    assert done.wait(20)
    assert next(numbers) < 100
    threads.shut_down()


def test_a_request_without_calls_leaves_nothing():
    threads = FairThreads(1, "test")
    assert not threads.submit("a", [])
    assert not threads._waiting
    threads.shut_down()
