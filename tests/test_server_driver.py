"""The engine's thread and its asyncio side, without HTTP."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minim3.inference.request import SamplingParams
from minim3.server.driver import EngineDriver
from minim3.server.errors import APIError, TooManyRequests, Unavailable
from minim3.server.generation import Call, EventStream
from minim3.server.metrics import Metrics
from minim3.server.settings import ServerSettings
from tests.running_servers import ScriptedEngine

PROMPT = list(range(10, 40))
PARAMS = SamplingParams(max_new_tokens=50)


@asynccontextmanager
async def driving(engine: ScriptedEngine, **options: Any) -> AsyncIterator[EngineDriver]:
    driver = EngineDriver(engine, ServerSettings(**options), Metrics())
    driver.start()
    try:
        yield driver
    finally:
        engine.gate.set()
        await driver.stop()


async def read_all(submission: Any) -> dict[Any, list[int]]:
    found: dict[Any, list[int]] = {request: [] for request in submission.requests}
    while (events := await submission.next()) is not None:
        for event in events:
            found[event.request].append(event.token_id)
    return found


def test_every_choice_gets_its_tokens_and_an_abort_after_the_end_takes_nothing_from_the_others() -> None:
    """A reader that stops an answer which the engine has ended meanwhile must not count it as ended twice."""

    async def run() -> None:
        engine = ScriptedEngine(lambda _, i: [50 + i] * (5 if i == 0 else 30))
        async with driving(engine) as driver:
            submission = await driver.submit(PROMPT, PARAMS, num_choices=2)
            while engine.stats.num_generated_tokens < 20:
                await asyncio.sleep(0.01)
            submission.abort(submission.requests[0])  # it ended at its fifth token
            submission.abort(submission.requests[0])
            found = await read_all(submission)
            assert [len(ids) for ids in found.values()] == [5, 30]

    asyncio.run(run())


def test_nothing_comes_after_an_abort() -> None:
    async def run() -> None:
        engine = ScriptedEngine(lambda _, i: [50 + i] * 40, step_seconds=0.005)
        async with driving(engine) as driver:
            submission = await driver.submit(PROMPT, PARAMS, num_choices=2)
            events = await submission.next()
            assert events is not None
            submission.abort(submission.requests[1])
            found = await read_all(submission)
            first, second = submission.requests
            assert len(found[first]) >= 38
            assert len(found[second]) <= 2
            assert engine.requests == {}

    asyncio.run(run())


def test_questions_are_not_left_unanswered() -> None:
    """A coroutine that waits for a thread which has ended would wait for ever."""

    async def run() -> None:
        engine = ScriptedEngine(lambda _, i: [50] * 10)
        async with driving(engine) as driver:
            engine.gate.clear()
            submission = await driver.submit(PROMPT, PARAMS)
            engine.fail_steps = 1

            def broken() -> None:
                raise AssertionError

            engine.check_integrity = broken  # type: ignore[method-assign]
            asked = asyncio.ensure_future(driver.run_in_engine(lambda _: 1))
            late = asyncio.ensure_future(asyncio.sleep(0.2, None))
            engine.gate.set()
            await late
            with pytest.raises(APIError):
                await submission.next()
            assert await asyncio.wait_for(asyncio.gather(asked, return_exceptions=True), 5)
            with pytest.raises(Unavailable):
                await driver.run_in_engine(lambda _: 1)
            with pytest.raises(Unavailable):
                driver.reserve()

    asyncio.run(run())


def test_a_thread_that_fails_between_two_steps_is_told() -> None:
    """A command that raises would end the engine's thread in silence: a server that is healthy and never answers."""

    async def run() -> None:
        engine = ScriptedEngine(lambda _, i: [50] * 40, step_seconds=0.01)
        async with driving(engine) as driver:
            leaves, stays = [await driver.submit(PROMPT, PARAMS) for _ in range(2)]

            def broken(_: str) -> None:
                raise AssertionError

            engine.abort = broken  # type: ignore[method-assign]
            leaves.cancel()
            with pytest.raises(APIError):
                await asyncio.wait_for(read_all(stays), 5)
            assert driver.failure is not None
            with pytest.raises(Unavailable):
                driver.reserve()

    asyncio.run(run())


def test_a_request_that_ends_in_the_step_that_fails_is_told() -> None:
    """It runs no more, so it is not among those that are aborted; its last event was lost: it would wait for ever."""

    async def run() -> None:
        engine = ScriptedEngine(lambda _, i: [50])
        async with driving(engine) as driver:
            engine.fail_steps = 1
            submission = await driver.submit(PROMPT, PARAMS)
            with pytest.raises(APIError):
                await asyncio.wait_for(read_all(submission), 5)
            assert driver._by_request == {}
            assert driver.failure is None

    asyncio.run(run())


def test_a_client_that_reads_no_more_keeps_its_place_no_longer_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time limits for tokens alone: who fills the socket's buffers and stops reading holds a place for ever."""
    monkeypatch.setattr("minim3.server.generation.LAST_WRITE_SECONDS", 0.1)

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def events() -> AsyncIterator[str]:
        yield "data: 1\n\n"

    async def run() -> None:
        async with driving(ScriptedEngine(), request_seconds=0.1) as driver:
            state: Any = SimpleNamespace(settings=driver.settings, driver=driver, metrics=driver.metrics)
            stream = EventStream(events(), Call(state, 1))
            assert driver.num_active == 1
            await asyncio.wait_for(stream({"type": "http"}, never, never), 5)
            assert driver.num_active == 0

    asyncio.run(run())


def test_places_are_given_back_once() -> None:
    async def run() -> None:
        async with driving(ScriptedEngine(), max_running=2, max_waiting=1) as driver:
            places = driver.reserve(3)
            with pytest.raises(TooManyRequests):
                driver.reserve()
            places.release()
            places.release()
            assert driver.num_active == 0
            with driver.reserve(2):
                assert driver.num_active == 2
            driver.draining = True
            with pytest.raises(Unavailable):
                driver.reserve()

    asyncio.run(run())


def test_a_prompt_the_engine_refuses_leaves_nothing() -> None:
    async def run() -> None:
        async with driving(ScriptedEngine()) as driver:
            with pytest.raises(ValueError, match="outside the vocabulary"):
                await driver.submit([10**6], PARAMS, num_choices=3)
            assert driver._submissions == set()
            assert driver.engine.requests == {}

    asyncio.run(run())


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2))
def test_arrivals_cancels_and_failures_lose_nothing(seed: int, num_failures: int) -> None:
    """Whatever happens to the others, a request ends whole, with its own error, or because it was cancelled; at the end
    every page is free and nothing is remembered."""

    async def run() -> None:
        rng = random.Random(seed)
        engine = ScriptedEngine(lambda prompt, i: [prompt[0] + i] * (3 + prompt[0] % 20), step_seconds=0.001)
        async with driving(engine) as driver:

            async def one(number: int) -> str:
                await asyncio.sleep(rng.random() * 0.2)
                first = 50 + number
                choices = rng.choice((1, 1, 3))
                submission = await driver.submit([first, *PROMPT], PARAMS, num_choices=choices)
                leaves = rng.random() < 0.3
                found: dict[Any, list[int]] = {request: [] for request in submission.requests}
                try:
                    while (events := await submission.next()) is not None:
                        for event in events:
                            found[event.request].append(event.token_id)
                        if leaves:
                            submission.cancel()
                            return "left"
                except APIError:
                    return "failed"
                for i, ids in enumerate(found.values()):
                    assert ids == [first + i] * (3 + first % 20)
                return "whole"

            asking = [asyncio.ensure_future(one(number)) for number in range(20)]
            await asyncio.sleep(0.1)
            engine.fail_steps = num_failures
            ends = await asyncio.gather(*asking)
            assert num_failures or "failed" not in ends
            await driver.run_in_engine(lambda engine: engine.check_integrity())
            assert await driver.run_in_engine(lambda engine: engine.requests) == {}
            assert engine.cache.pool.num_used_pages == 0
            assert driver._submissions == set()
            assert driver._by_request == {}

    asyncio.run(run())
