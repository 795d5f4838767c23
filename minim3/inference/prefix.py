"""Keys of pages by their content: two requests whose first tokens are the same, pictures included, share pages.

The key of a page stands for everything its K, V and index keys depend on, from the first token of the request on::

    key(i) = sha256(key(i - 1), token ids of page i, for each picture or chunk in it: its digest, first feature)

A hash that is not collision-proof would let one user read another's answer out of a forged prompt; sha256 is. Pictures
count by their pixels and grid (`media.py`), not by name.

With speculation, the keys of a draft module at the last position of a page also depend on the token after the page.
They are shared all the same: they shape a proposal, and never an answer.
"""

from array import array
from hashlib import sha256

from minim3.inference.request import Request

ROOT = sha256(b"minim3 pages").digest()


def page_keys(request: Request, page_size: int, num_pages: int) -> list[bytes]:
    """Keys of the first `num_pages` pages of `request`, all full of known tokens. Kept with the request."""
    known = request.page_keys
    for page in range(len(known), num_pages):
        start, stop = page * page_size, (page + 1) * page_size
        assert stop <= request.num_tokens, (stop, request.num_tokens)
        content = sha256(known[-1] if known else ROOT)
        content.update(array("q", request.token_ids[start:stop]).tobytes())
        if start < request.num_prompt_tokens:
            for token_id in request.placeholders:
                content.update(_media_content(request, token_id, start, stop))
        known.append(content.digest())
    return known[:num_pages]


def _media_content(request: Request, token_id: int, start: int, stop: int) -> bytes:
    """What the placeholders `token_id` at positions `start <= p < stop` show."""
    low, high = request.placeholders_between(token_id, start, stop)
    if low == high:
        return b""
    assert request.media is not None
    assert request.media.digests is not None
    parts, first = [], 0
    for num_features, digest in request.media.digests[token_id]:
        if first < high and low < first + num_features:
            parts.append(digest + max(low - first, 0).to_bytes(8, "little"))
        first += num_features
    return b"".join(parts)
