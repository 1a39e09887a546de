"""Tests that clients share limits and threads fairly."""

import threading

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
