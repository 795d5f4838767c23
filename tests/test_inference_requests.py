"""What a request may ask of the engine: several answers, guides, stop strings, a least length, pictures seen before."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minim3.inference.engine import Engine
from minim3.inference.request import Media, Request, SamplingParams
from tests.test_inference_engine import LetterDetokenizer
from tests.test_inference_speculative import EveryThird
from tests.tiny_models import IMAGE, media_prompt, random_ids, text_model, vl_model

MODEL = text_model()
PROMPT = random_ids(21, seed=2).tolist()


def answer(params: SamplingParams, prompt: list[int] = PROMPT, **options: Any) -> Request:
    engine = Engine(MODEL)
    request = engine.add_request(prompt, params, **options)
    engine.run()
    engine.check_integrity()
    return request


def test_several_answers_share_the_prompt_and_differ_by_seed() -> None:
    """Answers that share a stream are copies; a prompt computed once an answer makes n answers n times as dear."""
    params = SamplingParams(max_new_tokens=9, do_sample=True, seed=2**64 - 2)
    engine = Engine(MODEL, poison=True)
    requests = engine.add_requests(PROMPT, params, n=4, request_ids=list("abcd"))
    engine.run()
    engine.check_integrity()
    alone = [answer(SamplingParams(max_new_tokens=9, do_sample=True, seed=(2**64 - 2 + i) % 2**64)) for i in range(4)]
    assert [request.output_ids for request in requests] == [request.output_ids for request in alone]
    assert len({tuple(request.output_ids) for request in requests}) == 4
    assert [request.num_cached_tokens for request in requests] == [0, 20, 20, 20]
    assert engine.stats.num_computed_tokens == 21 + 3 * 1 + 4 * 8


def test_bad_lists_of_several_answers_queue_nothing() -> None:
    engine = Engine(MODEL)
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        engine.add_requests(PROMPT, n=0)
    with pytest.raises(ValueError, match="request_ids must be 3, one an answer, got 2"):
        engine.add_requests(PROMPT, n=3, request_ids=["a", "b"])
    with pytest.raises(ValueError, match="'a' is already running"):
        engine.add_requests(PROMPT, n=3, request_ids=["a", "b", "a"])
    assert not engine.requests
    assert not engine.scheduler.has_work
    engine.check_integrity()


def test_logit_bias_outside_the_vocabulary_is_refused_when_asked() -> None:
    """Found out in a step, it would end the step of everybody."""
    engine = Engine(MODEL)
    with pytest.raises(ValueError, match="logit_bias names token 64, the vocabulary has ids 0 to 63"):
        engine.add_request(PROMPT, SamplingParams(logit_bias={64: 1.0}))
    assert not engine.requests


def test_a_guide_sees_every_token_once_and_ends_the_answer() -> None:
    guide = EveryThird(5)
    request = answer(SamplingParams(max_new_tokens=30), guide=guide)
    assert guide.accepted == request.output_ids
    assert [token_id % 3 for token_id in request.output_ids] == [0, 1, 2, 0, 1]
    assert request.finish_reason == "stop"
    plain = answer(SamplingParams(max_new_tokens=5)).output_ids
    assert plain != request.output_ids


def test_a_complete_grammar_may_end_before_the_least_length() -> None:
    """All tokens masked: the end by the least length, the others by the grammar."""

    class OnlyEnd(EveryThird):
        def allow(self, logits_V: Tensor) -> None:
            logits_V[torch.arange(len(logits_V)) != 2] = -torch.inf

        def accept(self, token_id: int) -> None:
            self.accepted.append(token_id)

    params = SamplingParams(max_new_tokens=9, min_new_tokens=4, eos_token_ids=(2,))
    assert answer(params, guide=OnlyEnd(3)).output_ids == [2]


def test_forbidden_and_late_ids() -> None:
    """The first are never chosen, the second not before the least length."""
    free = answer(SamplingParams(max_new_tokens=8)).output_ids
    assert free[0] not in answer(SamplingParams(max_new_tokens=8, forbidden_ids=(free[0],))).output_ids
    late = answer(SamplingParams(max_new_tokens=8, min_new_tokens=1, late_ids=(free[0],))).output_ids
    assert late[0] != free[0]
    assert answer(SamplingParams(max_new_tokens=8, late_ids=(free[0],))).output_ids == free


def test_stop_strings_wait_for_the_least_length_and_may_be_kept() -> None:
    tokens = answer(SamplingParams(max_new_tokens=20)).output_ids
    text = "".join(map(LetterDetokenizer().feed, tokens))
    assert len(text) >= 15
    stop = text[6:8]
    first = text.index(stop)

    def ask(**options: Any) -> Request:
        return answer(SamplingParams(max_new_tokens=20, stop=(stop,), **options), detokenizer=LetterDetokenizer())

    assert ask().text == text[:first]
    kept = ask(include_stop_str_in_output=True)
    assert kept.text == text[: first + 2]
    assert kept.finish_reason == "stop"
    late = ask(min_new_tokens=12)
    assert late.num_output_tokens >= 12
    assert late.text.startswith(text[: first + 2])


def test_a_picture_seen_before_is_not_looked_at_again() -> None:
    """A hit that still runs the vision tower saves little; a hit for another picture shows the wrong one."""
    model = vl_model()
    looks: list[int] = []
    features = model.get_image_features

    def counted(pixels: Tensor, grid: Tensor) -> Tensor:
        looks.append(len(pixels))
        return features(pixels, grid)

    model.get_image_features = counted  # type: ignore[method-assign, assignment]
    inputs = media_prompt()
    ids = inputs["input_ids"][0].tolist()
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][-1] += 1.0  # the second picture, of which one token is shown

    def ask(engine: Engine, media: dict[str, Tensor]) -> Request:
        request = engine.add_request(ids, SamplingParams(max_new_tokens=6), media=media)
        engine.run()
        return request

    engine = Engine(model)
    first, again, changed = ask(engine, inputs), ask(engine, inputs), ask(engine, other)
    assert looks == [28, 48] * 2, "pictures and clip, once for each different prompt"
    assert again.output_ids == first.output_ids
    assert again.num_cached_tokens == (len(ids) - 1) // 4 * 4
    place = [i for i, token_id in enumerate(ids) if token_id == IMAGE][-1]
    assert changed.num_cached_tokens == place // 4 * 4, "all before the picture that differs, and nothing after it"
    assert changed.output_ids == ask(Engine(model, prefix_caching=False), other).output_ids
    engine.check_integrity()


def test_patches_that_do_not_fit_their_grid_are_refused_when_asked() -> None:
    """Found out in a step, it would end the step of everybody."""
    inputs = media_prompt()
    media = Media(inputs["pixel_values"][:-1], inputs["image_grid_thw"])
    with pytest.raises(ValueError, match="28 patches, but 27 were given"):
        Engine(vl_model()).add_request([5, *[IMAGE] * 7], media=media)


def test_a_preempted_request_can_be_aborted() -> None:
    engine = Engine(MODEL, num_pages=6)
    low = engine.add_request(PROMPT[:9], SamplingParams(max_new_tokens=9), priority=-1)
    engine.step()
    high = engine.add_request(PROMPT, SamplingParams(max_new_tokens=3))
    engine.step()
    assert low.num_preemptions == 1
    engine.abort(low.request_id)
    engine.run()
    engine.check_integrity()
    assert (low.finish_reason, high.finish_reason) == ("abort", "length")
    assert engine.cache.pool.num_used_pages == 0
