"""The engine over its scheduler and pages, on a stand-in for the model that reads everything back through the pages."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minim3.config import MiniMaxM3VLTextConfig
from minim3.inference.engine import Engine, TokenEvent
from minim3.inference.request import Media, Request, SamplingParams
from minim3.model.batch import ForwardBatch

VOCABULARY = 97
CONFIG = MiniMaxM3VLTextConfig(
    vocab_size=VOCABULARY, hidden_size=1, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, head_dim=4,
    rotary_dim=2, max_position_embeddings=60, intermediate_size=4, dense_intermediate_size=4,
    shared_intermediate_size=4, num_local_experts=2, num_experts_per_tok=1, index_n_heads=1, index_head_dim=4,
    index_block_size=4, index_topk_blocks=2, eos_token_id=2, layer_types=("full_attention", "minimax_m3_sparse"),
)  # fmt: skip


class HashingModel(nn.Module):
    """Stands in for the text model: the next token is a hash of all tokens so far.

    The hash reads K of one layer and the index keys of another through the page table, so that a lost, stale, foreign
    or misplaced key changes the answer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = self.text_config = CONFIG
        self.text_model = self
        self.num_tokens_run: list[int] = []

    def pack_for_inference(self) -> None:
        """There is nothing to pack."""

    def embed_tokens_packed(self, input_ids: Tensor) -> Tensor:
        return input_ids.float()[:, None]

    def forward_packed(self, inputs_embeds: Tensor, batch: ForwardBatch) -> Tensor:
        pages = batch.pages
        assert pages is not None
        assert torch.is_inference_mode_enabled()
        self.num_tokens_run.append(batch.num_tokens)
        page, offset = pages.slots // pages.page_size, pages.slots % pages.page_size
        pages.layers[0].k[page, :, offset] = inputs_embeds[:, None].expand(-1, 1, 4)
        assert pages.layers[1].index_k is not None
        pages.layers[1].index_k[page, offset] = inputs_embeds.expand(-1, 4)
        keys = pages.layers[0].k.transpose(1, 2).reshape(-1, 4)[:, 0]
        index_keys = pages.layers[1].index_k.reshape(-1, 4)[:, 0]
        hashes, first = [], 0
        for row, (length_q, length_k) in enumerate(zip(batch.lengths_q, batch.lengths_k, strict=True)):
            assert batch.positions[first : first + length_q].tolist() == list(range(length_k - length_q, length_k))
            first += length_q
            where = torch.arange(length_k)
            slots = pages.page_table[row, where // pages.page_size] * pages.page_size + where % pages.page_size
            terms = keys[slots] * (where + 3) + index_keys[slots] * (7 * where + 1)
            hashes.append(terms.cumsum(0)[-length_q:])
        return torch.cat(hashes)[:, None]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        choice = hidden % VOCABULARY
        return -(torch.arange(VOCABULARY) - choice).abs()  # NaN keys make NaN logits


MODEL = HashingModel()


def expected_answer(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(sum(t * (i + 3) + t * (7 * i + 1) for i, t in enumerate(ids)) % VOCABULARY)
    return ids[len(prompt) :]


def greedy(count: int, **options: object) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, **options)  # type: ignore[arg-type]


def assert_nothing_held(engine: Engine) -> None:
    engine.check_integrity()
    assert engine.cache.pool.num_used_pages == 0
    assert not engine.requests
    assert not engine.sampler._streams
    assert not engine._texts


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 25), st.integers(1, 12), st.booleans()), min_size=1, max_size=8
    ),
    budget=st.integers(1, 40),
    page_size=st.integers(1, 9),
    num_pages=st.sampled_from([None, 40, 60]),
    max_running=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_answers_do_not_depend_on_company_chunks_or_pages(
    arrivals: list[tuple[int, int, int, bool]],
    budget: int,
    page_size: int,
    num_pages: int | None,
    max_running: int,
    seed: int,
) -> None:
    """Random arrivals and aborts over shuffled, NaN-poisoned pages: every answer is its own, and every page comes back.

    Prevents pitfalls 3 (index keys left behind when pages are freed and reused), 6 (blocks tied to physical pages) and
    17 (garbage past the end of a sequence).
    """
    rng = random.Random(seed)
    engine = Engine(
        MODEL, page_size=page_size, max_tokens_per_step=budget, max_running=max_running, num_pages=num_pages,
        initial_pages=1, shuffle_seed=seed, poison=True,
    )  # fmt: skip
    waiting = sorted(((step, prompt, new, aborts) for step, prompt, new, aborts in arrivals), key=lambda a: a[0])
    requests: list[Request] = []
    doomed: list[Request] = []
    for step in range(2000):
        while waiting and waiting[0][0] <= step:
            _, prompt, new, aborts = waiting.pop(0)
            ids = [rng.randrange(VOCABULARY) for _ in range(prompt)]
            requests.append(engine.add_request(ids, greedy(new)))
            if aborts:
                doomed.append(requests[-1])
        engine.step()
        assert MODEL.num_tokens_run.pop() <= budget if MODEL.num_tokens_run else True
        engine.check_integrity()
        if doomed and not doomed[0].finished and rng.random() < 0.2:
            victim = doomed.pop(0)
            engine.abort(victim.request_id)
            assert victim.pages == []
        if not waiting and not engine.scheduler.has_work:
            break
    assert_nothing_held(engine)
    for request in requests:
        answer = expected_answer(request.token_ids[: request.num_prompt_tokens], request.max_new_tokens)
        if request.finish_reason == "abort":
            assert request.output_ids == answer[: request.num_output_tokens]
        else:
            assert request.finish_reason == "length"
            assert request.output_ids == answer


def test_decoding_requests_are_not_held_up_by_a_long_prompt() -> None:
    """A prompt computed before the decoding requests would stall every stream while it is read."""
    engine = Engine(MODEL, max_tokens_per_step=8)
    short = engine.add_request([1, 2, 3], greedy(20))
    engine.step()
    long = engine.add_request(list(range(50)), greedy(1))
    for count in range(2, 9):
        engine.step()
        assert short.num_output_tokens == count
        assert long.num_computed_tokens == 7 * (count - 1)
    engine.abort_all()
    assert_nothing_held(engine)


def test_page_table_follows_a_trimmed_request() -> None:
    """A table that is only appended to would still show the pages that were taken away."""
    engine = Engine(MODEL, max_tokens_per_step=64, shuffle_seed=3, poison=True)
    prompt = list(range(5, 25))
    request = engine.add_request(prompt, greedy(9))
    engine.step()
    engine.step()
    engine.cache.trim(request, 3)  # all that follows is computed again
    other = engine.add_request([9] * 18, greedy(3))
    engine.run()
    assert request.output_ids == expected_answer(prompt, 9)
    assert other.output_ids == expected_answer([9] * 18, 3)
    assert_nothing_held(engine)


def test_cache_grows_by_doubling_and_keeps_its_content() -> None:
    """Pages copied to the wrong place while the pool grows would change answers halfway."""
    engine = Engine(MODEL, initial_pages=1, poison=True)
    requests = [engine.add_request([i, 3, 5], greedy(30)) for i in range(4)]
    sizes = {engine.cache.num_pages}
    for _ in engine.stream():
        sizes.add(engine.cache.num_pages)
    assert sizes == {1, 4, 8, 16, 32}
    for i, request in enumerate(requests):
        assert request.output_ids == expected_answer([i, 3, 5], 30)
    assert_nothing_held(engine)


def test_request_larger_than_the_cache_is_refused_at_once() -> None:
    """Queued, it would block everyone behind it for ever."""
    engine = Engine(MODEL, num_pages=4)
    with pytest.raises(ValueError, match=r"may need 5 pages of 4 tokens .* has 4"):
        engine.add_request([1] * 10, greedy(8))
    assert_nothing_held(engine)


def test_ending_at_eos_length_and_the_last_position() -> None:
    answer = expected_answer([1, 2, 3], 57)
    first = answer.index(answer[5])
    engine = Engine(MODEL)
    stops = engine.add_request([1, 2, 3], greedy(40, eos_token_ids=(200, answer[5])))
    ignores = engine.add_request([1, 2, 3], greedy(8, eos_token_ids=(answer[5],), ignore_eos=True))
    longest = engine.add_request([1, 2, 3], greedy(1000))
    full = engine.add_request([4] * 60, greedy(1000))
    engine.run()
    assert (stops.output_ids, stops.finish_reason) == (answer[: first + 1], "stop")
    assert (ignores.output_ids, ignores.finish_reason) == (answer[:8], "length")
    # 60 positions: 3 prompt tokens, 57 fed answers, and one more token that is never fed.
    assert longest.num_output_tokens == 58
    assert full.output_ids == expected_answer([4] * 60, 1)
    with pytest.raises(ValueError, match=r"61 tokens.*at most 60"):
        engine.add_request([4] * 61)
    assert_nothing_held(engine)


def test_bad_prompts_are_refused_by_name() -> None:
    engine = Engine(MODEL)
    with pytest.raises(ValueError, match="empty"):
        engine.add_request([])
    with pytest.raises(ValueError, match=r"token id 97 .* vocabulary of 97"):
        engine.add_request([1, 97])
    media = Media(pixel_values=torch.zeros(4, 1176), image_grid_thw=torch.tensor([[1, 2, 2]]))
    with pytest.raises(ValueError, match="text-only"):
        engine.add_request([1], media=media)
    with pytest.raises(ValueError, match="pixel_values was given without image_grid_thw"):
        engine.add_request([1], media={"pixel_values": torch.zeros(4, 1176)})
    engine.add_request([1], request_id="twice")
    with pytest.raises(ValueError, match="'twice' is already running"):
        engine.add_request([1], request_id="twice")
    with pytest.raises(ValueError, match="no request named 'nobody'"):
        engine.abort("nobody")
    engine.abort("twice")
    assert_nothing_held(engine)


def test_interrupted_step_did_not_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a step: nothing is committed, so that the step can be repeated, and nothing leaks."""
    engine = Engine(MODEL, max_tokens_per_step=8, poison=True)
    request = engine.add_request(list(range(12)), greedy(6))
    engine.step()
    engine.step()
    run = engine.runner.run

    def interrupted(plan: object) -> object:
        run(plan)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.check_integrity()
    assert request.num_output_tokens == 1
    monkeypatch.setattr(engine.runner, "run", run)
    for _ in range(3):
        engine.step()
    assert request.output_ids == expected_answer(list(range(12)), 6)[:4]
    monkeypatch.setattr(engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert request.finish_reason == "abort"
    assert_nothing_held(engine)


def test_closing_a_stream_frees_its_pages() -> None:
    """A reader that goes away would otherwise leave its request running for nobody."""
    engine = Engine(MODEL)
    engine.add_request([1, 2, 3], greedy(30))
    engine.add_request([4], greedy(30))
    stream = engine.stream()
    assert isinstance(next(stream), TokenEvent)
    assert engine.cache.pool.num_used_pages > 0
    stream.close()
    assert_nothing_held(engine)


class LetterDetokenizer:
    """Id i is the i-th letter of the alphabet, except that ids 0 and 1 together make one two-part character."""

    def __init__(self) -> None:
        self.open = False

    def feed(self, token_id: int) -> str:
        if token_id % 26 == 0:
            self.open = True
            return ""
        shown = "é" if self.open else ""
        self.open = False
        return shown + chr(ord("a") + token_id % 26)

    def finish(self) -> str:
        shown = "\N{REPLACEMENT CHARACTER}" if self.open else ""
        self.open = False
        return shown


def certain_text(ids: list[int]) -> str:
    return "".join(map(LetterDetokenizer().feed, ids))


def whole_text(ids: list[int]) -> str:
    detokenizer = LetterDetokenizer()
    return "".join(map(detokenizer.feed, ids)) + detokenizer.finish()


@settings(max_examples=60, deadline=None)
@given(prompt=st.lists(st.integers(0, 96), min_size=1, max_size=5), place=st.integers(0, 20), length=st.integers(1, 5))
def test_stop_string_ends_the_request_and_is_never_shown(prompt: list[int], place: int, length: int) -> None:
    """A stop string across token borders has to be found, and none of it may have been streamed before."""
    answer = expected_answer(prompt, 25)
    text = whole_text(answer)
    stop = text[place : place + length]
    engine = Engine(MODEL)
    params = SamplingParams(max_new_tokens=25, stop=(stop,) if stop else ())
    request = engine.add_request(prompt, params, detokenizer=LetterDetokenizer())
    shown = "".join(event.text for event in engine.stream())
    assert shown == request.text
    if stop:
        assert shown == text[: text.index(stop)]
        found_after = next((n for n in range(1, 26) if stop in certain_text(answer[:n])), None)
        assert request.num_output_tokens == (found_after or 25)
        assert request.finish_reason == ("stop" if found_after else "length")
    else:
        assert shown == text
    assert_nothing_held(engine)


def test_stop_strings_need_a_detokenizer() -> None:
    with pytest.raises(ValueError, match="need a tokenizer"):
        Engine(MODEL).add_request([1], SamplingParams(stop=("x",)))


def test_sampled_request_is_the_same_alone_and_in_company() -> None:
    """The stream of a request belongs to it: company, chunks and the order of arrival leave it alone."""
    params = SamplingParams(max_new_tokens=10, do_sample=True, temperature=30.0, top_k=20, seed=5)

    def run(*, company: int, budget: int) -> list[int]:
        engine = Engine(MODEL, max_tokens_per_step=budget)
        for i in range(company):
            engine.add_request([i] * (i + 1), SamplingParams(max_new_tokens=7, do_sample=i % 2 == 0, seed=i))
        request = engine.add_request([1, 2, 3], params)
        engine.run()
        return request.output_ids

    alone = run(company=0, budget=100)
    assert run(company=3, budget=100) == alone
    assert run(company=4, budget=6) == alone


def test_media_are_computed_once_and_spliced_by_chunk() -> None:
    """Features counted from the start of each chunk, or splice into generated tokens, would misplace every picture."""
    calls: list[tuple[int, ...]] = []

    class HashingVLModel(HashingModel):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(  # type: ignore[assignment]
                vision_config=SimpleNamespace(spatial_merge_size=2), image_token_index=90, video_token_index=91
            )

        def get_image_features(self, pixels: Tensor, grid: Tensor) -> Tensor:
            calls.append(tuple(pixels.shape))
            return pixels[::4]

        get_video_features = get_image_features

    model = HashingVLModel()
    images, videos = torch.arange(24.0).reshape(-1, 1), torch.arange(100.0, 116.0).reshape(-1, 1)
    media = Media(images, torch.tensor([[1, 2, 4], [1, 4, 4]]), videos, torch.tensor([[1, 4, 4]]))
    prompt = [5, 90, 90, 6, 90, 90, 90, 90, 91, 91, 7, 91, 91, 8]
    effective = [5, 0, 4, 6, 8, 12, 16, 20, 100, 104, 7, 108, 112, 8]
    expected = expected_answer(effective, 12)
    for budget in (1, 2, 3, 5, 100):
        engine = Engine(model, max_tokens_per_step=budget, poison=True)
        shared = Media(media.pixel_values, media.image_grid_thw, media.pixel_values_videos, media.video_grid_thw)
        requests = [engine.add_request(prompt, greedy(12), media=shared) for _ in range(2)]
        calls.clear()
        engine.run()
        assert calls == [(24, 1), (16, 1)], "the vision tower ran more than once"
        assert [request.output_ids for request in requests] == [expected, expected]
    with pytest.raises(ValueError, match=r"5 image placeholder tokens \(id 90\).* 6 features"):
        Engine(model).add_request([90] * 5 + [91] * 4, media=media)
    with pytest.raises(ValueError, match=r"1 image placeholder tokens \(id 90\).* 0 features"):
        Engine(model).add_request([90])
