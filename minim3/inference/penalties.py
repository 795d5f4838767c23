"""What happens to logits before a token is chosen: guides, bias, penalties, and no end before the least length.

Every function works on rows `[R, V]`. A row with tokens ahead (drafts, not yet verified) is treated as if they stood.
Repetition and bias are defined as in transformers; presence and frequency as in OpenAI's API: over the answer alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minim3.inference.guide import Guide
from minim3.inference.request import Request


def apply_guides(scores: Tensor, requests: Sequence[Request], ahead: Sequence[Sequence[int]]) -> None:
    """Mask what the guides forbid, in place. Rows of one request stand together, each with one id more ahead.

    A row behind an id that is forbidden is left as it is: nothing that is drawn from it can stand.
    """
    guide: Guide | None = None
    for row, (request, ids) in enumerate(zip(requests, ahead)):
        if request.guide is None:
            continue
        follows = row > 0 and requests[row - 1] is request and len(ids) == len(ahead[row - 1]) + 1
        if not follows:
            guide = _after(request.guide, ids) if ids else request.guide
        elif guide is not None:
            if bool(scores[row - 1, ids[-1]] == -torch.inf) or guide.finished:
                guide = None
            else:
                guide = guide.fork() if guide is request.guide else guide
                guide.accept(ids[-1])
        if guide is not None and not guide.finished:
            guide.allow(scores[row])


def _after(guide: Guide, ids: Sequence[int]) -> Guide | None:
    """A copy of `guide` that has accepted `ids`; None where it ends before."""
    guide = guide.fork()
    for token_id in ids:
        if guide.finished:
            return None
        guide.accept(token_id)
    return guide


class Penalties:
    """Bias and penalties, with the counts of the tokens that each request has seen."""

    def __init__(self) -> None:
        self._counts: dict[Request, _Counts] = {}

    def forget(self, request: Request) -> None:
        """Drop what is kept for a finished request."""
        self._counts.pop(request, None)

    def apply(self, scores: Tensor, requests: Sequence[Request], ahead: Sequence[Sequence[int]]) -> None:
        """Change the scores `[R, V]` in place, where a request asks for it."""
        for row, request in enumerate(requests):
            if request.params.changes_logits:
                self._apply_row(scores[row], request, ahead[row])

    def _apply_row(self, scores: Tensor, request: Request, ahead: Sequence[int]) -> None:
        params = request.params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=scores.device)
            scores.index_add_(0, ids, scores.new_tensor(list(params.logit_bias.values())))
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            if request not in self._counts:
                self._counts[request] = _Counts(request, scores)
            counts = self._counts[request]
            counts.advance(request)
            for token_id in ahead:
                counts.add(token_id, 1)
            if params.repetition_penalty != 1.0:
                penalty = params.repetition_penalty
                penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
                torch.where(counts.all > 0, penalized, scores, out=scores)
            if params.presence_penalty:
                scores.sub_((counts.answer > 0).to(scores.dtype), alpha=params.presence_penalty)
            if params.frequency_penalty:
                scores.sub_(counts.answer, alpha=params.frequency_penalty)
            for token_id in ahead:
                counts.add(token_id, -1)
        masked = list(params.forbidden_ids)
        if request.num_output_tokens + len(ahead) < params.min_new_tokens:
            masked += [*params.eos_token_ids, *params.late_ids]
        if masked:
            ids = torch.tensor([i for i in masked if i < scores.shape[0]], dtype=torch.int64, device=scores.device)
            kept = scores[ids]
            scores[ids] = -torch.inf
            if request.guide is not None and bool((scores == -torch.inf).all()):
                scores[ids] = kept  # its grammar allows nothing but these: it is complete, say


class _Counts:
    """How often each token occurs, `[V]`: in prompt and answer, and in the answer alone."""

    def __init__(self, request: Request, like: Tensor) -> None:
        self.all, self.answer = torch.zeros(2, like.shape[0], device=like.device)
        self._num_counted = 0
        self._known = like.shape[0]

    def advance(self, request: Request) -> None:
        """Count the tokens that have come since the last call."""
        first = request.num_prompt_tokens
        if self._num_counted < first:
            self._count(self.all, request.token_ids[self._num_counted : first])
        new = request.token_ids[max(self._num_counted, first) :]
        self._count(self.all, new)
        self._count(self.answer, new)
        self._num_counted = request.num_tokens

    def add(self, token_id: int, times: int) -> None:
        """Count a token of the answer `times` more."""
        self.all[token_id] += times
        self.answer[token_id] += times

    def _count(self, counts: Tensor, token_ids: Sequence[int]) -> None:
        known = [token_id for token_id in token_ids if token_id < self._known]
        if known:
            counts += torch.bincount(torch.tensor(known, device=counts.device), minlength=self._known)
