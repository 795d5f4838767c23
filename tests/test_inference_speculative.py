"""Drafts of the MTP modules: what they are, what they may not change, and what they save."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minim3.inference.engine import Engine
from minim3.inference.request import Request, SamplingParams
from minim3.model.batch import ForwardBatch
from tests.test_inference_schedules import propose
from tests.tiny_models import random_ids, text_model

MODEL = text_model(num_mtp_modules=2)


class EveryThird:
    """Allows ids that are, modulo 3, as many as tokens came before; complete after `length` tokens."""

    def __init__(self, length: int, accepted: Sequence[int] = ()) -> None:
        self.length = length
        self.accepted = list(accepted)

    @property
    def finished(self) -> bool:
        return len(self.accepted) == self.length

    def allow(self, logits_V: Tensor) -> None:
        assert not self.finished
        logits_V[torch.arange(len(logits_V)) % 3 != len(self.accepted) % 3] = -torch.inf

    def accept(self, token_id: int) -> None:
        assert not self.finished
        assert token_id % 3 == len(self.accepted) % 3, "a token came that was forbidden"
        self.accepted.append(token_id)

    def fork(self) -> "EveryThird":
        return EveryThird(self.length, self.accepted)


def run(prompt: list[int], params: SamplingParams, guide: EveryThird | None = None, **options: Any) -> Request:
    engine = Engine(MODEL, **options)
    request = engine.add_request(prompt, params, guide=guide)
    engine.run()
    engine.check_integrity()
    return request


@torch.no_grad()
def drafts_of_modules(token_ids: list[int], count: int) -> list[int]:
    """The first drafts behind `token_ids`, by whole passes without a cache."""
    mtp, drafts = MODEL.text_model.mtp, list[int]()
    assert mtp is not None
    for depth in range(count):
        ids = torch.tensor(token_ids + drafts)
        batch = ForwardBatch.packed([len(ids)])
        hidden = MODEL.text_model.forward_packed(MODEL.embed_tokens_packed(ids), batch)
        outputs = mtp.forward_packed(hidden, ids, MODEL.text_model.embed_tokens, batch)
        drafts.append(int(MODEL.compute_logits(outputs[depth][len(token_ids) - 2]).argmax()))
    return drafts


@pytest.mark.parametrize("budget", [5, 64])
def test_drafts_are_those_of_the_modules(budget: int) -> None:
    """Keys of a draft module that miss a chunk, a shared prefix or a preemption, or lie a place off."""
    engine = Engine(
        MODEL, num_speculative_tokens=3, max_tokens_per_step=budget, num_pages=14, shuffle_seed=0, poison=True
    )
    assert engine.drafter is not None
    seen: list[tuple[Request, list[int], list[int]]] = []
    draft = engine.drafter.draft

    def watched(plan: Any, gains: Any, *rest: Any) -> list[list[int]]:
        drafts = draft(plan, gains, *rest)
        for chunk, gain, own in zip(plan, gains, drafts, strict=True):
            seen.append((chunk.request, chunk.request.token_ids + gain.token_ids, own))
        return drafts

    engine.drafter.draft = watched  # type: ignore[method-assign, assignment]
    begin = random_ids(16, seed=4).tolist()
    params = SamplingParams(max_new_tokens=12)
    requests = [engine.add_request(begin + random_ids(i, seed=i).tolist(), params) for i in (3, 5, 9)]
    while engine.scheduler.has_work:
        engine.step()
        engine.check_integrity()
    assert sum(request.num_preemptions for request in requests) > 0
    assert requests[1].num_cached_tokens == 16
    drafted = [(request, known, own) for request, known, own in seen if own]
    assert len(drafted) > 20
    for request, known, own in drafted:
        # The last place of a page found in the cache was made for another next token (`prefix.py`): a near draft.
        if request is requests[0] and not request.num_preemptions:
            assert own[0] == drafts_of_modules(known, 1)[0]
    request, known, own = drafted[0]
    assert own[:2] == drafts_of_modules(known, 2), "no draft had fallen yet: the second module is right, too"


def test_drafts_that_stand_save_steps() -> None:
    """Drafts that are verified but computed again afterwards would be right, and of no use."""
    prompt, params = random_ids(10, seed=1).tolist(), SamplingParams(max_new_tokens=17)
    right = run(prompt, params).output_ids
    engine = Engine(MODEL, num_speculative_tokens=3)
    request = engine.add_request(prompt, params)
    propose(engine, {request: right + [0] * 9}, 1.0, random.Random(0))
    engine.run()
    assert request.output_ids == right
    assert engine.stats.num_steps == 5  # the prompt and its token, then four steps of four
    assert request.num_drafted_tokens == request.num_accepted_tokens == engine.stats.num_accepted_tokens == 12
    assert engine.stats.num_computed_tokens == 10 + 16


sampled = st.builds(
    SamplingParams,
    max_new_tokens=st.just(12),
    do_sample=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 1.5]),
    logit_bias=st.sampled_from([{}, {3: 4.0, 7: -100.0}]),
    min_new_tokens=st.sampled_from([0, 6]),
    eos_token_ids=st.sampled_from([(), (3, 9, 20, 33, 41)]),
    logprobs=st.sampled_from([None, 2]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=25, deadline=None)
@given(
    params=sampled,
    drafts=st.integers(1, 4),
    share=st.sampled_from([0.3, 0.8, 1.0]),
    guided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_drafts_change_nothing(params: SamplingParams, drafts: int, share: float, guided: bool, seed: int) -> None:
    """A draft judged by another number, other counts, or a guide at another place, gives another answer."""
    prompt = random_ids(9, seed=seed).tolist()
    plain_guide, guide = (EveryThird(8) if guided else None for _ in range(2))
    alone = run(prompt, params, plain_guide)
    engine = Engine(MODEL, num_speculative_tokens=drafts, shuffle_seed=seed, poison=True)
    beside = engine.add_request(random_ids(5, seed=seed + 1).tolist(), replace(params, seed=1))
    request = engine.add_request(prompt, params, guide=guide)
    propose(engine, {request: alone.output_ids + [0] * 20}, share, random.Random(seed))
    engine.run()
    assert request.output_ids == alone.output_ids
    assert request.finish_reason == alone.finish_reason
    assert [found.top_token_ids for found in request.logprobs] == [found.top_token_ids for found in alone.logprobs]
    if guide is not None and plain_guide is not None:
        assert guide.accepted == plain_guide.accepted == request.output_ids
    assert beside.finished
    engine.check_integrity()


def test_draws_agree_as_often_as_their_distributions() -> None:
    """A draft drawn by a number of its own would agree with the choice by chance alone."""

    class Repeating(torch.nn.Module):
        """A head that makes drafts and choices nearly alike: logits that depend on little."""

        def __init__(self, head: torch.nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: Tensor) -> Tensor:
            return self.head(hidden) * 0.05

    model = text_model(num_mtp_modules=1)
    model.lm_head = Repeating(model.lm_head)  # type: ignore[assignment]
    engine = Engine(model, num_speculative_tokens=1)
    params = SamplingParams(max_new_tokens=60, do_sample=True, seed=3)
    request = engine.add_request(random_ids(5).tolist(), params)
    engine.run()
    # Nearly uniform over 64 tokens: numbers of their own agree once in 64 draws.
    assert request.num_accepted_tokens > 0.5 * request.num_drafted_tokens
    assert len(set(request.output_ids)) > 20


def test_speculation_without_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens is 2, but this model has no MTP modules"):
        Engine(text_model(), num_speculative_tokens=2)
    with pytest.raises(ValueError, match="must be at least 0, got -1"):
        Engine(MODEL, num_speculative_tokens=-1)
