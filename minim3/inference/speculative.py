"""Speculative decoding with the model's own multi-token prediction (MTP) modules.

After a step, module 0 runs over the tokens that the step computed: at position t it takes the backbone's output h_t
and the embedding of token t + 1, known by then, and predicts token t + 2. From the last position on it predicts what
follows the token just chosen: the first draft. Module d takes the output of module d - 1 and the embedding of the draft
before, and predicts one further; when the modules are used up, the last one goes on from its own output, one position
on. The next step verifies: it computes the drafts behind the known token, and chooses a token at each place as it would
without them. A draft stands while it equals what was chosen; the first that does not is replaced by the choice.

So the answer is exactly what it would be without drafts, greedy or drawn, for the number that draws a token belongs to
its place in the answer (`sampling.py`). Drafts are drawn with that same number, so that draft and choice agree about as
often as their distributions do. The distribution is kept, as by rejection sampling, and every single token too.

K, V and index keys of the modules lie in the pages of the tokens they belong to (`PagedCache`), behind the layers of
the model; they are written in every step for every token, so that prefixes, chunks and preemption keep them in line.
Those of module d > 0 at the last d positions were made with drafts; a draft that falls leaves its mark there, which
may make a proposal worse, and never an answer.

Shape legend: N requests, T tokens, H hidden size.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from minim3.inference.request import Request
from minim3.inference.runner import Runner, StepOutput
from minim3.inference.sampling import Sampler
from minim3.inference.scheduler import Chunk
from minim3.model.batch import ForwardBatch
from minim3.model.layers import rotary_table

if TYPE_CHECKING:
    from minim3.model.causal_lm import CausalLM


class Gain(Protocol):
    """What a request gains in a step (`engine.Chosen`)."""

    @property
    def token_ids(self) -> list[int]: ...


def num_draft_layers(model: "CausalLM", num_speculative_tokens: int) -> int:
    """Layers whose keys and values drafts need in the cache.

    Raises:
        ValueError: a negative number of drafts, or drafts of a model without MTP modules.
    """
    if isinstance(num_speculative_tokens, bool) or not isinstance(num_speculative_tokens, int):
        raise ValueError(f"num_speculative_tokens must be an integer, got {num_speculative_tokens!r}")
    if num_speculative_tokens < 0:
        raise ValueError(f"num_speculative_tokens must be at least 0, got {num_speculative_tokens}")
    if not num_speculative_tokens:
        return 0
    if model.text_model.mtp is None:
        raise ValueError(
            f"num_speculative_tokens is {num_speculative_tokens}, but this model has no MTP modules to propose tokens: "
            "pass 0"
        )
    return len(model.text_model.mtp.layers)


class Drafter:
    """Proposes `num_tokens` tokens for every request that decodes, fewer where it ends before."""

    def __init__(self, runner: Runner, num_tokens: int) -> None:
        self.runner = runner
        self.cache = runner.cache
        self.model = runner.model
        self.num_tokens = num_tokens
        mtp = self.model.text_model.mtp
        assert mtp is not None
        self.modules = list(mtp.layers)
        config = self.model.text_config
        decoding = runner.decoding
        self._decoding = [
            None if decoding is None else decoding.draft_module(module, config)  # type: ignore[arg-type]
            for module in mtp.layers
        ]

    def draft(
        self, plan: Sequence[Chunk], gains: Sequence[Gain], output: StepOutput, sampler: Sampler
    ) -> list[list[int]]:
        """Drafts for each chunk of the plan, to follow the tokens it gains; none for one that ends inside a prompt.

        Stores keys and values of the modules for every token that the step computed and that stands.
        """
        hidden_TH, batch = self._standing(plan, gains, output)
        ends = [end - 1 for end in accumulate(batch.lengths_q)]
        wanted = [self._num_drafts(chunk.request, gain) for chunk, gain in zip(plan, gains)]
        drafts: list[list[int]] = [[] for _ in plan]
        drafted: list[int] = []
        for depth in range(max(len(self.modules), *wanted)):
            places = [place for place, number in enumerate(wanted) if number > depth]
            requests = [plan[place].request for place in places]
            if depth < len(self.modules):
                ids = self._following(depth, plan, gains, drafts, batch)
                hidden_TH = self._run(depth, hidden_TH, ids, batch)
                if not places:
                    continue
                hidden_NH = hidden_TH[-1:]  # of one sequence alone
                if len(plan) > 1:
                    hidden_NH = hidden_TH[torch.tensor([ends[place] for place in places], device=hidden_TH.device)]
            else:
                if len(places) < len(drafted):
                    hidden_NH = hidden_NH[torch.tensor([drafted.index(place) for place in places])]
                positions = [batch.lengths_k[place] + depth - len(self.modules) for place in places]
                hidden_NH = self._one_each(hidden_NH, [drafts[place][-1] for place in places], requests, positions)
            drafted = places
            ahead = [gains[place].token_ids + drafts[place] for place in places]
            logits = self.runner.head(hidden_NH)
            drawn = sampler.sample(logits, requests, ahead, with_logprobs=False)
            for place, token_id in zip(places, drawn.token_ids, strict=True):
                drafts[place].append(token_id)
        return drafts

    def _num_drafts(self, request: Request, gain: Gain) -> int:
        """Drafts that may stand: the last token of an answer is chosen, not drafted. Their pages are handed out."""
        if not gain.token_ids:
            return 0
        num_tokens = request.num_tokens + len(gain.token_ids)
        left = request.num_prompt_tokens + request.max_new_tokens - num_tokens
        number = max(0, min(self.num_tokens, left - 1))
        # The keys of a draft that the last module makes from its own output have a place of their own, too.
        wanted = num_tokens - 1 + max(0, number - len(self.modules))
        missing = self.cache.pool.pages_for(wanted) - len(request.pages)
        if missing > 0:
            if not self.cache.pool.fits(missing):
                return min(number, len(self.modules))
            self.cache.pool.extend(request, wanted)
        return number

    def _standing(
        self, plan: Sequence[Chunk], gains: Sequence[Gain], output: StepOutput
    ) -> tuple[Tensor, ForwardBatch]:
        """Of the tokens that the step computed those that stand: hidden states of the backbone `[T, H]`, and batch."""
        rows: list[int] = []
        lengths_q: list[int] = []
        first_row = 0
        for (_, num_tokens, draft_ids), gain in zip(plan, gains):
            lengths_q.append(num_tokens + max(0, len(gain.token_ids) - 1))
            rows += range(first_row, first_row + lengths_q[-1])
            first_row += num_tokens + len(draft_ids)
        hidden_TH, batch = output.hidden_TH, output.batch
        if len(rows) == hidden_TH.shape[0]:
            return hidden_TH, batch
        assert batch.pages is not None
        kept = torch.tensor(rows, device=hidden_TH.device)
        requests = [chunk.request for chunk in plan]
        lengths_k = [chunk.request.num_computed_tokens + length for chunk, length in zip(plan, lengths_q)]
        batch = self.runner.batch(requests, batch.positions[kept], lengths_q, lengths_k, batch.pages.slots[kept])
        return hidden_TH[kept], batch

    @staticmethod
    def _following(
        depth: int, plan: Sequence[Chunk], gains: Sequence[Gain], drafts: Sequence[Sequence[int]], batch: ForwardBatch
    ) -> list[int]:
        """The ids `1 + depth` places behind each token that stands; the last known one where there is none yet."""
        ids: list[int] = []
        for chunk, gain, own, length_q, length_k in zip(plan, gains, drafts, batch.lengths_q, batch.lengths_k):
            first = length_k - length_q + 1 + depth
            known = [*chunk.request.token_ids[first : first + length_q], *gain.token_ids, *own][:length_q]
            known += [chunk.request.token_ids[-1]] * (length_q - len(known))
            ids += known
        return ids

    def _one_each(
        self, hidden_NH: Tensor, token_ids: list[int], requests: list[Request], positions: list[int]
    ) -> Tensor:
        """The last module at one position of each request."""
        slots = [self.cache.slots(request, at, at + 1)[0] for request, at in zip(requests, positions)]
        positions_N, slots_N = torch.tensor([positions, slots], device=hidden_NH.device)
        batch = self.runner.batch(requests, positions_N, [1] * len(requests), [at + 1 for at in positions], slots_N)
        return self._run(len(self.modules) - 1, hidden_NH, token_ids, batch)

    def _run(self, module: int, hidden_TH: Tensor, next_ids: list[int], batch: ForwardBatch) -> Tensor:
        config = self.model.text_config
        embeds_TH = self.model.text_model.embed_tokens(torch.tensor(next_ids, device=hidden_TH.device))
        decoding = self._decoding[module]
        hidden = None if decoding is None else decoding.forward_packed(embeds_TH, batch, hidden_TH)
        if hidden is not None:
            return hidden
        freqs_cis = rotary_table(batch.positions, config.rotary_dim, config.rope_theta)
        return self.modules[module](hidden_TH, embed_input=embeds_TH, freqs_cis=freqs_cis, batch=batch)
