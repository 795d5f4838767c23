"""The parts of the model called by themselves, in the documented padded form, and by another implementation."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minim3 import kernels
from minim3.kernels.reference import selected_keys_mask, swiglu_oai
from minim3.model.batch import ForwardBatch, ForwardRecord, PagedContext
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM as Text
from minim3.model.decoder import Block
from minim3.model.layers import MiniMaxM3RMSNorm, RotaryFactors, apply_rotary, rotary_table
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


def plain_norm(x: Tensor, weight: Tensor, gemma: bool) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (normed * (1.0 + weight if gemma else weight)).to(x.dtype)


def plain_rotary(x: Tensor, table: Tensor) -> Tensor:
    half, wide = table.shape[-1] // 2, x if x.dtype == torch.float64 else x.float()
    cos, sin = table.unsqueeze(-2).chunk(2, dim=-1)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def numbers(*shape: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, dtype=torch.float64, generator=generator) * size).to(dtype).requires_grad_()


def assert_same_gradients(got: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    assert got.dtype == expected.dtype
    close(got, expected, tolerance)
    along = torch.linspace(-1, 2, got.numel(), dtype=got.dtype).view(got.shape)
    grads = (torch.autograd.grad(out, inputs, along) for out in (got, expected))
    for one, other in zip(*grads, strict=True):
        assert one.dtype == other.dtype
        close(one, other, tolerance)


@pytest.mark.parametrize("shape", [(7,), (1, 5), (3, 4), (2, 3, 16), (0, 8)])
@pytest.mark.parametrize("gemma", [True, False])
def test_gradient_of_the_norm(shape: tuple[int, ...], gemma: bool) -> None:
    """A gradient of our own: equal to autograd's, to finite differences, and where only one of the two is wanted."""
    norm = MiniMaxM3RMSNorm(shape[-1], gemma=gemma).double()
    norm.weight.data += torch.linspace(-0.5, 1, shape[-1])
    x = numbers(*shape)
    assert_same_gradients(norm(x), plain_norm(x, norm.weight, gemma), [x, norm.weight], 1e-12)
    if x.numel():
        torch.autograd.gradcheck(lambda x, weight: norm(x), (x, norm.weight))
    for wanted, fixed in ((x, norm.weight), (norm.weight, x)):
        fixed.requires_grad_(False)
        assert_same_gradients(norm(x), plain_norm(x, norm.weight, gemma), [wanted], 1e-12)
        fixed.requires_grad_()


@pytest.mark.parametrize("rotary_dim", [2, 6, 10])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_gradient_of_the_rotation(tokens: int, rotary_dim: int) -> None:
    """Rotated back, and the channels that pass passed; also where the heads lie apart from each other."""
    table = rotary_table(torch.arange(tokens) + 3, rotary_dim, 100.0)
    whole = numbers(tokens, 4, 11)
    for x in (whole, whole[:, ::2, 1:]):
        assert_same_gradients(apply_rotary(x, table), plain_rotary(x, table), [whole], 1e-12)
    if tokens:
        torch.autograd.gradcheck(lambda x: apply_rotary(x, table.double()), (whole,))


@pytest.mark.parametrize("limit", [0.0, 0.7, 7.0])
@pytest.mark.parametrize(("alpha", "beta"), [(1.702, 1.0), (1.0, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("shape", [(5, 3), (2, 1, 7), (0, 4)])
def test_gradient_of_the_gate(shape: tuple[int, ...], alpha: float, beta: float, limit: float) -> None:
    """Also beyond the limit, where there is none."""
    gate, up = numbers(*shape, 1, size=2.0).squeeze(-1), numbers(1, *shape, size=2.0).squeeze(0)
    got = kernels.swiglu_oai(gate, up, alpha, limit, beta)
    assert_same_gradients(got, swiglu_oai(gate, up, alpha, limit, beta), [gate, up], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_parts_compute_in_fp32_inside(dtype: torch.dtype, autocast: bool) -> None:
    """bf16 in gives bf16 out with the error of one rounding, and autocast takes no product below fp32."""
    norm = MiniMaxM3RMSNorm(24)
    norm.weight.data += torch.linspace(-0.5, 1, 24)
    x, up = numbers(9, 2, 24, dtype=dtype), numbers(9, 2, 24, dtype=dtype, size=2.0)
    table = rotary_table(torch.arange(9), 16, 100.0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert_same_gradients(norm(x), plain_norm(x, norm.weight, True), [x], tolerance)
        # The weight's gradient is a sum over rows: rounded once, at its end.
        (got,) = torch.autograd.grad(norm(x).double().sum(), [norm.weight])
        assert got.dtype == torch.float32
        exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
        close(got.double(), exact.sum((0, 1)), 1e-5)
        assert_same_gradients(apply_rotary(x, table), plain_rotary(x, table), [x], tolerance)
        got = kernels.swiglu_oai(x, up, 1.702, 7.0, 1.0)
        assert_same_gradients(got, swiglu_oai(x, up, 1.702, 7.0), [x, up], tolerance)


def test_parts_may_be_used_twice_and_computed_again() -> None:
    """A norm used for two things adds up its gradients; checkpointed, it gives the same bits."""
    norm, x = MiniMaxM3RMSNorm(8).double(), numbers(6, 3, 8)
    table = rotary_table(torch.arange(6), 4, 100.0)

    def both(x: Tensor) -> Tensor:
        return apply_rotary(norm(x), table) * norm(norm(x) + kernels.swiglu_oai(x, norm(x), 1.702, 7.0, 1.0))

    plain = torch.autograd.grad(both(x).square().sum(), [x, norm.weight])
    again = torch.autograd.grad(checkpoint(both, x, use_reentrant=False).square().sum(), [x, norm.weight])
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    torch.autograd.gradcheck(lambda x, weight: both(x), (x, norm.weight))


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
