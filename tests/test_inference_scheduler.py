"""Who computes what, and whose pages go: the scheduler over its pages, without a model."""

from collections.abc import Sequence
from itertools import count

import pytest

from minim3.inference.pages import PagePool
from minim3.inference.request import Request, SamplingParams
from minim3.inference.scheduler import Chunk, Scheduler

NUMBERS = count()


def make(
    num_pages: int | None = None, budget: int = 64, max_running: int = 8, prefix_caching: bool = True
) -> Scheduler:
    pool = PagePool(page_size=4, num_pages=num_pages or 64, max_pages=num_pages, prefix_caching=prefix_caching)
    return Scheduler(max_tokens_per_step=budget, max_running=max_running, pool=pool)


def queue(
    scheduler: Scheduler, num_tokens: int, new_tokens: int = 1, *, priority: int = 0, first: int | None = None
) -> Request:
    """A prompt unlike any other, unless `first` names its first token; the others are 1."""
    request = Request(
        request_id="r", token_ids=[100 + next(NUMBERS) if first is None else first] + [1] * (num_tokens - 1),
        num_prompt_tokens=num_tokens, max_new_tokens=new_tokens, params=SamplingParams(), priority=priority,
    )  # fmt: skip
    scheduler.add(request)
    return request


def step(scheduler: Scheduler) -> dict[Request, int]:
    """Plan and compute a step, with token 7 for whoever gets one; the tokens each request computed."""
    plan = scheduler.schedule()
    for chunk in plan:
        commit(scheduler, chunk)
    scheduler.check_integrity()
    scheduler.pool.check_integrity([*scheduler.running, *scheduler.waiting])
    return {chunk.request: chunk.num_tokens for chunk in plan}


def commit(scheduler: Scheduler, chunk: Chunk) -> None:
    request, reaches_end = chunk.request, chunk.reaches_end
    assert request in scheduler.running
    request.num_computed_tokens += chunk.num_tokens
    assert len(request.pages) * 4 >= request.num_computed_tokens
    if reaches_end:
        request.token_ids.append(7)
    if request.num_output_tokens == request.max_new_tokens:
        request.finish_reason = "length"
        scheduler.remove(request)
    else:
        scheduler.pool.publish(request)
        scheduler.published(request)


def steps_until_done(scheduler: Scheduler, requests: Sequence[Request], most: int = 1000) -> list[int]:
    """The step in which each request got its last token."""
    done: dict[Request, int] = {}
    for number in range(most):
        if not scheduler.has_work:
            break
        step(scheduler)
        done |= {request: number for request in requests if request.finished and request not in done}
    assert not scheduler.has_work
    return [done[request] for request in requests]


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    """A later small request may not take the pages that an earlier one waits for: the large one would starve."""
    scheduler = make(num_pages=5)
    first, second, third = (queue(scheduler, size) for size in (12, 16, 4))
    assert [chunk.request for chunk in scheduler.schedule()] == [first]
    assert list(scheduler.waiting) == [second, third]
    scheduler.remove(first)
    assert {chunk.request for chunk in scheduler.schedule()} == {second, third}
    scheduler.check_integrity()


def test_short_prompts_pass_a_long_one_which_still_moves_on() -> None:
    """In order of arrival a prompt of 10 steps holds up everyone behind it; shortest first it might never end."""
    scheduler = make(budget=20)
    long = queue(scheduler, 200)
    shorts = [queue(scheduler, 10) for _ in range(6)]
    for number in range(6):
        computed = step(scheduler)
        assert computed[long] == 10
        assert shorts[number].finished
    assert step(scheduler) == {long: 20}


def test_every_decoding_request_gets_its_token_beside_prompts() -> None:
    scheduler = make(budget=8)
    decoding = [queue(scheduler, 2, 30) for _ in range(3)]
    step(scheduler)
    prompts = [queue(scheduler, 100), queue(scheduler, 50)]
    for _ in range(20):
        computed = step(scheduler)
        assert all(computed[request] == 1 for request in decoding)
        assert sum(computed.values()) == 8
        assert computed[prompts[0]] >= 3


def test_the_latest_of_the_lowest_priority_is_preempted() -> None:
    """Any other victim lets requests take turns in throwing each other out, or lets a later one win."""
    scheduler = make(num_pages=8, prefix_caching=False)
    low = queue(scheduler, 4, 12, priority=-1)
    early, late = queue(scheduler, 4, 12), queue(scheduler, 4, 12)
    everyone = [low, early, late]
    victims: list[Request] = []
    while not all(request.finished for request in everyone):
        before = {request: request.num_preemptions for request in everyone}
        step(scheduler)
        victims += [request for request in everyone if request.num_preemptions > before[request]]
    assert victims[0] is low
    assert early not in victims
    assert scheduler.num_preemptions == len(victims)


def test_the_highest_priority_does_not_wait_for_pages_or_places() -> None:
    for scheduler in (make(num_pages=4), make(max_running=1)):
        low = queue(scheduler, 8, 8)
        for _ in range(3):
            step(scheduler)
        high = queue(scheduler, 12, 2, priority=1)
        equal = queue(scheduler, 4, 2)
        assert high in step(scheduler)
        assert low in scheduler.waiting
        assert low.num_preemptions == 1
        steps_until_done(scheduler, [low, high, equal])
        assert low.num_output_tokens == 8


def test_starved_of_pages_everyone_ends_in_order() -> None:
    """Requests that hold pages and wait for each other's would stand for ever."""
    scheduler = make(num_pages=6, budget=6)
    requests = [queue(scheduler, 3 + 5 * (i % 3), 9) for i in range(9)]
    done = steps_until_done(scheduler, requests)
    assert done[0] < done[-1]
    assert scheduler.pool.num_used_pages == 0


def test_a_prompt_is_computed_once_for_all_that_begin_with_it() -> None:
    """n answers to one prompt that start together would all compute it, for none has finished a page yet."""
    scheduler = make(budget=8, max_running=4)
    same = [queue(scheduler, 18, 3, first=5) for _ in range(3)]
    other = queue(scheduler, 4, 3)
    computed = [step(scheduler) for _ in range(3)]
    assert [set(found) for found in computed] == [{same[0], other}, {same[0], other}, {same[0], other}]
    steps_until_done(scheduler, [*same, other])
    assert [request.num_cached_tokens for request in same] == [0, 16, 16]
    assert not scheduler._promised


def test_an_aborted_leader_leaves_its_prompt_to_the_next() -> None:
    """A promise nobody keeps would let the others wait for ever."""
    scheduler = make(budget=8)
    first, second = (queue(scheduler, 18, 3, first=6) for _ in range(2))
    step(scheduler)
    assert second in scheduler.waiting
    scheduler.remove(first)
    assert second in step(scheduler)
    assert second.num_cached_tokens == 8, "what the first had computed is still there"


def test_a_preempted_request_finds_what_is_left_of_its_pages() -> None:
    """Computing all of a long prompt again for one page would be the dearest way to get it."""
    scheduler = make(num_pages=8)
    low = queue(scheduler, 20, 8, priority=-1)
    step(scheduler)
    queue(scheduler, 12, 2, priority=1)
    step(scheduler)
    assert low in scheduler.waiting
    for _ in range(4):
        computed = step(scheduler)
    assert low.num_computed_tokens >= 20
    assert sum(computed.values()) == 1


def test_drafts_take_only_what_is_over() -> None:
    """Drafts that push prompts out of the budget, or take pages from others, cost more than they gain."""
    scheduler = make(num_pages=6, budget=8)
    decoding = queue(scheduler, 4, 9)
    step(scheduler)
    decoding.draft_ids = [1, 2, 3, 4, 5, 6, 7]
    prompt = queue(scheduler, 8)
    plan = {chunk.request: chunk for chunk in scheduler.schedule()}
    assert len(plan[decoding].draft_ids) == 3
    assert plan[prompt].num_tokens == 4
    scheduler = make(num_pages=2)
    first, second = queue(scheduler, 3, 2), queue(scheduler, 3, 5)
    step(scheduler)
    second.draft_ids = [1, 2, 3]
    assert scheduler.schedule() == [Chunk(first, 1, []), Chunk(second, 1, [])]
    scheduler.remove(first)
    assert scheduler.schedule() == [Chunk(second, 1, [1, 2, 3])]


def test_bad_sizes_and_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens_per_step must be at least 1, got 0"):
        make(budget=0)
    with pytest.raises(ValueError, match="max_running must be at least 1, got 0"):
        make(max_running=0)
    with pytest.raises(ValueError, match=r"may need 5 pages of 4 tokens \(10 prompt \+ 8 new tokens\).* has 4"):
        queue(make(num_pages=4), 10, 8)
