"""Tests that a disconnect is detected, and is distinguished from other cancellations."""

import asyncio
import contextlib

import pytest

from cnn_jax.serve.limits import ClientDisconnected, cancel_on_disconnect


class Client:
    """A simulated client that has sent its request and may disconnect."""

    def __init__(self):
        self._leaves = asyncio.Event()

    def leave(self):
        self._leaves.set()

    async def receive(self):
        await self._leaves.wait()
        return {"type": "http.disconnect"}


async def work(client, answer):
    async with cancel_on_disconnect(client.receive):
        return await answer


async def begun(client):
    """Starts a request; returns the task of the request and the future of the response."""
    answer = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(work(client, answer))
    for _ in range(3):
        await asyncio.sleep(0)
    return task, answer


def run(test):
    async def run():
        before = asyncio.all_tasks()
        await asyncio.wait_for(test(), 10)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before

    asyncio.run(run())


def test_a_connected_client_gets_its_answer():
    async def test():
        client = Client()
        task, answer = await begun(client)
        answer.set_result(3)
        assert await task == 3
        assert task.cancelling() == 0

    run(test)


def test_a_disconnect_cancels_the_work():
    async def test():
        client = Client()
        task, answer = await begun(client)
        client.leave()
        with pytest.raises(ClientDisconnected):
            await task
        assert answer.cancelled()
        assert task.cancelling() == 0

    run(test)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_disconnect_cancels_nothing_after_the_context(is_first):
    async def request(client, answer):
        with contextlib.suppress(ClientDisconnected):
            await work(client, answer)
        # A cancellation that comes too late would be raised here.
        for _ in range(5):
            await asyncio.sleep(0)
        return asyncio.current_task().cancelling()

    async def test():
        client = Client()
        answer = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(request(client, answer))
        for _ in range(3):
            await asyncio.sleep(0)
        if is_first:
            client.leave()
        answer.set_result(3)
        client.leave()
        assert await task == 0

    run(test)


def test_another_cancellation_takes_precedence_over_a_disconnect():
    async def test():
        for leaves in (False, True):
            client = Client()
            task, _ = await begun(client)
            if leaves:
                client.leave()
                # In this step the watcher sees the disconnect, but does not yet cancel the task.
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(test)


def test_a_timeout_inside_stays_a_timeout():
    async def late(client):
        async with cancel_on_disconnect(client.receive), asyncio.timeout(0.02):
            await asyncio.sleep(5)

    async def test():
        with pytest.raises(TimeoutError):
            await late(Client())

    run(test)
