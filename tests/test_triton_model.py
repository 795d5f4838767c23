"""A whole model on the Triton kernels, interpreted: the calls the model makes, with the shapes it makes them with."""

import torch

from tests.interpreted import close, interpreted  # noqa: F401
from tests.tiny_models import random_ids, text_model

SHAPE = {"index_block_size": 16, "index_topk_blocks": 2, "num_hidden_layers": 2,
         "layer_types": ("full_attention", "minimax_m3_sparse"), "mlp_layer_types": ("dense", "sparse")}  # fmt: skip


def test_logits_and_gradients_equal_the_reference() -> None:
    """Packed rows beyond the budget of blocks, one of them shorter; every gradient, the indexer's too."""
    ids = random_ids(2, 44)
    mask = torch.ones(2, 44, dtype=torch.int64)
    mask[1, :25] = 0
    results = []
    for backend in ("reference", "triton"):
        model = text_model(1, backend=backend, **SHAPE)
        out = model(ids, attention_mask=mask, output_indexer_kl=True)
        logits = out.logits
        (logits.square().mean() + sum(out.indexer_kl)).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), grads))
    (want, want_grads), (got, grads) = results
    close(got, want, 1e-4)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        assert (grad - want_grads[name]).abs().max() <= 1e-3 * want_grads[name].abs().max() + 1e-6, name


def test_greedy_tokens_equal_those_of_the_portable_kernels() -> None:
    """Prefill in pages, then decoding beyond the budget of blocks."""
    ids = random_ids(1, 36)
    tokens = []
    for backend in ("portable", "triton"):
        model = text_model(2, backend=backend, **SHAPE)
        tokens.append(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False))
    assert torch.equal(*tokens)
