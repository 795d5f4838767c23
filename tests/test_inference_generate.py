"""`generate` on small text models: answers depend on nothing but their own prompt, and arguments mean what they say."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minim3 import MiniMaxM3SparseForCausalLM, MiniMaxM3VLTextConfig
from minim3.inference.engine import Engine
from minim3.inference.generate import GenerateOutput, generate
from minim3.inference.request import SamplingParams
from minim3.processing.tokenizer import Tokenizer

CLOSE = 1e-4  # where the top two logits lie closer than this, either token is right
VOCABULARY = 61


def make_model(seed: int = 0, **changes: Any) -> MiniMaxM3SparseForCausalLM:
    """Two dense-attention and two sparse layers, blocks of 4, small budgets, weights large enough for clear answers."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8, "rope_theta": 1e4, "max_position_embeddings": 160,
        "intermediate_size": 24, "dense_intermediate_size": 48, "shared_intermediate_size": 24, "num_local_experts": 4,
        "num_experts_per_tok": 2, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4,
        "index_topk_blocks": 3, "initializer_range": 0.15, "eos_token_id": 2,
        "layer_types": ("full_attention", "minimax_m3_sparse", "full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": ("dense", "sparse", "sparse", "sparse"), **changes,
    }  # fmt: skip
    torch.manual_seed(seed)
    return MiniMaxM3SparseForCausalLM.from_config(MiniMaxM3VLTextConfig(**fields)).eval()


@pytest.fixture(scope="module")
def model() -> MiniMaxM3SparseForCausalLM:
    return make_model()


@torch.no_grad()
def tokens_without_cache(model: MiniMaxM3SparseForCausalLM, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by computing the whole sequence anew for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def count_close_calls(model: MiniMaxM3SparseForCausalLM, prompt: list[int], one: list[int], other: list[int]) -> int:
    """0 where both answers are equal; 1 where they part at two logits within 1e-4; an assertion fails otherwise."""
    assert len(one) == len(other)
    for place, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            logits = model(torch.tensor([prompt + one[:place]])).logits[0, -1]
            best = logits.topk(2).values
            assert {a, b} == set(logits.topk(2).indices.tolist()), (place, one, other)
            assert best[0] - best[1] < CLOSE, (place, one, other)
            return 1
    return 0


def pad(prompts: list[list[int]], side: str, width: int) -> tuple[Tensor, Tensor]:
    """`[B, width]` ids and mask; the padding is an ordinary id, so that only the mask tells."""
    ids = torch.full((len(prompts), width), 7)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        first = {"left": width - len(prompt), "right": 0, "middle": (width - len(prompt)) // 2}[side]
        ids[row, first : first + len(prompt)] = torch.tensor(prompt)
        mask[row, first : first + len(prompt)] = 1
    return ids, mask


# Independence


@settings(max_examples=12, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=45), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right", "middle"]),
    extra=st.integers(0, 9),
    chunk=st.sampled_from([None, 1, 3, 7, 50]),
    page_size=st.sampled_from([None, 1, 3, 8, 128]),
    shuffle=st.sampled_from([None, 0, 1]),
)
def test_same_answer_alone_or_in_a_batch_padded_or_not_chunked_or_whole(
    model: MiniMaxM3SparseForCausalLM,
    prompts: list[list[int]],
    side: str,
    extra: int,
    chunk: int | None,
    page_size: int | None,
    shuffle: int | None,
) -> None:
    """Pitfalls 6 and 8: blocks counted from the padded row, the chunk, or the physical page choose other keys."""
    ids, mask = pad(prompts, side, max(map(len, prompts)) + extra)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=9, eos_token_id=None,
        prefill_chunk=chunk, page_size=page_size, shuffle_pages_seed=shuffle,
    )  # fmt: skip
    assert out.shape == (len(prompts), ids.shape[1] + 9)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    close_calls = 0
    for row, prompt in enumerate(prompts):
        expected = tokens_without_cache(model, prompt, 9)
        close_calls += count_close_calls(model, prompt, expected, out[row, ids.shape[1] :].tolist())
    assert close_calls <= 1


@settings(max_examples=8, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=40), min_size=2, max_size=5),
    budget=st.integers(2, 60),
    seed=st.integers(0, 99),
)
def test_free_pages_full_of_nan_change_nothing(
    model: MiniMaxM3SparseForCausalLM, prompts: list[list[int]], budget: int, seed: int
) -> None:
    """Pitfall 17: what lies past the end of a sequence, in its last page or in pages of others, reaches no answer."""
    engine = Engine(model, max_tokens_per_step=budget, shuffle_seed=seed, poison=True, num_pages=40, max_running=3)
    requests = [engine.add_request(prompt, SamplingParams(max_new_tokens=6)) for prompt in prompts]
    engine.run()
    engine.check_integrity()
    assert engine.cache.pool.num_free_pages == 40
    close_calls = 0
    for prompt, request in zip(prompts, requests, strict=True):
        expected = tokens_without_cache(model, prompt, 6)
        close_calls += count_close_calls(model, prompt, expected, request.output_ids)
    assert close_calls <= 1


def test_dense_layers_honour_the_cached_prefix() -> None:
    """Pitfall 18: a full-attention layer that sees only its new tokens still gives a plausible answer."""
    model = make_model(seed=3, layer_types=("full_attention",) * 4)
    prompt = torch.randint(3, VOCABULARY, (1, 50), generator=torch.Generator().manual_seed(0))
    whole = model.generate(prompt, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, eos_token_id=None, prefill_chunk=7), whole)
    assert whole[0, 50:].tolist() == tokens_without_cache(model, prompt[0].tolist(), 8)
    changed = prompt.clone()
    changed[0, 3] = (changed[0, 3] + 1) % VOCABULARY
    logprobs = [
        model.generate(
            p, max_new_tokens=1, prefill_chunk=7, return_dict_in_generate=True, output_logprobs=True
        ).logprobs
        for p in (prompt, changed)
    ]  # fmt: skip
    assert not torch.equal(*logprobs), "a token of an earlier chunk was not seen"


def test_index_keys_are_stored_beside_their_keys(model: MiniMaxM3SparseForCausalLM) -> None:
    """Pitfall 3: after pages were freed and used again, every slot holds the index key of its new owner."""

    def cached(engine: Engine, ids: list[int]) -> list[tuple[Tensor, ...]]:
        request = engine.add_request(ids, SamplingParams(max_new_tokens=2))
        engine.step()
        slots = torch.tensor(engine.cache.slots(request, 0, len(ids)))
        page, offset = slots // engine.cache.page_size, slots % engine.cache.page_size
        found = []
        for layer in engine.cache.layers:
            stored = (layer.k[page, :, offset], layer.v[page, :, offset])
            found.append(stored if layer.index_k is None else (*stored, layer.index_k[page, offset]))
        engine.run()
        return found

    ids = list(range(3, 37))
    used = Engine(model, num_pages=12, shuffle_seed=2, poison=True)
    for other in ([5] * 40, [8, 9] * 12):
        cached(used, other)
    for fresh_layer, used_layer in zip(cached(Engine(model), ids), cached(used, ids), strict=True):
        for fresh, reused in zip(fresh_layer, used_layer, strict=True):
            torch.testing.assert_close(reused, fresh, rtol=0, atol=1e-5)


# What generate promises


def test_rows_that_end_early_are_filled(model: MiniMaxM3SparseForCausalLM) -> None:
    """New tokens start at column S in every row, and a finished row is filled with pad, else with eos."""
    prompts = [[3, 4, 5, 6], [10, 11]]
    ids, mask = pad(prompts, "left", 4)
    free = model.generate(ids, attention_mask=mask, max_new_tokens=12, eos_token_id=None)[:, 4:].tolist()
    stop = next(t for t in free[0] if t not in free[1])
    cut = free[0].index(stop) + 1
    for pad_id, fill in ((None, stop), (59, 59)):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=12, eos_token_id=stop, pad_token_id=pad_id)
        assert out[0, 4:].tolist() == free[0][:cut] + [fill] * (12 - cut)
        assert out[1, 4:].tolist() == free[1]
    several = model.generate(ids[:1], max_new_tokens=12, eos_token_id=[57, stop])
    assert several.shape == (1, 4 + cut), "a batch is as wide as its longest answer"
    full = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, eos_token_id=[stop], return_dict_in_generate=True,
        output_logprobs=2,
    )  # fmt: skip
    assert isinstance(full, GenerateOutput)
    assert full.finish_reasons == ("stop", "length")
    assert full.num_generated == (cut, 12)
    assert full.logprobs is not None
    assert full.token_logprobs is not None
    assert full.logprobs.shape == (2, 12)
    assert (full.logprobs[0, cut:] == 0).all()
    with torch.no_grad():
        expected = model(torch.tensor([prompts[1]])).logits[0, -1].log_softmax(-1)
    assert full.logprobs[1, 0] == pytest.approx(float(expected.max()), abs=1e-4)
    assert full.token_logprobs[1][0].top_logprobs == pytest.approx(expected.topk(2).values.tolist(), abs=1e-4)


def test_generation_config_is_honoured_and_arguments_win() -> None:
    model = make_model(seed=1)
    prompt = torch.tensor([[3, 4, 5]])
    free = model.generate(prompt, max_new_tokens=10, eos_token_id=None)
    assert free.shape == (1, 13)
    model.generation_config = {"eos_token_id": [int(free[0, 5])], "pad_token_id": 0, "max_new_tokens": 5}
    assert model.generate(prompt).shape[1] <= 6
    assert torch.equal(model.generate(prompt, eos_token_id=None), free[:, :8])
    model.generation_config = {"do_sample": True, "temperature": 4.0, "top_k": 30, "max_new_tokens": 10}
    sampled = model.generate(prompt, eos_token_id=None, seed=1)
    assert not torch.equal(sampled, free)
    assert torch.equal(sampled, model.generate(prompt, eos_token_id=None, seed=1))
    assert torch.equal(model.generate(prompt, eos_token_id=None, do_sample=False), free)
    assert torch.equal(model.generate(prompt, eos_token_id=None, top_k=1, seed=1), free)
    model.generation_config = None
    assert model.text_config.eos_token_id == 2  # the text config's, where there is no generation config
    with_eos = model.generate(prompt, max_new_tokens=60)
    assert 2 not in with_eos[0, 3:-1]


def test_sampled_rows_do_not_depend_on_their_batch(model: MiniMaxM3SparseForCausalLM) -> None:
    """Row i draws from stream seed + i, whatever the other rows do."""
    prompts = [[3, 4, 5], [8] * 20, [3, 4, 5]]
    ids, mask = pad(prompts, "left", 20)
    options: dict[str, Any] = {
        "do_sample": True, "temperature": 2.0, "top_k": 20, "top_p": 0.95, "max_new_tokens": 10, "eos_token_id": None
    }  # fmt: skip
    batch = model.generate(ids, attention_mask=mask, seed=40, **options)
    assert not torch.equal(batch[0], batch[2])
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), seed=40 + row, **options)
        assert torch.equal(alone[0, len(prompt) :], batch[row, 20:])
    several = model.generate(ids[:1], attention_mask=mask[:1], seed=[40, 42], num_return_sequences=2, **options)
    assert torch.equal(several, batch[[0, 2]])


def test_streamer_gets_the_prompt_then_each_token(model: MiniMaxM3SparseForCausalLM) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.values: list[list[int]] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.values.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended += 1

    streamer = Recorder()
    prompt = torch.tensor([[3, 4, 5]])
    out = model.generate(prompt, max_new_tokens=4, eos_token_id=None, streamer=streamer)
    assert streamer.values == [[3, 4, 5], *[[t] for t in out[0, 3:].tolist()]]
    assert streamer.ended == 1
    with pytest.raises(ValueError, match="one row, got 2"):
        model.generate(prompt.repeat(2, 1), streamer=streamer)


def test_generate_leaves_the_model_trainable() -> None:
    """Tables made in inference mode and kept in the model would break the next backward pass."""
    model = make_model(seed=2).train()
    prompt = torch.tensor([[3, 4, 5] * 9])
    out = model.generate(prompt, max_new_tokens=3, eos_token_id=None)
    assert model.training
    assert not out.is_inference()
    model(out, labels=out).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "index" not in name and "mtp" not in name)


def make_tokenizer() -> Tokenizer:
    """One letter an id (0 is `a`); ids 26 and 27 are the two bytes of `é`."""
    letters = {chr(ord("a") + i): i for i in range(26)} | {"Ã": 26, "©": 27}
    spec = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "truncation": None,
        "padding": None, "model": {"type": "BPE", "vocab": letters, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    }  # fmt: skip
    return Tokenizer(json.dumps(spec), eos_token_ids=())


def test_stop_strings_end_a_row() -> None:
    """A stop string has to be found where it begins in one token and ends in another; the tokens stay in the row."""
    model = make_model(seed=4, vocab_size=26)
    prompt = torch.tensor([[3, 4, 5], [9, 8, 7]])
    free = model.generate(prompt, max_new_tokens=12, eos_token_id=None, do_sample=True, seed=0, temperature=3.0)
    texts = ["".join(chr(ord("a") + i) for i in row[3:].tolist()) for row in free]
    stop = texts[0][4:7]
    assert stop not in texts[1]
    tokenizer = make_tokenizer()
    for stop_strings in (stop, ["zzzz", stop]):
        out = model.generate(
            prompt, max_new_tokens=12, eos_token_id=None, do_sample=True, seed=0, temperature=3.0,
            stop_strings=stop_strings, tokenizer=tokenizer, pad_token_id=0, return_dict_in_generate=True,
        )  # fmt: skip
        cut = texts[0].index(stop) + 3
        assert out.num_generated == (cut, 12)
        assert out.finish_reasons == ("stop", "length")
        assert torch.equal(out.sequences[0, : 3 + cut], free[0, : 3 + cut])
        assert torch.equal(out.sequences[1], free[1])


def test_repetition_penalty_ignores_padding(model: MiniMaxM3SparseForCausalLM) -> None:
    """Pad ids counted as seen tokens would change the answer of a padded row."""
    prompt = [3, 4, 5]
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": None, "repetition_penalty": 3.0}
    alone = model.generate(torch.tensor([prompt]), **options)
    ids, mask = pad([prompt], "right", 6)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options)[0, 6:], alone[0, 3:])
    assert len(set(alone[0].tolist())) == 11, "a penalty of 3 does not let these tokens repeat"


def test_bad_arguments_are_refused_by_name(model: MiniMaxM3SparseForCausalLM) -> None:
    prompt = torch.tensor([[3, 4, 5, 6]])
    for message, error, options in (
        (r"'temprature'.*'temperature'", TypeError, {"temprature": 1.0}),
        (r"use_cache is not an argument.*Engine", ValueError, {"use_cache": False}),
        (r"unknown argument 'num_beams'", TypeError, {"num_beams": 2}),
        (r"past_key_values is not an argument", ValueError, {"past_key_values": object()}),
        (r"top_p must lie in \(0, 1\], got 1.5", ValueError, {"do_sample": True, "top_p": 1.5}),
        (r"max_new_tokens must be at least 1, got 0", ValueError, {"max_new_tokens": 0}),
        (r"say the same", ValueError, {"max_new_tokens": 3, "max_length": 9}),
        (r"max_length \(4\) leaves no room after a prompt of 4", ValueError, {"max_length": 4}),
        (r"row 0 of attention_mask has a hole at column 1", ValueError,
         {"attention_mask": torch.tensor([[1, 0, 1, 1]])}),
        (r"row 0 of attention_mask hides every token", ValueError, {"attention_mask": torch.zeros(1, 4)}),
        (r"attention_mask \[1, 3\] .* \[1, 4\]", ValueError, {"attention_mask": torch.ones(1, 3)}),
        (r"stop_strings need tokenizer=processor.tokenizer, got NoneType", ValueError, {"stop_strings": "x"}),
        (r"return_dict_in_generate", ValueError, {"output_logprobs": True}),
        (r"2 greedy answers", ValueError, {"num_return_sequences": 2}),
        (r"2 seeds were given for 1 rows", ValueError, {"seed": [1, 2]}),
        (r"max_tokens_per_step must be at least 1", ValueError, {"prefill_chunk": 0}),
        (r"page_size must be at least 1", ValueError, {"page_size": 0}),
        (r"text-only", ValueError,
         {"pixel_values": torch.zeros(4, 1176), "image_grid_thw": torch.tensor([[1, 2, 2]])}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            model.generate(prompt, **options)
    said = {"use_cache": True, "num_beams": 1, "past_key_values": None, "position_ids": None}
    assert torch.equal(model.generate(prompt, max_new_tokens=3, **said), model.generate(prompt, max_new_tokens=3))
    for ids in (None, prompt[0], prompt[:, :0]):
        with pytest.raises(ValueError, match="input_ids must be"):
            generate(model, ids)
    with pytest.raises(ValueError, match="must hold integers"):
        model.generate(prompt.float())
    with pytest.raises(ValueError, match=r"161 tokens.* at most 160"):
        model.generate(torch.full((1, 161), 3))
    with pytest.warns(UserWarning, match="temperature without do_sample=True"):
        model.generate(prompt, temperature=0.5, max_new_tokens=1)


def test_max_length_counts_the_prompt_and_the_model_ends_at_its_last_position(
    model: MiniMaxM3SparseForCausalLM,
) -> None:
    prompt = torch.full((1, 150), 3)
    assert model.generate(prompt, max_length=155, eos_token_id=None).shape == (1, 155)
    out = model.generate(prompt, max_new_tokens=999, eos_token_id=None, return_dict_in_generate=True)
    assert out.sequences.shape == (1, 161)  # the 161st token is never fed
    assert out.finish_reasons == ("length",)
