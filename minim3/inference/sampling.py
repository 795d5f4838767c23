"""Choosing tokens from logits.

What is done to the logits before (guide, bias, penalties) is in `penalties.py`. Order and definitions of what follows
are those of transformers' logits processors: temperature, top-k, top-p, min-p. The draw differs from it: every request
has a random stream of its own, and the uniform number u at place i of it belongs to token i of the answer; the token is
the first whose cumulative probability exceeds u. So what a request draws depends on its own seed and its own logits,
never on who else is in the batch, on what was computed twice, or on what was proposed.

A row may stand for a place further on: after drafts that are yet to be verified. It is drawn as if they stood.

Shape legend: R rows, V vocabulary, C candidates that survived top-k.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minim3.inference.penalties import Penalties, apply_guides
from minim3.inference.request import Request, SamplingParams, TokenLogprobs

FEW_CANDIDATES = 1024


class Sampled(NamedTuple):
    """Token ids, one a row, and log-probabilities where a row asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class _Stream:
    """The random stream of one request."""

    def __init__(self, params: SamplingParams) -> None:
        # On the CPU whatever the device of the model: one seed, one stream, everywhere.
        self._generator = torch.Generator()
        self._generator.manual_seed(int(torch.randint(2**62, ())) if params.seed is None else params.seed)
        self._drawn: list[float] = []

    def uniform(self, place: int) -> float:
        """The number of token `place` of the answer."""
        while len(self._drawn) <= place:
            self._drawn.append(float(torch.rand((), dtype=torch.float64, generator=self._generator)))
        return self._drawn[place]


class Sampler:
    """Chooses the next token of each request, and holds the random streams of the requests it has seen."""

    def __init__(self) -> None:
        self._streams: dict[Request, _Stream] = {}
        self._penalties = Penalties()

    def forget(self, request: Request) -> None:
        """Drop what is kept for a finished request."""
        self._streams.pop(request, None)
        self._penalties.forget(request)

    def sample(
        self,
        logits_RV: Tensor,
        requests: Sequence[Request],
        ahead: Sequence[Sequence[int]] | None = None,
        *,
        with_logprobs: bool = True,
    ) -> Sampled:
        """One token for each row of `logits_RV` `[R, V]`, in the order of `requests`.

        ahead: for each row the ids that are taken to follow the known tokens of its request (drafts), none by default.
        Rows of one request stand together, each with one id more than the row before.

        Raises:
            FloatingPointError: the logits of a request hold NaN.
        """
        ahead = [()] * len(requests) if ahead is None else ahead
        nothing: list[TokenLogprobs | None] = [None] * len(requests)
        if all(request.params.plain_greedy and request.guide is None for request in requests):
            values, ids = logits_RV.max(-1)
            _refuse_nan(values, requests)
            return Sampled(ids.tolist(), nothing)
        scores = logits_RV.float()
        _refuse_nan(scores.amax(-1), requests)
        logprobs = self._logprob_source(scores, requests) if with_logprobs else None
        if any(request.guide is not None or request.params.changes_logits for request in requests):
            scores = scores.clone()
            apply_guides(scores, requests, ahead)
            self._penalties.apply(scores, requests, ahead)
        ids = scores.argmax(-1)
        places = [request.num_output_tokens + len(ids) for request, ids in zip(requests, ahead)]
        for rows, candidates in _groups(requests):
            uniform = [self._stream(requests[row]).uniform(places[row]) for row in rows]
            ids[rows] = _draw(scores[rows], [requests[row].params for row in rows], uniform, candidates)
        token_ids: list[int] = ids.tolist()
        found = nothing if logprobs is None else _read_logprobs(logprobs, token_ids, requests)
        return Sampled(token_ids, found)

    def _stream(self, request: Request) -> _Stream:
        if request not in self._streams:
            self._streams[request] = _Stream(request.params)
        return self._streams[request]

    @staticmethod
    def _logprob_source(scores: Tensor, requests: Sequence[Request]) -> Tensor | None:
        """Log-probabilities `[R, V]` of the model itself, when any request wants them."""
        if all(request.params.logprobs is None for request in requests):
            return None
        return scores.log_softmax(-1)


def _draw(scores: Tensor, params: Sequence[SamplingParams], uniform: Sequence[float], candidates: str) -> Tensor:
    """Token ids `[R]` drawn for rows that are all cut the same way (`_groups`)."""
    device = scores.device
    if device.type == "mps":
        scores = scores.cpu()  # sums below are fp64, which that device lacks
    scores = scores / _column([one.temperature for one in params], scores)
    top_p = [one.top_p for one in params]
    token_ids: Tensor | None = None
    if candidates == "top_k":
        scores, token_ids = _top_k(scores, [one.top_k for one in params])
        scores = _top_p(scores, scores.logsumexp(-1, keepdim=True), top_p)
    elif candidates == "top_p":
        log_total = scores.logsumexp(-1, keepdim=True)
        scores, token_ids = _most_likely(scores, log_total, top_p)
        scores = _top_p(scores, log_total, top_p)
    scores = _min_p(scores, [one.min_p for one in params])
    drawn = _invert_cumulative(scores.softmax(-1), torch.tensor(uniform, dtype=torch.float64, device=scores.device))
    return (drawn if token_ids is None else token_ids.gather(-1, drawn[:, None]).squeeze(-1)).to(device)


def _groups(requests: Sequence[Request]) -> list[tuple[list[int], str]]:
    """Rows to draw for, by how their candidates are found.

    A row's own parameters alone decide its group, so that the order of its candidates, and with it the token that a
    uniform number selects, is the same in any company.
    """
    groups: dict[str, list[int]] = {"top_k": [], "top_p": [], "all": []}
    for row, request in enumerate(requests):
        params = request.params
        if not params.greedy:
            groups["top_k" if params.top_k else "top_p" if params.top_p < 1 else "all"].append(row)
    return [(rows, candidates) for candidates, rows in groups.items() if rows]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _top_k(scores: Tensor, top_k: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Descending scores `[R, C]` of each row's k best and of ties with the last of them, -inf behind; and ids."""
    vocab_size = scores.shape[-1]
    limits = torch.tensor([min(k, vocab_size) for k in top_k], device=scores.device)[:, None]
    values, ids = scores.topk(int(limits.max()), -1)
    threshold = values.gather(-1, limits - 1)
    num_kept = int((scores >= threshold).sum(-1).max())
    if num_kept > values.shape[-1]:
        values, ids = scores.topk(num_kept, -1)
    return values.masked_fill(values < threshold, -torch.inf), ids


def _most_likely(scores: Tensor, log_total: Tensor, top_p: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Descending scores `[R, C]` and their ids, at least those that top-p keeps.

    Sorting a vocabulary of 200,000 takes longer than many a model's forward pass, and a few candidates nearly always
    hold the weight that is asked for.
    """
    if scores.shape[-1] > 2 * FEW_CANDIDATES:
        values, ids = scores.topk(FEW_CANDIDATES, -1)
        weight = (values - log_total).double().exp().sum(-1, keepdim=True)
        if bool((weight >= _column(top_p, weight)).all()):
            return values, ids
    return scores.sort(dim=-1, descending=True, stable=True)


def _top_p(scores: Tensor, log_total: Tensor, top_p: Sequence[float]) -> Tensor:
    """Of descending scores keep each one before which less than p of the whole weight, `exp(log_total)`, lies."""
    if min(top_p) >= 1.0:
        return scores
    probabilities = (scores - log_total).double().exp()
    limits = _column(top_p, probabilities)
    # A row with p = 1 keeps all, whatever rounding does to its sums.
    dropped = (probabilities.cumsum(-1) - probabilities >= limits) & (limits < 1)
    return scores.masked_fill(dropped, -torch.inf)


def _min_p(scores: Tensor, min_p: Sequence[float]) -> Tensor:
    if max(min_p) <= 0.0:
        return scores
    probabilities = scores.softmax(-1)
    best = probabilities.amax(-1, keepdim=True)
    dropped = (probabilities < _column(min_p, scores) * best) & (probabilities < best)
    return scores.masked_fill(dropped, -torch.inf)


def _invert_cumulative(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Index `[R]` of the first entry whose cumulative probability exceeds `uniform` `[R]` times the total."""
    cumulative = probabilities.double().cumsum(-1)
    wanted = uniform[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
    # u < 1 keeps `wanted` below the total except for one rounding; never step past the last possible entry.
    places = torch.arange(probabilities.shape[-1], device=drawn.device)
    last = torch.where(probabilities > 0, places, 0).amax(-1)
    return torch.minimum(drawn, last)


def _read_logprobs(
    logprobs: Tensor, token_ids: Sequence[int], requests: Sequence[Request]
) -> list[TokenLogprobs | None]:
    most = max(request.params.logprobs or 0 for request in requests)
    chosen = logprobs.gather(-1, torch.tensor(token_ids, device=logprobs.device)[:, None]).squeeze(-1).tolist()
    values, ids = (x.tolist() for x in logprobs.topk(min(most, logprobs.shape[-1]), -1))
    found: list[TokenLogprobs | None] = []
    for row, request in enumerate(requests):
        n = request.params.logprobs
        found.append(None if n is None else TokenLogprobs(chosen[row], tuple(ids[row][:n]), tuple(values[row][:n])))
    return found


def _refuse_nan(best: Tensor, requests: Sequence[Request]) -> None:
    for row, value in enumerate(best.tolist()):
        if value != value:
            raise FloatingPointError(
                f"the logits of request {requests[row].request_id!r} hold NaN after {requests[row].num_tokens} tokens: "
                "the weights, or the pixels it was given, are not finite"
            )
