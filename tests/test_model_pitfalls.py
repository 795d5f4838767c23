"""One test for each mistake of public implementations that the model itself can make, numbered as in its contract.

The others are where the code is that can make them: kernels (1, 4-7, 9, 10, 17, 26), processing (11-16, 25), checkpoint
(22, 23).
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minim3.inference.engine import Engine
from minim3.inference.request import SamplingParams
from minim3.model.attention import MiniMaxM3Attention
from minim3.model.batch import ForwardBatch, ForwardRecord, LayerPages, PagedContext
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM as Text
from minim3.model.causal_lm import MiniMaxM3SparseForConditionalGeneration as Whole
from minim3.model.layers import MiniMaxM3RMSNorm
from minim3.model.vision import patch_coordinates, vision_rotary_table
from tests.tiny_models import PATCH_VALUES, padded, random_ids, text_model, vl_model


@pytest.fixture(scope="module")
def model() -> Text:
    return text_model(2)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def random_hidden(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))


def attend(attention: MiniMaxM3Attention, model: Text, x: Tensor, block_indices: list[Tensor] | None = None) -> Tensor:
    """Heads `[T, Hq, D]` of one packed sequence `[T, H]`, before the output projection."""
    caught: list[Tensor] = []
    hook = attention.o_proj.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    freqs = model.model.make_freqs_cis(torch.arange(len(x)))
    record = ForwardRecord(block_indices=block_indices)
    attention(x, freqs_cis=freqs, batch=ForwardBatch.packed([len(x)]), record=record)
    hook.remove()
    return caught[0].unflatten(-1, (attention.num_heads, attention.head_dim))


class Pages:
    """The cached past of one model, driven by hand: full of NaN where nothing was stored."""

    def __init__(self, model: Text, num_pages: int, page_size: int) -> None:
        config = model.config
        self.model, self.page_size = model, page_size
        keys = (num_pages, config.num_key_value_heads, page_size, config.head_dim)
        self.layers = [
            LayerPages(
                torch.full(keys, torch.nan), torch.full(keys, torch.nan),
                torch.full((num_pages, page_size, config.index_head_dim), torch.nan)
                if config.is_sparse_attention_layer(layer) else None,
            )
            for layer in range(config.num_hidden_layers)
        ]  # fmt: skip

    @torch.no_grad()
    def run(self, ids: Tensor, start: int, stop: int, table: list[int]) -> Tensor:
        """Compute the tokens start..stop of `ids` on what lies in the pages `table`: hidden states `[new, H]`."""
        positions, page_table = torch.arange(start, stop), torch.tensor([table])
        slots = page_table[0, positions // self.page_size] * self.page_size + positions % self.page_size
        context = PagedContext(self.layers, page_table, slots, self.page_size)
        batch = ForwardBatch(positions, (stop - start,), (stop,), context)
        return self.model.model.forward_packed(self.model.embed_tokens_packed(ids[start:stop]), batch)


@torch.no_grad()
def whole_sequence(model: Text, ids: Tensor) -> Tensor:
    return model.model(ids[None])[0]


@torch.no_grad()
def test_pitfall_1_a_kv_group_attends_to_the_choice_of_its_own_index_head(model: Text) -> None:
    """Merged over index heads, the blocks of one head would show in the output of the other's group."""
    attention, x = model.model.layers[1].self_attn, random_hidden(40)
    before_ids: list[Tensor] = []
    before = attend(attention, model, x, before_ids)
    rows = attention.indexer.index_q_proj.weight[16:]  # of index head 1
    kept = rows.clone()
    rows.neg_()
    after_ids: list[Tensor] = []
    after = attend(attention, model, x, after_ids)
    rows.copy_(kept)
    assert torch.equal(after_ids[0][:, 0], before_ids[0][:, 0])
    assert not torch.equal(after_ids[0][:, 1], before_ids[0][:, 1])
    close(after[:, :2], before[:, :2])
    assert (after[:, 2:] - before[:, 2:]).abs().max() > 0.1


@pytest.mark.parametrize("is_packed", [False, True])
@torch.no_grad()
def test_pitfall_2_only_rotary_dim_channels_rotate(is_packed: bool) -> None:
    """Main and index heads alike: 8 of 16 channels, channel i paired with i + 4, at theta ** (-2 i / 8)."""
    model = text_model(2)
    attention = model.model.layers[1].self_attn
    if is_packed:
        model.pack_for_inference()
        assert attention._packed is not None
    x = random_hidden(1).expand(2, 32)  # one token at positions 0 and 5
    freqs = model.model.make_freqs_cis(torch.tensor([0, 5]))
    q, k, v, index_q, index_k = attention._project(x, freqs, ForwardBatch.packed([2]), True, train_indexer=False)
    assert torch.equal(v[0], v[1])
    angles = 5 * 1e4 ** (-torch.arange(4) * 2 / 8)
    for heads in (q, k, index_q, index_k):
        still, turned = heads
        close(turned[..., 8:], still[..., 8:], 1e-6)
        first, second = still[..., :4], still[..., 4:8]
        close(turned[..., :4], first * angles.cos() - second * angles.sin())
        close(turned[..., 4:8], second * angles.cos() + first * angles.sin())
        assert (turned[..., :8] - still[..., :8]).abs().max() > 0.1


def test_pitfall_3_index_keys_stay_with_their_tokens_on_prefix_reuse_trim_and_reorder(model: Text) -> None:
    """K and V of a reused page are right while its index keys are gone or of another text: plausible, wrong blocks."""
    first, second = random_ids(40, seed=1), random_ids(40, seed=2)
    second[:16] = first[:16]
    pages = Pages(model, num_pages=30, page_size=4)
    close(pages.run(first, 0, 40, [7, 3, 9, 0, 12, 5, 1, 8, 2, 4]), whole_sequence(model, first))
    # Prefix reuse: the first four pages serve another text, which brings its own from there on.
    shared = [7, 3, 9, 0, 20, 21, 22, 23, 24, 25]
    close(pages.run(second, 16, 40, shared), whole_sequence(model, second)[16:])
    # Trim: the first text back to 18 tokens, inside a page, and on with another end.
    other_end = torch.cat([first[:18], random_ids(22, seed=3)])
    table = [7, 3, 9, 0, 12, 5, 1, 8, 2, 4]
    close(pages.run(other_end, 18, 40, table), whole_sequence(model, other_end)[18:])
    # Reorder: pages copied to other places (as beams are), all that a page holds.
    places = torch.tensor([26, 27, 28, 29, 10, 11, 13, 14, 15, 16])
    for layer in pages.layers:
        for stored in (layer.k, layer.v, layer.index_k):
            if stored is not None:
                stored[places] = stored[torch.tensor(table)]
    close(pages.run(other_end, 39, 40, places.tolist()), whole_sequence(model, other_end)[39:])


@pytest.mark.parametrize("page_size", [1, 3, 4, 5, 16, 64])
def test_pitfall_7_a_page_need_not_be_a_block(model: Text, page_size: int) -> None:
    """Blocks of 4 tokens are logical: cached in pages of any size, in any order, prefilled and decoded."""
    ids = random_ids(30, seed=4)
    num_pages = -(-30 // page_size)
    table = torch.randperm(num_pages, generator=torch.Generator().manual_seed(page_size)).tolist()
    pages = Pages(model, num_pages, page_size)
    hidden = [pages.run(ids, 0, 25, table), *(pages.run(ids, at, at + 1, table) for at in range(25, 30))]
    close(torch.cat(hidden), whole_sequence(model, ids))


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@torch.no_grad()
def test_pitfall_8_padding_does_not_shift_blocks(model: Text, side: str) -> None:
    """Padding of 3 where blocks hold 4: counted from the padded row, every block but the last would be another."""
    rows = [random_ids(33, seed=5), random_ids(21, seed=6)]
    ids, mask = padded(rows, side, 36)
    output = model(ids, attention_mask=mask)
    new = model.generate(ids, attention_mask=mask, max_new_tokens=6, eos_token_id=None)[:, 36:]
    for row, tokens in enumerate(rows):
        close(output.logits[row, mask[row].bool()], model(tokens[None]).logits[0])
        alone = model.generate(tokens[None], max_new_tokens=6, eos_token_id=None)[0, len(tokens) :]
        assert torch.equal(new[row], alone)


@torch.no_grad()
def test_pitfall_9_packed_documents_do_not_share_a_budget(model: Text) -> None:
    """Three documents in one sequence: each has its own blocks, its own budget, and sees nothing of the others."""
    documents = [random_ids(n, seed=n) for n in (27, 6, 34)]
    record = ForwardRecord(block_indices=[])
    embeds = model.embed_tokens_packed(torch.cat(documents))
    hidden = model.model.forward_packed(embeds, ForwardBatch.packed([27, 6, 34]), record)
    for ids, start in zip(documents, (0, 27, 33)):
        alone = ForwardRecord(block_indices=[])
        expected = model.model.forward_packed(model.embed_tokens_packed(ids), ForwardBatch.packed([len(ids)]), alone)
        close(hidden[start : start + len(ids)], expected)
        for layer, blocks in enumerate(alone.block_indices or ()):
            together = (record.block_indices or [])[layer][start : start + len(ids)]
            assert torch.equal(together, blocks)
            wanted = (torch.arange(len(ids)) // 4 + 1).clamp(max=2)  # at most topk_blocks, as many as there are
            assert torch.equal((together >= 0).sum(-1), wanted[:, None].expand(-1, 2))
            assert torch.equal(together[:, :, 0].clamp(min=0) <= torch.arange(len(ids))[:, None] // 4,
                               torch.ones(len(ids), 2, dtype=torch.bool))  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@torch.no_grad()
def test_pitfall_10_in_bf16_nothing_leaks_through_the_masks(backend: str | None) -> None:
    """An additive mask leaks in bf16 or makes NaN. Values a query may not see are made huge: not one bit changes."""
    model = text_model(2, backend=backend).cast(torch.bfloat16)
    x = random_hidden(30).bfloat16()
    for layer in (0, 1):
        attention = model.model.layers[layer].self_attn
        block_ids: list[Tensor] = []
        before = attend(attention, model, x, block_ids)
        assert before.dtype == torch.bfloat16
        assert not before.isnan().any()
        for query in (0, 1, 3, 17, 29):
            seen = torch.arange(30) <= query
            if layer:
                seen = seen & torch.isin(torch.arange(30) // 4, block_ids[0][query, 0])

            def poison(_, __, v: Tensor, seen: Tensor = seen) -> Tensor:
                return torch.where(seen[:, None], v, 1e30)

            hook = attention.v_proj.register_forward_hook(poison)
            after = attend(attention, model, x)
            hook.remove()
            assert torch.equal(after[query, :2], before[query, :2])


def test_pitfall_18_full_attention_layers_see_the_cached_prefix() -> None:
    """A layer without an indexer that attends to its new tokens only: right on whole prompts, wrong after the first."""
    model = text_model(4, layer_types=("full_attention",) * 3)
    ids = random_ids(26, seed=7)
    pages, table = Pages(model, num_pages=9, page_size=4), [8, 1, 5, 2, 0, 7, 3]
    hidden = [pages.run(ids, start, min(start + 7, 26), table) for start in range(0, 26, 7)]
    close(torch.cat(hidden), whole_sequence(model, ids))
    engine = Engine(model, max_tokens_per_step=5, page_size=4)
    request = engine.add_request(ids.tolist(), SamplingParams(max_new_tokens=6, ignore_eos=True))
    engine.run()
    assert request.output_ids == model.generate(ids[None], max_new_tokens=6, eos_token_id=None)[0, 26:].tolist()


@torch.no_grad()
def test_pitfall_19_the_router_is_fp32_and_its_bias_moves_the_choice_alone(tmp_path: Path) -> None:
    """However a bf16 model comes to be, logits are fp32 products of fp32 weights; weights never contain the bias."""
    exact = text_model(2)
    gates = {name: t for name, t in exact.state_dict().items() if "gate.weight" in name or "correction" in name}
    assert len(gates) == 4
    exact.save_pretrained(tmp_path, format="bf16")
    for model in (
        Text.from_pretrained(tmp_path), Text.from_pretrained(tmp_path, dtype=torch.bfloat16),
        text_model(2).cast(torch.bfloat16), text_model(2).to(torch.bfloat16),
    ):  # fmt: skip
        assert model.dtype == torch.bfloat16
        for name, expected in gates.items():
            got = model.state_dict()[name]
            assert got.dtype == torch.float32
            assert torch.equal(got, expected)
    moe = model.model.layers[1].mlp
    record = ForwardRecord(router_logits=[], expert_ids=[])
    x = random_hidden(50).bfloat16()
    moe(x, record)
    logits, expert_ids = record.router_logits[0], record.expert_ids[0]
    assert logits.dtype == torch.float32
    close(logits, x.float() @ moe.gate.weight.T, 1e-6)
    chosen = (logits.sigmoid() + moe.e_score_correction_bias).topk(2).indices
    assert torch.equal(expert_ids.sort(-1).values, chosen.sort(-1).values)
    moe.e_score_correction_bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0]))
    expert_ids, weights = moe.route(logits)
    assert (expert_ids.sort(-1).values == torch.tensor([1, 3])).all(), "the bias decides"
    scores = logits.sigmoid().gather(-1, expert_ids)
    close(weights, 2.0 * scores / scores.sum(-1, keepdim=True), 1e-6)


@torch.no_grad()
def test_pitfall_20_the_norm_adds_one_exactly_once(tmp_path: Path) -> None:
    """At weight 0 a Gemma norm is neutral: added never, it silences the model; twice (say, at load), it doubles."""
    model = text_model(2, num_mtp_modules=1)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, MiniMaxM3RMSNorm)}
    assert len(norms) == 3 * 4 + 2 * 2 + 1 + 3 + 6, "layers, indexers, the last; MTP's own and those of its block"
    for name, norm in norms.items():
        x = 3 * torch.randn(7, len(norm.weight), generator=torch.Generator().manual_seed(3))
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight)
        close(norm(x), expected, 1e-6)
        close(norm(x / 2, x / 2)[0], expected, 1e-6)
        half = norm(x.bfloat16())
        assert half.dtype == torch.bfloat16, name
        assert (half.float() - expected).abs().max() <= 2**-7 * expected.abs().max()
    close(MiniMaxM3RMSNorm(7, gemma=False)(torch.ones(7)), torch.ones(7))
    model.save_pretrained(tmp_path)
    again = Text.from_pretrained(tmp_path, dtype=torch.float32)
    for name in norms:
        assert torch.equal(again.state_dict()[name + ".weight"], model.state_dict()[name + ".weight"]), name
    # And in the one product of inference, where the four norms of a layer are one table.
    attention = again.model.layers[1].self_attn
    freqs = again.model.make_freqs_cis(torch.arange(9))
    batch = ForwardBatch.packed([9])
    expected = attention._project(random_hidden(9), freqs, batch, True, train_indexer=False)
    again.pack_for_inference()
    for got, wanted in zip(attention._project(random_hidden(9), freqs, batch, True, train_indexer=False), expected):
        close(got, wanted, 1e-6)


@torch.no_grad()
def test_pitfall_21_vision_positions_are_3d_and_restart_in_every_chunk() -> None:
    model = vl_model(2)
    # The tables, since a constant offset of positions changes no output.
    grids = [(2, 2, 4), (1, 2, 2)]
    coordinates = patch_coordinates(grids, merge=2)
    squares = [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    expected = [[t, *square] for t in (0, 1) for square in squares] + [[0, *square] for square in squares[:4]]
    assert coordinates.tolist() == expected
    table = vision_rotary_table(torch.tensor([[3, 5, 7]]), head_dim=80, theta=1e4)[0]
    frequencies = 1e4 ** (-torch.arange(13) * 2 / 26)
    angles = torch.cat([3 * frequencies, 5 * frequencies, 7 * frequencies])
    close(table, torch.cat([angles.cos(), angles.sin()]))
    # Every axis counts: without it, attention would not notice that two slices along it were exchanged.
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(32, PATCH_VALUES, generator=generator)
    tower, grid = model.vision_tower, torch.tensor([[2, 4, 4]])
    cube = patch_coordinates([(2, 4, 4)], merge=2)
    for axis, exchange in ((0, [1, 0]), (1, [1, 0, 3, 2]), (2, [1, 0, 3, 2])):
        moved = cube.clone()
        moved[:, axis] = torch.tensor(exchange)[cube[:, axis]]
        order = torch.tensor([next(j for j in range(32) if torch.equal(cube[j], place)) for place in moved])
        assert (tower(patches[order], grid) - tower(patches, grid)[order]).abs().max() > 1e-2, f"axis {axis}"
    # A chunk is computed as if alone: neither its place in the clip nor its neighbours count.
    both = model.get_video_features(torch.cat([patches, patches.flip(0)]), torch.tensor([[2, 4, 4], [2, 4, 4]]))
    close(both[:8], model.get_video_features(patches, grid))
    close(both[8:], model.get_video_features(patches.flip(0), grid))


@pytest.mark.parametrize("kind", ["text", "whole"])
@torch.no_grad()
def test_pitfall_23_a_config_may_name_mtp_modules_that_its_checkpoint_lacks(kind: str, tmp_path: Path) -> None:
    """The released one does. Built from the config alone, the modules would draft from random weights, and be saved."""
    model = text_model(2) if kind == "text" else vl_model(2)
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (config if kind == "text" else config["text_config"])["num_mtp_modules"] = 3
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    loaded = (Text if kind == "text" else Whole).from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert loaded.text_model.mtp is None
    assert loaded.text_config.num_mtp_modules == 0
    ids = random_ids(1, 12)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.train()(ids).mtp_per_depth_logits is None
    loaded.save_pretrained(tmp_path / "b")
    again = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (again if kind == "text" else again["text_config"])["num_mtp_modules"] == 0
