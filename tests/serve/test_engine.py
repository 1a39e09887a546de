import asyncio
import contextlib
import functools
import gc
import threading
import time
import weakref

import numpy as np
import pytest

from cnn_jax.serve import engine as engine_module
from cnn_jax.serve.engine import DeadlineExceeded, Engine, Overloaded, Program, time_program
from cnn_jax.system.errors import DataError

ONE = np.zeros((2, 2, 3), np.uint8)


def image(value):
    return np.full((2, 2, 3), value, np.uint8)


class Device:
    """A simulated device that waits for `gate`, records batches, and doubles each image's value."""

    def __init__(self, is_open=True):
        self.batches = []
        self.gate = threading.Event()
        if is_open:
            self.gate.set()

    def run(self, images):
        assert self.gate.wait(10)
        self.batches.append([int(image[0, 0, 0]) for image in images])
        return [2 * int(image[0, 0, 0]) for image in images]

    def program(self, seconds=None):
        return Program(self.run, seconds or {1: 1.0, 2: 1.2, 4: 1.6})


def run_with(engine, test):
    """Starts an engine, runs a coroutine function, and closes the engine."""

    async def run():
        engine.start()
        try:
            return await asyncio.wait_for(test(), 20)
        finally:
            engine.close()

    return asyncio.run(run())


async def compute(engine, program, value, deadline=None):
    """Sends a request with one image to an engine, and returns the result."""
    (found,) = await engine.compute(program, [lambda: image(value)], deadline or later())
    return found


def later(seconds=10):
    return time.monotonic() + seconds


async def until(condition):
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it has not come to pass")


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        # On an accelerator, a larger batch takes only a little longer, so a partial batch is
        # padded.
        ({1: 1.0, 2: 1.0, 4: 1.1, 8: 1.2}, [1, 2, 4, 4, 8, 8, 8, 8, 8]),
        # On a CPU, the time grows with the batch size, so images that do not fill a batch wait.
        ({1: 1.0, 2: 1.9, 4: 3.6, 8: 7.0}, [1, 2, 2, 4, 4, 4, 4, 8, 8]),
        # If larger batches are not faster per image, the images are processed one at a time.
        ({1: 1.0, 2: 2.0, 4: 4.0}, [1, 1, 1, 1]),
    ],
)
def test_best_size_minimises_time_per_image(seconds, sizes):
    program = Program(list, seconds)
    assert [program.best_size(count) for count in range(1, len(sizes) + 1)] == sizes
    assert program.largest_size == max(seconds)


def test_time_program_compiles_before_timing():
    calls = []

    def run(images):
        calls.append(len(images))
        time.sleep(0.05 if calls.count(len(images)) == 1 else 0.001 * len(images))
        return list(images)

    program = time_program(run, ONE, (4, 1))
    assert sorted(program.seconds) == [1, 4]
    assert calls == [1, 1, 1, 1, 4, 4, 4, 4]
    assert program.seconds[1] < 0.04


def test_each_image_gets_its_own_result():
    device, engine = Device(), Engine(capacity=1000)

    async def test():
        program = device.program()
        found = await asyncio.gather(*(compute(engine, program, value) for value in range(100)))
        assert [one.result for one in found] == [2 * value for value in range(100)]

    run_with(engine, test)
    assert sum(map(len, device.batches)) >= 100
    assert max(map(len, device.batches)) == 4


def test_images_that_arrive_during_a_batch_form_one():
    device, engine = Device(is_open=False), Engine(capacity=10, decoders=1)

    async def test():
        program = device.program()
        first = asyncio.ensure_future(compute(engine, program, 1))
        await asyncio.sleep(0.05)
        others = [asyncio.ensure_future(compute(engine, program, n)) for n in (2, 3, 4)]
        await asyncio.sleep(0.05)
        device.gate.set()
        await asyncio.gather(first, *others)

    run_with(engine, test)
    # The last image is repeated to fill the compiled batch size.
    assert device.batches == [[1], [2, 3, 4, 4]]


def test_an_image_waits_at_most_max_wait():
    device, engine = Device(), Engine(capacity=10, max_wait=0.2)

    async def test():
        program = device.program()
        start = time.monotonic()
        first = asyncio.ensure_future(compute(engine, program, 1))
        await asyncio.sleep(0.05)
        second = asyncio.ensure_future(compute(engine, program, 2))
        await first
        assert 0.15 < time.monotonic() - start < 2
        await second
        # A full batch does not wait.
        start = time.monotonic()
        four = [compute(engine, program, n) for n in range(4)]
        await asyncio.gather(*four)
        assert time.monotonic() - start < 0.15

    run_with(engine, test)
    assert [len(batch) for batch in device.batches] == [2, 4]


def test_batches_have_one_program_oldest_first():
    one, other = Device(is_open=False), Device()
    engine = Engine(capacity=10, decoders=1)

    async def test():
        first, second = one.program(), other.program()
        waiting = [asyncio.ensure_future(compute(engine, first, 0))]
        await asyncio.sleep(0.05)
        for value, program in enumerate((second, first, second, first), 1):
            waiting.append(asyncio.ensure_future(compute(engine, program, value)))
        await asyncio.sleep(0.05)
        one.gate.set()
        await asyncio.gather(*waiting)

    run_with(engine, test)
    assert (one.batches, other.batches) == ([[0], [2, 4]], [[1, 3]])


def test_cancelled_images_are_never_computed():
    device, engine = Device(is_open=False), Engine(capacity=10, decoders=1)

    async def test():
        program = device.program({1: 1.0})
        first = asyncio.ensure_future(compute(engine, program, 1))
        await asyncio.sleep(0.05)
        left = asyncio.ensure_future(compute(engine, program, 2))
        last = asyncio.ensure_future(compute(engine, program, 3))
        await asyncio.sleep(0.05)
        left.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await left
        device.gate.set()
        await asyncio.gather(first, last)

    run_with(engine, test)
    assert device.batches == [[1], [3]]


def test_timed_out_images_are_never_computed():
    device, engine = Device(is_open=False), Engine(capacity=10, decoders=1)

    async def test():
        program = device.program({1: 1.0})
        first = asyncio.ensure_future(compute(engine, program, 1))
        await asyncio.sleep(0.05)
        late = asyncio.ensure_future(compute(engine, program, 2, later(0.05)))
        last = asyncio.ensure_future(compute(engine, program, 3))
        await asyncio.sleep(0.1)
        device.gate.set()
        with pytest.raises(DeadlineExceeded):
            await late
        await asyncio.gather(first, last)

    run_with(engine, test)
    assert device.batches == [[1], [3]]


def test_a_failing_program_fails_only_its_requests():
    device, engine = Device(), Engine(capacity=10)

    def fail(images):
        raise RuntimeError("the device is out of memory")

    async def test():
        failing = [compute(engine, Program(fail, {1: 1.0, 2: 1.0}), n) for n in (1, 2)]
        found = await asyncio.gather(*failing, return_exceptions=True)
        assert [str(error) for error in found] == ["the device is out of memory"] * 2
        assert (await compute(engine, device.program(), 3)).result == 6

    run_with(engine, test)


@pytest.mark.parametrize(
    ("milliseconds", "sizes"),
    [
        # An accelerator: a batch takes as long as an image, up to 16 images.
        ({1: 4, 2: 4, 4: 4, 8: 4, 16: 4, 32: 8}, [1, 2, 4, 8, 16, 32]),
        # A CPU: a batch takes as long as its images.
        ({1: 4, 2: 8, 4: 16, 8: 32, 16: 64, 32: 128}, [1, 2, 4]),
        # A CPU on which only batches of four take less time per image than single images.
        ({1: 4, 2: 9, 4: 10, 8: 20, 16: 40, 32: 80}, [1, 2, 4, 8, 16]),
    ],
)
def test_sizes_without_gain_are_not_compiled(monkeypatch, milliseconds, sizes):
    calls, now = [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run(images):
        calls.append(len(images))
        now[0] += milliseconds[len(images)] / 1000

    program = time_program(run, image(0), list(milliseconds))
    assert sorted(program.seconds) == sizes
    assert set(calls) == set(sizes)
    assert max(calls.count(size) for size in sizes) <= 4


def test_capacity_limits_images_in_flight():
    engine = Engine(capacity=8)

    async def test():
        with engine.admit(3):
            assert engine.in_flight == 3
            with pytest.raises(Overloaded, match="try again in 1 s") as caught, engine.admit(3):
                pass
            assert caught.value.headers == {"retry-after": "1"}
            with engine.admit(1):
                assert engine.in_flight == 4
            with contextlib.suppress(ZeroDivisionError), engine.admit(1):
                raise ZeroDivisionError
            assert engine.in_flight == 3
        assert engine.in_flight == 0

    run_with(engine, test)


def test_images_and_pixels_are_limited_for_each_client():
    engine = Engine(capacity=10, pixels=1_000)

    def is_refused(*amount):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(engine.admit(*amount))
            except Overloaded:
                return True
        return False

    async def test():
        assert is_refused(6, 0, "a")
        assert is_refused(1, 501, "a")
        with engine.admit(1, 500, "a"):
            assert is_refused(1, 1, "a")
            assert not is_refused(4, 0, "a")
            assert is_refused(1, 251, "b")
            with engine.admit(4, 250, "b"):
                assert is_refused(1, 1, "b")
                assert is_refused(1, 126, "c")
                assert not is_refused(2, 125, "c")
                assert is_refused(3, 0, "c")
        assert engine.in_flight == 0

    run_with(engine, test)


def test_clients_take_turns_in_batches():
    device, engine = Device(is_open=False), Engine(capacity=100, decoders=1)

    async def test():
        program = device.program({1: 1.0, 2: 1.0})

        def ask(value, client):
            reads = [functools.partial(image, value)]
            return asyncio.ensure_future(engine.compute(program, reads, later(), client=client))

        asked = [ask(0, "a")]
        await until(lambda: engine._computing_since is not None)
        for value, client in enumerate("aaaabc", 1):
            asked.append(ask(value, client))
            await until(lambda: len(engine._waiting) == value)  # noqa: B023
        device.gate.set()
        await asyncio.gather(*asked)

    run_with(engine, test)
    assert device.batches == [[0], [1, 5], [2, 6], [3, 4]]


def test_large_images_leave_threads_for_others():
    engine, decoder = Engine(capacity=100, decoders=2), Decoder()

    async def test():
        program = Device().program()
        held = [
            asyncio.ensure_future(
                engine.compute(program, [decoder.read(value)] * 2, later(), [5_000_000] * 2)
            )
            for value in (1, 2, 3)
        ]
        await until(lambda: decoder.started == [1])
        small = [
            asyncio.ensure_future(engine.compute(program, [decoder.read(value)], later()))
            for value in (7, 8)
        ]
        await until(lambda: set(decoder.started) == {1, 7, 8})
        decoder.gate.set()
        await asyncio.gather(*held, *small)

    run_with(engine, test)


def test_no_thread_group_keeps_answered_clients():
    engine = Engine(capacity=100)
    groups = (engine._decoders, engine._large_decoders, engine._parser)

    async def test():
        program = Device().program()
        for number in range(50):
            reads = [functools.partial(image, number)]
            await engine.compute(program, reads, later(), client=f"client{number}")
        await until(lambda: not any(group._waiting for group in groups))

    run_with(engine, test)


class Decoder:
    """A decoder that waits for `gate`, and records the value of each image that it decodes."""

    def __init__(self):
        self.started = []
        self.gate = threading.Event()

    def read(self, value):
        def read():
            assert threading.current_thread().name.startswith("decode")
            self.started.append(value)
            assert self.gate.wait(10)
            return image(value)

        return read


def test_decoding_runs_on_threads_before_the_deadline():
    engine, decoder, device = Engine(capacity=10, decoders=2), Decoder(), Device()

    async def test():
        def ask(value, deadline):
            work = engine.compute(device.program(), [decoder.read(value)], deadline)
            return asyncio.ensure_future(work)

        held = [ask(value, later()) for value in (1, 2)]
        late, left = ask(3, later(0.05)), ask(4, later())
        await until(lambda: len(decoder.started) == 2)
        await asyncio.sleep(0.1)
        left.cancel()
        # The cancelled task needs time to clear its queue of images.
        await asyncio.sleep(0.05)
        decoder.gate.set()
        assert [(await one)[0].result for one in held] == [2, 4]
        with pytest.raises(DeadlineExceeded):
            await late

    run_with(engine, test)
    assert sorted(decoder.started) == [1, 2]
    assert sorted(value for batch in device.batches for value in batch) == [1, 2]


@pytest.mark.parametrize("is_running", [True, False])
def test_a_thread_that_is_busy_does_not_delay_a_deadline(is_running):
    engine, gate = Engine(capacity=10, decoders=1), threading.Event()

    async def test():
        calls = [] if is_running else [asyncio.ensure_future(engine.run_on_parser(wait, later()))]
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(engine.run_on_parser(wait, later(0.1)), 5)
        gate.set()
        await asyncio.gather(*calls)
        assert await engine.run_on_parser(lambda: 3, later()) == 3

    def wait():
        assert gate.wait(10)

    run_with(engine, test)


def test_results_and_errors_keep_their_order():
    engine, device = Engine(capacity=100, decoders=3), Device()

    def read(value):
        if value % 3 == 0:
            raise DataError(f"number {value} is damaged")
        time.sleep(0.001 * (value % 5))
        return image(value)

    async def test():
        reads = [functools.partial(read, value) for value in range(20)]
        found = await engine.compute(device.program(), reads, later())
        for value, one in enumerate(found):
            if value % 3 == 0:
                assert str(one) == f"number {value} is damaged"
                continue
            assert one.result == 2 * value
            np.testing.assert_array_equal(one.pixels, image(value))
        everything = [functools.partial(read, 3)] * 2
        assert all(
            isinstance(one, DataError)
            for one in await engine.compute(device.program(), everything, later())
        )

    run_with(engine, test)


def test_requests_of_a_client_take_turns_at_the_decoders():
    engine, decoder = Engine(capacity=100, decoders=2), Decoder()

    async def test():
        program = Device().program()
        many = [decoder.read(value) for value in range(10)]
        held = asyncio.ensure_future(engine.compute(program, many, later()))
        await until(lambda: decoder.started == [0, 1])
        others = [
            asyncio.ensure_future(engine.compute(program, [decoder.read(n)], later()))
            for n in (78, 79)
        ]
        await asyncio.sleep(0.05)
        decoder.gate.set()
        await asyncio.gather(held, *others)

    run_with(engine, test)
    assert max(decoder.started.index(n) for n in (78, 79)) <= 5


def test_an_unexpected_decode_error_fails_the_request():
    engine = Engine(capacity=10, decoders=1)

    def fail():
        raise ZeroDivisionError("a fault of the decoder")

    async def test():
        with pytest.raises(ZeroDivisionError):
            await engine.compute(Device().program(), [fail, lambda: image(1)], later())
        assert (await compute(engine, Device().program(), 2)).result == 4

    run_with(engine, test)


def test_cancelled_requests_free_their_images():
    """The memory of a cancelled request is freed while all decoder threads are busy."""
    engine, decoder = Engine(capacity=100, decoders=2), Decoder()
    program = Device().program()

    async def leave_behind(ask):
        """Sends a request and cancels it; returns a weak reference to the request's image."""
        held = [image(5)]
        gone = weakref.ref(held[0])
        left = asyncio.ensure_future(ask(held.pop()))
        await asyncio.sleep(0.02)
        assert gone() is not None
        left.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await left
        return gone

    async def test():
        held = [
            asyncio.ensure_future(engine.compute(program, [decoder.read(n)], later()))
            for n in (1, 2)
        ]
        await until(lambda: len(decoder.started) == 2)
        asks = (
            lambda of: engine.compute(program, 6 * [functools.partial(np.copy, of)], later()),
            lambda of: engine.run_on_decoder(functools.partial(np.copy, of), later()),
        )
        for ask in asks:
            gone = await leave_behind(ask)
            # The event loop keeps its last callback alive until the next step.
            await asyncio.sleep(0)
            gc.collect()
            assert gone() is None
        decoder.gate.set()
        await asyncio.gather(*held)

    run_with(engine, test)


def test_an_idle_engine_holds_no_images():
    engine = Engine(capacity=10)

    async def test():
        device = Device()
        program = device.program()
        gone = [weakref.ref(program), weakref.ref(device)]
        found = (await compute(engine, program, 3)).pixels
        gone.append(weakref.ref(found))
        del device, program, found
        await asyncio.sleep(0.1)
        gc.collect()
        assert [one() for one in gone] == [None] * 3

    run_with(engine, test)


def test_close_returns_although_the_device_hangs(monkeypatch):
    monkeypatch.setattr(engine_module, "_CLOSING_SECONDS", 0.1)
    engine, device = Engine(capacity=10), Device(is_open=False)

    async def test():
        engine.start()
        with pytest.raises(DeadlineExceeded):
            await compute(engine, device.program(), 1, later(0.1))
        assert not engine.close()
        device.gate.set()
        await until(engine.close)

    asyncio.run(test())


def test_calls_run_on_threads_before_the_deadline():
    engine = Engine(capacity=10)

    async def test():
        name = await engine.run_on_decoder(lambda: threading.current_thread().name, later())
        assert name.startswith("decode")
        name = await engine.run_on_parser(lambda: threading.current_thread().name, later())
        assert name.startswith("parse")
        with pytest.raises(DeadlineExceeded):
            await engine.run_on_decoder(lambda: None, later(-1))

    run_with(engine, test)


def test_on_batch_counts_images_without_padding():
    batches = []
    device = Device(is_open=False)
    engine = Engine(capacity=10, on_batch=lambda images, seconds: batches.append((images, seconds)))

    async def test():
        program = device.program()
        first = asyncio.ensure_future(compute(engine, program, 0))
        await asyncio.sleep(0.05)
        three = [asyncio.ensure_future(compute(engine, program, n)) for n in (1, 2, 3)]
        await asyncio.sleep(0.05)
        device.gate.set()
        await asyncio.gather(first, *three)

    run_with(engine, test)
    assert [images for images, _ in batches] == [1, 3]
    assert all(seconds >= 0 for _, seconds in batches)
