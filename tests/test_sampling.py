"""Sampling: transformers' definitions of the processors, and one random stream a request."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minim3.inference.request import Request, SamplingParams
from minim3.inference.sampling import Sampler

VOCABULARY = 50


def make_request(params: SamplingParams, token_ids: list[int] | None = None, name: str = "r") -> Request:
    ids = [1, 2, 3] if token_ids is None else token_ids
    return Request(request_id=name, token_ids=list(ids), num_prompt_tokens=len(ids), max_new_tokens=99, params=params)


def make_logits(seed: int, rows: int = 1, vocabulary: int = VOCABULARY, ties: bool = False) -> torch.Tensor:
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if ties else logits


def draw(params: SamplingParams, logits: torch.Tensor, count: int) -> list[int]:
    """Tokens that one request draws from the same logits, one after another."""
    sampler, request = Sampler(), make_request(params)
    for _ in range(count):
        request.token_ids += sampler.sample(logits, [request]).token_ids
    return request.output_ids


def oracle_probabilities(params: SamplingParams, ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """The distribution transformers draws from."""
    given_ids = torch.tensor([ids])
    scores = logits.clone()
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(given_ids, scores)
    scores = TemperatureLogitsWarper(params.temperature)(given_ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(given_ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(given_ids, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(given_ids, scores)
    return scores.softmax(-1)[0]


sampling_params = st.builds(
    SamplingParams,
    do_sample=st.just(True),
    temperature=st.floats(0.2, 3.0),
    top_k=st.sampled_from([0, 1, 3, 10, 49, 50, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.05, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=60, deadline=None)
@given(params=sampling_params, seed=st.integers(0, 10**6), ties=st.booleans())
def test_distribution_equals_transformers(params: SamplingParams, seed: int, ties: bool) -> None:
    """A processor in another order, or another rule at the border, gives tokens another weight.

    The uniform number is swept over a fine grid, so the frequency of each token is its probability within 2 / steps.
    """
    logits = make_logits(seed, ties=ties)
    ids = [5, 7, 7, 49]
    steps = 400
    with pytest.MonkeyPatch.context() as patch:
        counts = torch.zeros(VOCABULARY)
        sampler, request = Sampler(), make_request(params, ids)
        values = iter([(step + 0.5) / steps for step in range(steps)])
        patch.setattr("minim3.inference.sampling._Stream.uniform", lambda stream, place: next(values))
        for token_id in sampler.sample(logits.expand(steps, -1), [request] * steps).token_ids:
            counts[token_id] += 1
    expected = oracle_probabilities(params, ids, logits)
    if ties and params.top_p < 1:
        # Equal logits at the border of top-p: which of them stay is open, so compare the weight of each logit.
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.tensor([ids]), logits)[0]
        for level in scores.unique():
            mask = scores == level
            assert abs(float(counts[mask].sum()) / steps - float(expected[mask].sum())) <= 2 / steps + 1e-4
    else:
        assert (counts / steps - expected).abs().max() <= 2 / steps + 1e-4
        assert not counts[expected == 0].any()


@settings(max_examples=40, deadline=None)
@given(
    company=st.lists(sampling_params | st.just(SamplingParams()), min_size=1, max_size=6),
    params=sampling_params,
    place=st.integers(0, 6),
    seed=st.integers(0, 10**6),
)
def test_random_stream_does_not_depend_on_company(
    company: list[SamplingParams], params: SamplingParams, place: int, seed: int
) -> None:
    """One generator for the whole batch would make a request's tokens depend on who else draws from it."""
    place = min(place, len(company))
    alone_sampler, alone = Sampler(), make_request(params)
    batch_sampler = Sampler()
    everyone = [make_request(other, name=str(i)) for i, other in enumerate(company)]
    everyone.insert(place, make_request(params))
    for step in range(5):
        logits = make_logits(seed + step, len(everyone))
        expected = alone_sampler.sample(logits[place : place + 1], [alone]).token_ids[0]
        tokens = batch_sampler.sample(logits, everyone).token_ids
        assert tokens[place] == expected
        for request, token_id in zip([*everyone, alone], [*tokens, expected], strict=True):
            request.token_ids.append(token_id)


@pytest.mark.parametrize("spread", [3.0, 0.01], ids=["few candidates", "all sorted"])
def test_top_p_of_a_large_vocabulary(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short cut past the sort keeps what the sort keeps, also beside a row that cannot take it."""
    logits = make_logits(0, vocabulary=4000) * spread
    sampler, request = Sampler(), make_request(SamplingParams(do_sample=True, top_p=0.7, seed=0))
    other = make_request(SamplingParams(do_sample=True, top_p=0.999, seed=0), name="other")
    expected = oracle_probabilities(request.params, [1], logits)
    steps = 400
    values = iter([(i // 2 + 0.5) / steps for i in range(2 * steps)])
    monkeypatch.setattr("minim3.inference.sampling._Stream.uniform", lambda stream, place: next(values))
    flat = torch.zeros(1, 4000)
    rows = torch.cat([logits, flat]) if spread == 3.0 else logits.repeat(2, 1)
    drawn = [sampler.sample(rows, [request, other]).token_ids[0] for _ in range(50)]
    assert all(expected[token_id] > 0 for token_id in drawn)
    alone = iter([(i + 0.5) / steps for i in range(50)])
    monkeypatch.setattr("minim3.inference.sampling._Stream.uniform", lambda stream, place: next(alone))
    assert [sampler.sample(logits, [request]).token_ids[0] for _ in range(50)] == drawn
    weights = iter([(i + 0.5) / steps for i in range(steps)])
    monkeypatch.setattr("minim3.inference.sampling._Stream.uniform", lambda stream, place: next(weights))
    counts = torch.bincount(torch.tensor(sampler.sample(logits.expand(steps, -1), [request] * steps).token_ids))
    counts = torch.nn.functional.pad(counts, (0, 4000 - len(counts)))
    assert (counts / steps - expected).abs().max() <= 2 / steps


def test_same_seed_same_tokens_other_seed_other_tokens() -> None:
    logits = make_logits(0)
    params = SamplingParams(do_sample=True, seed=4)
    assert draw(params, logits, 20) == draw(params, logits, 20)
    assert draw(params, logits, 20) != draw(replace(params, seed=5), logits, 20)


def test_no_seed_follows_torch_manual_seed() -> None:
    """Without a seed an answer is still reproducible the way people know it."""
    params, logits = SamplingParams(do_sample=True), make_logits(0)
    torch.manual_seed(11)
    first = draw(params, logits, 20)
    torch.manual_seed(11)
    assert draw(params, logits, 20) == first
    assert draw(params, logits, 20) != first


def test_greedy_takes_the_lowest_id_on_a_tie() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert Sampler().sample(logits, [make_request(SamplingParams())]).token_ids == [1]
    with_logprobs = SamplingParams(logprobs=1)  # takes the long way round
    assert Sampler().sample(logits, [make_request(with_logprobs)]).token_ids == [1]


def test_temperature_zero_is_greedy() -> None:
    logits = make_logits(3)
    params = SamplingParams(do_sample=True, temperature=0.0)
    assert draw(params, logits, 5) == [int(logits.argmax())] * 5


def test_repetition_penalty_counts_generated_tokens_too() -> None:
    """A mask built once from the prompt would let the model repeat what it has just said."""
    params = SamplingParams(repetition_penalty=2.0)
    sampler, request = Sampler(), make_request(params, [0])
    logits = torch.tensor([[1.0, 4.0, 3.0, -1.0]])
    tokens = []
    for _ in range(3):
        tokens += sampler.sample(logits, [request]).token_ids
        request.token_ids.append(tokens[-1])
    assert tokens == [1, 2, 1]
    assert torch.equal(logits, torch.tensor([[1.0, 4.0, 3.0, -1.0]])), "the model's logits were changed"


def test_logprobs_are_those_of_the_model() -> None:
    """Log-probabilities of the filtered distribution would be 0 or -inf under top-k = 1."""
    logits = make_logits(1, rows=2)
    asks = make_request(SamplingParams(do_sample=True, top_k=1, seed=0, logprobs=3))
    silent = make_request(SamplingParams())
    sampled = Sampler().sample(logits, [asks, silent])
    expected = logits.log_softmax(-1)[0]
    found = sampled.logprobs[0]
    assert found is not None
    assert sampled.logprobs[1] is None
    assert found.chosen == pytest.approx(float(expected[sampled.token_ids[0]]))
    assert list(found.top_token_ids) == expected.topk(3).indices.tolist()
    assert list(found.top_logprobs) == pytest.approx(expected.topk(3).values.tolist())
    none_beside = Sampler().sample(logits[:1], [make_request(SamplingParams(logprobs=0))]).logprobs[0]
    assert none_beside is not None
    assert none_beside.top_token_ids == ()


def test_uniform_close_to_one_never_leaves_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding in the cumulative sum may not hand out a token of probability zero."""
    monkeypatch.setattr("minim3.inference.sampling._Stream.uniform", lambda stream, place: math.nextafter(1.0, 0.0))
    for top_k, top_p in ((5, 1.0), (0, 0.4), (0, 1.0)):
        logits = make_logits(2, vocabulary=1000)
        logits[0, 990:] = -torch.inf
        params = SamplingParams(do_sample=True, top_k=top_k, top_p=top_p, seed=0)
        token_id = Sampler().sample(logits, [make_request(params)]).token_ids[0]
        assert oracle_probabilities(params, [1], logits)[token_id] > 0


def test_nan_logits_are_an_error_not_a_token() -> None:
    logits = make_logits(0, rows=2)
    logits[1, 7] = torch.nan
    good = make_request(SamplingParams(), name="good")
    for params in (SamplingParams(), SamplingParams(do_sample=True, seed=0)):
        with pytest.raises(FloatingPointError, match="'bad'"):
            Sampler().sample(logits, [good, make_request(params, name="bad")])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("max_new_tokens", True),
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "hot"), ("temperature", float("inf")),
        ("top_k", -1), ("top_k", 2.0), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 2),
        ("repetition_penalty", 0.0), ("seed", -1), ("seed", 2**64), ("logprobs", -1), ("logprobs", True),
        ("stop", "word"), ("stop", ("",)), ("eos_token_ids", 2), ("eos_token_ids", (-1,)), ("do_sample", 1),
        ("ignore_eos", None), ("min_new_tokens", -1), ("min_new_tokens", 300), ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")), ("logit_bias", {"a": 1.0}), ("logit_bias", {1: 101}), ("logit_bias", [1]),
        ("include_stop_str_in_output", 1),
    ],
)  # fmt: skip
def test_bad_sampling_value_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_presence_and_frequency_count_the_answer_alone() -> None:
    """Counted over the prompt too, a long prompt would forbid its own words; over one step, nothing repeats less."""
    logits = torch.tensor([[4.0, 3.5, 3.2, 0.0]])
    for name, penalty, expected in (
        ("presence_penalty", 1.0, [0, 1, 2, 0, 0]),  # 4, then 3 for 0; 3.5, 2.5; 3.2, 2.2; then nothing changes
        ("frequency_penalty", 0.6, [0, 1, 0, 2, 1]),
        ("frequency_penalty", -0.6, [0, 0, 0, 0, 0]),
    ):
        params = SamplingParams(**{name: penalty})
        sampler, request = Sampler(), make_request(params, [0, 0, 0, 1])
        for _ in range(5):
            request.token_ids += sampler.sample(logits, [request]).token_ids
        assert request.output_ids == expected, name


def test_bias_is_added_to_its_token_alone() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert Sampler().sample(logits, [make_request(SamplingParams(logit_bias={0: 2.5}))]).token_ids == [0]
    assert Sampler().sample(logits, [make_request(SamplingParams(logit_bias={2: -100, 1: 0.5}))]).token_ids == [1]
    both = [make_request(SamplingParams(logit_bias={0: 100.0})), make_request(SamplingParams(), name="plain")]
    assert Sampler().sample(logits.expand(2, -1), both).token_ids == [0, 2]
    assert torch.equal(logits, torch.tensor([[1.0, 2.0, 3.0]]))


def test_no_end_before_the_least_length() -> None:
    """An end that is only unlikely comes early once in a while; tokens in advance count as if they stood."""
    logits = torch.tensor([[1.0, 2.0, 9.0]])
    request = make_request(SamplingParams(min_new_tokens=2, eos_token_ids=(2, 77)))
    sampler = Sampler()
    assert sampler.sample(logits.expand(3, -1), [request] * 3, [[], [1], [1, 1]]).token_ids == [1, 1, 2]
    request.token_ids += [1, 1]
    assert sampler.sample(logits, [request]).token_ids == [2]


@settings(max_examples=30, deadline=None)
@given(params=sampling_params, seed=st.integers(0, 10**6), ahead=st.lists(st.integers(0, 49), max_size=4))
def test_a_row_behind_drafts_is_what_it_would_be_if_they_stood(
    params: SamplingParams, seed: int, ahead: list[int]
) -> None:
    """Penalties that miss a draft, or a number from another place of the stream, judge drafts by another rule."""
    params = replace(params, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 1.0})
    logits = make_logits(seed, rows=len(ahead) + 1)
    request = make_request(params)
    together = Sampler().sample(logits, [request] * len(logits), [ahead[:n] for n in range(len(logits))]).token_ids
    sampler, stepwise = Sampler(), []
    for row, draft_id in zip(logits, [*ahead, 0], strict=True):
        stepwise += sampler.sample(row[None], [request]).token_ids
        request.token_ids.append(draft_id)
    assert together == stepwise
