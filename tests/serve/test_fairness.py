"""Tests that clients share limits and threads fairly."""

import itertools
import threading
import time

from cnn_jax.serve.fairness import Call, FairThreads, Quota


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

    def add(client, *calls):
        made = [Call(cost, lambda name=name: order.append(name)) for cost, name in calls]
        return threads.submit(client, made)

    first = threading.Event()
    threads.submit("z", [Call(0, lambda: (first.set(), gate.wait(20)))])
    assert first.wait(20)
    submit(add)
    gate.set()
    end = threading.Event()
    threads.submit("last", [Call(10**9, end.set)])
    end.wait(20)
    threads._executor.shutdown()
    return order


def test_a_client_with_little_work_goes_first():
    def submit(add):
        for client in "abc":
            add(client, *[(1_000, f"{client}{n}") for n in range(4)])
        add("small", *[(10, f"small{n}") for n in range(4)])

    order = run(submit)
    # Each other client runs one call before all calls of the small client.
    assert set(order[:7]) == {"a0", "b0", "c0", "small0", "small1", "small2", "small3"}
    assert order[7:10] == ["a1", "b1", "c1"]


def test_a_client_gets_no_credit_for_the_time_without_calls():
    def submit(add):
        add("a", *[(10, f"a{n}") for n in range(20)])
        add("b", (10, "b0"))
        add("b", *[(10, f"b{n}") for n in range(1, 20)])

    order = run(submit)
    assert abs(sum(name[0] == "a" for name in order[:20]) - 10) <= 1


def test_requests_of_a_client_take_turns():
    order = run(lambda add: [add("a", (1, f"{name}0"), (1, f"{name}1")) for name in "xyz"])
    assert order == ["x0", "y0", "z0", "x1", "y1", "z1"]


def test_cancelled_calls_do_not_run():
    def submit(add):
        waiting = add("a", (1, "a0"), (1, "a1"))
        add("b", (1, "b0"))
        waiting.clear()

    assert run(submit) == ["b0"]


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_client_that_returns_gets_no_credit():
    threads, gate, order = FairThreads(2, "test"), threading.Event(), []
    threads.submit("busy", [Call(1, lambda: gate.wait(20))])  # The threads are never idle.
    threads.submit("a", [Call(10, lambda: order.append("a"))] * 20)
    until(lambda: len(order) == 20)
    started = threading.Event()
    threads.submit("last", [Call(1, lambda: (started.set(), gate.wait(20)))])
    assert started.wait(20)
    order.clear()
    for client in "ab":
        threads.submit(client, [Call(10, lambda c=client: order.append(c))] * 20)
    held = threads._num_running
    gate.set()
    until(lambda: len(order) == 40)
    threads.shut_down()
    assert held == 2
    assert abs(order[:20].count("a") - 10) <= 2


def test_new_clients_do_not_starve_a_known_client():
    threads, numbers, done = FairThreads(1, "test"), itertools.count(), threading.Event()

    def arrive():  # Whenever a new client is answered, a further new client arrives.
        if not done.is_set() and (number := next(numbers)) < 1_000:
            threads.submit(f"new{number}", [Call(10, arrive)])

    first = threading.Event()
    threads.submit("known", [Call(10, lambda: first.wait(20)), Call(10, done.set)])
    arrive()
    arrive()
    first.set()
    assert done.wait(20)
    assert next(numbers) < 100
    threads.shut_down()


def test_no_client_is_remembered_after_all_calls_ended():
    threads = FairThreads(2, "test")
    for number in range(100):
        threads.submit(f"client{number}", [Call(10 + number, lambda: None)])
    until(lambda: not threads._tags)
    assert not threads._waiting
    threads.shut_down()


def test_new_clients_are_forgotten_while_one_client_waits():
    threads, gate, counts = FairThreads(1, "test"), threading.Event(), []
    threads.submit("first", [Call(1, lambda: gate.wait(20))])
    for number in range(200):
        threads.submit(f"new{number}", [Call(10, lambda: counts.append(len(threads._tags)))])
    threads.submit("known", [Call(10, lambda: counts.append(len(threads._tags)))] * 100)
    gate.set()
    until(lambda: len(counts) == 300)
    assert counts[-1] <= 2
    threads.shut_down()


def test_a_request_without_calls_leaves_nothing():
    threads = FairThreads(1, "test")
    assert not threads.submit("a", [])
    assert not threads._waiting
    assert not threads._tags
    threads.shut_down()
