"""Choosing tokens from logits.

Order and definitions are those of transformers' logits processors: repetition penalty, temperature, top-k, top-p,
min-p. The draw differs from it: every request has a random stream of its own and takes one uniform number u from it a
token; the token is the first whose cumulative probability exceeds u. So what a request draws depends on its own seed
and its own logits, never on who else is in the batch.

Shape legend: R rows (requests that get a token in this step), V vocabulary, C candidates that survived top-k.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minim3.inference.request import Request, SamplingParams, TokenLogprobs

FEW_CANDIDATES = 1024


class Sampled(NamedTuple):
    """Token ids, one a row, and log-probabilities where a row asked for them."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


class _Stream:
    """What sampling keeps of one request between steps: its random stream, and the tokens it has seen."""

    def __init__(self, params: SamplingParams, vocab_size: int, device: torch.device) -> None:
        self.generator: torch.Generator | None = None
        if not params.greedy:
            # On the CPU whatever the device of the model: one seed, one stream, everywhere.
            self.generator = torch.Generator()
            seed = params.seed
            self.generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        self.seen: Tensor | None = None
        self.num_seen = 0
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)

    def uniform(self) -> float:
        assert self.generator is not None
        return float(torch.rand((), dtype=torch.float64, generator=self.generator))

    def see(self, token_ids: Sequence[int]) -> Tensor:
        """The mask `[V]` of all of `token_ids`, of which those of earlier calls were marked then."""
        assert self.seen is not None
        new = [token_id for token_id in token_ids[self.num_seen :] if token_id < self.seen.shape[0]]
        if new:
            self.seen[torch.tensor(new, device=self.seen.device)] = True
        self.num_seen = len(token_ids)
        return self.seen


class Sampler:
    """Chooses the next token of each request, and holds the random streams of the requests it has seen."""

    def __init__(self) -> None:
        self._streams: dict[Request, _Stream] = {}

    def forget(self, request: Request) -> None:
        """Drop what is kept for a finished request."""
        self._streams.pop(request, None)

    def sample(self, logits_RV: Tensor, requests: Sequence[Request]) -> Sampled:
        """One token for each row of `logits_RV` `[R, V]`, in the order of `requests`.

        Raises:
            FloatingPointError: the logits of a request hold NaN.
        """
        nothing: list[TokenLogprobs | None] = [None] * len(requests)
        if all(request.params.plain_greedy for request in requests):
            values, ids = logits_RV.max(-1)
            _refuse_nan(values, requests)
            return Sampled(ids.tolist(), nothing)
        scores = logits_RV.float()
        _refuse_nan(scores.amax(-1), requests)
        logprobs = self._logprob_source(scores, requests)
        scores = self._penalize(scores, requests)
        ids = scores.argmax(-1)
        for rows, candidates in _groups(requests):
            ids[rows] = self._draw(scores[rows], [requests[row] for row in rows], candidates)
        token_ids: list[int] = ids.tolist()
        found = nothing if logprobs is None else _read_logprobs(logprobs, token_ids, requests)
        return Sampled(token_ids, found)

    def _stream(self, request: Request, scores: Tensor) -> _Stream:
        if request not in self._streams:
            self._streams[request] = _Stream(request.params, scores.shape[-1], scores.device)
        return self._streams[request]

    @staticmethod
    def _logprob_source(scores: Tensor, requests: Sequence[Request]) -> Tensor | None:
        """Log-probabilities `[R, V]` of the model itself, when any request wants them."""
        if all(request.params.logprobs is None for request in requests):
            return None
        return scores.log_softmax(-1)

    def _penalize(self, scores: Tensor, requests: Sequence[Request]) -> Tensor:
        rows = [row for row, request in enumerate(requests) if request.params.repetition_penalty != 1.0]
        if not rows:
            return scores
        chosen = [requests[row] for row in rows]
        seen = torch.stack([self._stream(request, scores).see(request.token_ids) for request in chosen])
        penalty = _column([request.params.repetition_penalty for request in chosen], scores)
        some = scores[rows]
        penalized = torch.where(some < 0, some * penalty, some / penalty)
        scores = scores.clone()
        scores[rows] = torch.where(seen, penalized, some)
        return scores

    def _draw(self, scores: Tensor, requests: Sequence[Request], candidates: str) -> Tensor:
        """Token ids `[R]` drawn for rows that are all cut the same way (`_groups`)."""
        device = scores.device
        if device.type == "mps":
            scores = scores.cpu()  # sums below are fp64, which that device lacks
        scores = scores / _column([request.params.temperature for request in requests], scores)
        top_p = [request.params.top_p for request in requests]
        token_ids: Tensor | None = None
        if candidates == "top_k":
            scores, token_ids = _top_k(scores, [request.params.top_k for request in requests])
            scores = _top_p(scores, scores.logsumexp(-1, keepdim=True), top_p)
        elif candidates == "top_p":
            log_total = scores.logsumexp(-1, keepdim=True)
            scores, token_ids = _most_likely(scores, log_total, top_p)
            scores = _top_p(scores, log_total, top_p)
        scores = _min_p(scores, [request.params.min_p for request in requests])
        uniform = torch.tensor([self._stream(request, scores).uniform() for request in requests], dtype=torch.float64)
        drawn = _invert_cumulative(scores.softmax(-1), uniform.to(scores.device))
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
