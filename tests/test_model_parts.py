"""The parts of the model called by themselves, in the documented padded form, and by another implementation."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minim3.kernels.reference import selected_keys_mask
from minim3.model.batch import ForwardBatch, ForwardRecord, PagedContext
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM as Text
from minim3.model.decoder import Block
from minim3.model.layers import RotaryFactors, apply_rotary, rotary_table
from minim3.model.published import _padding_mask_to_additive_bias
from tests.tiny_models import media_prompt, random_ids, text_model, vl_model


@pytest.fixture(scope="module")
def model() -> Text:
    return text_model(num_mtp_modules=2)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_the_reference_backend_gives_the_same() -> None:
    prompt = media_prompt(tail=40)
    whole, reference = vl_model(num_mtp_modules=1), vl_model(num_mtp_modules=1, backend="reference")
    got, expected = (each(**prompt, output_mtp_logits=True, labels=prompt["input_ids"]) for each in (whole, reference))
    close(got.logits, expected.logits)
    close(got.mtp_per_depth_logits[0], expected.mtp_per_depth_logits[0])
    close(got.loss, expected.loss)
    with pytest.raises(ValueError, match="'nonsense' is unknown"):
        text_model(backend="nonsense")(random_ids(1, 30))


def parts_and_calls(model: Text, x: Tensor, freqs: Tensor) -> dict[str, tuple[Any, dict[str, Tensor]]]:
    layers = model.model.layers
    return {
        "dense block": (layers[0], {}), "sparse block": (layers[1], {}),
        "full attention": (layers[0].self_attn, {}), "sparse attention": (layers[1].self_attn, {}),
        "MTP block": (model.model.mtp.layers[0], {"embed_input": x.flip(1)}),
    }  # fmt: skip


@pytest.mark.parametrize("part", ["dense block", "sparse block", "full attention", "sparse attention", "MTP block"])
@torch.no_grad()
def test_parts_called_directly_on_padded_tensors_equal_the_packed_path(model: Text, part: str) -> None:
    """The documented forward of a part, `[B, S, H]` with masks, is the packed one on each row."""
    x = torch.randn(2, 26, 32, generator=torch.Generator().manual_seed(4))
    freqs = model.model.make_freqs_cis(torch.arange(26)[None])
    module, extra = parts_and_calls(model, x, freqs)[part]
    mask = torch.ones(2, 26)
    mask[1, :7] = 0
    padded_call = module(x, freqs_cis=freqs, attention_mask=mask, **extra)
    close(module(x, freqs_cis=freqs, padding_mask=mask == 0, **extra), padded_call)
    assert padded_call.shape == x.shape
    for row, first in ((0, 0), (1, 7)):
        packed = module(
            x[row, first:], freqs_cis=freqs[0, first:], batch=ForwardBatch.packed([26 - first]),
            **{name: tensor[row, first:] for name, tensor in extra.items()},
        )  # fmt: skip
        close(padded_call[row, first:], packed)


@torch.no_grad()
def test_the_indexer_says_what_attention_does(model: Text) -> None:
    """Indexer.forward as a bias, the recorded block ids, and dense attention under that bias: one selection."""
    layer = model.model.layers[1]
    x = torch.randn(1, 39, 32, generator=torch.Generator().manual_seed(5))
    freqs = model.model.make_freqs_cis(torch.arange(39)[None])
    bias = layer.self_attn.indexer(x, freqs_cis=freqs, num_q_heads=4)
    assert bias.shape == (1, 4, 39, 39)
    record = ForwardRecord(block_indices=[])
    out = layer.self_attn(x, freqs_cis=freqs, record=record)
    (ids,) = record.block_indices
    assert ids.shape == (39, 2, 2)
    keep = selected_keys_mask(ids, 39, 4).transpose(0, 1) & torch.ones(39, 39, dtype=torch.bool).tril()
    assert torch.equal(bias[0] == 0, keep.repeat_interleave(2, 0))
    assert not keep.all(), "the case chooses something"
    q, k, v = (t.transpose(0, 1) for t in layer.self_attn._project_main(x[0], freqs[0]))
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[0], enable_gqa=True)
    close(layer.self_attn.o_proj(dense.transpose(0, 1).flatten(-2)), out[0])
    additive = _padding_mask_to_additive_bias(torch.tensor([[0, 1, 1]]), bias)
    assert additive.flatten().tolist() == [float("-inf"), 0.0, 0.0]


@torch.no_grad()
def test_a_block_is_its_parts(model: Text) -> None:
    """Pre-norm attention, then a pre-norm MLP, reached as `mlp` in either kind; the shared expert is not scaled."""
    x = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(6))
    freqs = model.model.make_freqs_cis(torch.arange(10)[None])
    for index, moe in ((0, False), (1, True)):
        block: Block = model.model.layers[index]
        assert block.is_moe_layer is moe
        middle = x + block.self_attn(block.input_layernorm(x), freqs_cis=freqs)
        close(block(x, freqs_cis=freqs), middle + block.mlp(block.post_attention_layernorm(middle)))
    flat = torch.randn(5, 32, generator=torch.Generator().manual_seed(7))
    experts, weights = block.mlp.route(block.mlp.gate(flat))
    expected = block.shared_experts(flat)
    for token, choice in ((t, c) for t in range(5) for c in range(2)):
        e = experts[token, choice]
        gate, up = (block.mlp.experts.w13[e] @ flat[token]).chunk(2)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        expected[token] += weights[token, choice] * (
            block.mlp.experts.w2[e] @ (gate * torch.sigmoid(1.702 * gate) * (up + 1))
        )
    close(block.mlp(flat), expected)
    assert model.model.layers[0].shared_experts is None
    mlp = model.model.layers[0].mlp
    gate, up = mlp.gate_proj(flat), mlp.up_proj(flat)
    gate, up = gate.clamp(max=mlp.limit), up.clamp(-mlp.limit, mlp.limit)
    close(mlp(flat), mlp.down_proj(gate * torch.sigmoid(mlp.alpha * gate) * (up + 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_rotation_of_inference_is_the_rotation(tokens: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, 3, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for rotary_dim in (4, 8, 16):
        table = rotary_table(torch.arange(tokens) + 70, rotary_dim, 1e4)
        before = x.clone()
        rotated = RotaryFactors.of(table, 16).rotate(x)
        assert rotated.dtype == dtype
        assert torch.equal(x, before)
        assert (rotated - apply_rotary(x, table)).abs().max() <= 1e-6


def test_new_tokens_go_to_their_slots() -> None:
    """The same slots serve K and V of several heads and the one index key, whatever their width and dtype."""
    slots = [3 * 8 + 7, 8, 9, 2 * 8]
    context = PagedContext([], torch.zeros(1, 1, dtype=torch.int64), torch.tensor(slots), 8)
    for pages in (torch.zeros(4, 2, 8, 5), torch.zeros(4, 3, 8, 4, dtype=torch.bfloat16), torch.zeros(4, 2, 8, 3)):
        new = torch.randn(4, pages.shape[1], pages.shape[3])
        expected = pages.clone()
        for token, slot in enumerate(slots):
            expected[slot // 8, :, slot % 8] = new[token].to(pages.dtype)
        context.store(pages, new)
        assert torch.equal(pages, expected)
    index_pages, index_k = torch.zeros(4, 8, 5), torch.randn(4, 1, 5)
    context.store(index_pages, index_k)
    assert torch.equal(index_pages.view(32, 5)[slots], index_k[:, 0])
    assert int(index_pages.ne(0).any(-1).sum()) == len(slots)
