"""attn_implementation="minim3" in transformers: its own "eager" is the oracle, and all else in it stays as it was.

transformers counts blocks from the start of the padded row, so where rows are padded on the left the oracle is each row
alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import transformers
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as theirs

from minim3.integrations import transformers as plugin
from tests.parity.oracle import random_config, random_inputs, random_model

GOLDEN = Path(__file__).parents[1] / "golden"
MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    plugin.register()
    yield
    plugin.register()


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(3)


def ids_of(*lengths: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=g) for length in lengths]


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def run(model: Any, implementation: str, **inputs: Any) -> Any:
    model.set_attn_implementation(implementation)
    return model(**inputs)


def tokens(model: Any, implementation: str, new: int = 12, **inputs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    return model.generate(**{**OPTIONS, "max_new_tokens": new, **inputs})


# The answers of eager


@torch.inference_mode()
def test_golden_tokens_of_a_loaded_checkpoint() -> None:
    """The path of a user: the Auto class, from_pretrained, one argument; tokens computed once with eager."""
    expected = load_file(GOLDEN / "vl_tiny_expected.safetensors")
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        GOLDEN / "vl_tiny", dtype=torch.float32, attn_implementation="minim3"
    )
    media = {name: expected[name] for name in MEDIA}
    torch.testing.assert_close(model(input_ids=expected["text_ids"]).logits, expected["text_logits"], atol=1e-4, rtol=0)
    logits = model(input_ids=expected["input_ids"], **media).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    new = expected["generated"].shape[1] - expected["input_ids"].shape[1]
    got = model.generate(input_ids=expected["input_ids"], **media, **OPTIONS, max_new_tokens=new)
    assert torch.equal(got, expected["generated"])


@pytest.mark.parametrize("seed", range(6))
@torch.inference_mode()
def test_logits_and_greedy_tokens_of_random_models(seed: int) -> None:
    """Pictures, a clip and text; every kind of cache and every way to cut a prompt gives eager's tokens."""
    model, inputs = random_model(seed), random_inputs(seed, 90 + 11 * seed)
    expected = run(model, "eager", **inputs).logits
    torch.testing.assert_close(run(model, "minim3", **inputs).logits, expected, atol=1e-4, rtol=1e-4)
    wanted = tokens(model, "eager", **inputs)
    assert torch.equal(tokens(model, "minim3", **inputs), wanted)
    for options in ({"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 4}):
        assert torch.equal(tokens(model, "minim3", **inputs, **options), wanted), options
    text = {"input_ids": ids_of(101, seed=seed)[0][None]}
    wanted = tokens(model, "eager", **text)
    for options in ({"prefill_chunk_size": 7}, {"prefill_chunk_size": 37}, {"use_cache": False}):
        assert torch.equal(tokens(model, "minim3", **text, **options), wanted), options


@torch.inference_mode()
def test_sampling_and_beams_are_those_of_eager(model: Any) -> None:
    """The same random stream over the same probabilities; beams reorder the cache, index keys included."""
    inputs = {"input_ids": torch.stack(ids_of(77, 77))}
    drawn = []
    for implementation in ("eager", "minim3"):
        torch.manual_seed(5)
        drawn.append(tokens(model, implementation, **inputs, do_sample=True, temperature=0.8, top_k=40, top_p=0.9))
    assert torch.equal(*drawn)
    beams = [tokens(model, implementation, **inputs, num_beams=3) for implementation in ("eager", "minim3")]
    assert torch.equal(*beams)


@torch.inference_mode()
def test_assisted_generation_is_that_of_eager(model: Any) -> None:
    """A drafting model proposes several tokens a step; what is rejected is cropped, index keys included."""
    draft = random_model(3)
    with torch.no_grad():
        draft.lm_head.weight.add_(
            torch.randn(draft.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)) / 50
        )
    inputs = {"input_ids": ids_of(81)[0][None]}
    wanted = tokens(model, "eager", **inputs)
    draft.set_attn_implementation("minim3")
    draft.generation_config.num_assistant_tokens = 4
    assert torch.equal(tokens(model, "minim3", **inputs, assistant_model=draft), wanted)


@torch.inference_mode()
def test_text_model_from_config() -> None:
    """AutoModelForCausalLM.from_config with the argument, and no vision tower in sight."""
    config = random_config(1).text_config
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="minim3").eval()
    assert model.config._attn_implementation == "minim3"
    inputs = {"input_ids": torch.stack(ids_of(60, 60))}
    got = model(**inputs).logits
    torch.testing.assert_close(got, run(model, "eager", **inputs).logits, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_bf16_is_as_near_to_fp32_as_eager_is() -> None:
    """At most twice eager's own error. There is one expert: a rounding that flips a route would drown the rest."""
    config = random_config(4)
    config.text_config.num_local_experts = config.text_config.num_experts_per_tok = 1
    torch.manual_seed(4)
    model = theirs.MiniMaxM3SparseForConditionalGeneration(config).float().eval()
    inputs = {"input_ids": torch.stack(ids_of(64, 64, seed=4))}
    # Within the budget, so that no rounded index score chooses another block.
    length = config.text_config.index_block_size * config.text_config.index_topk_blocks
    inputs["input_ids"] = inputs["input_ids"][:, :length]
    exact = run(model, "eager", **inputs).logits
    model.to(torch.bfloat16)
    error = {name: (run(model, name, **inputs).logits - exact).abs().max() for name in ("eager", "minim3")}
    assert error["minim3"] <= 2 * error["eager"]
    longer = torch.stack(ids_of(150, 150, seed=4))
    assert run(model, "minim3", input_ids=longer).logits.dtype == torch.bfloat16
    assert tokens(model, "minim3", input_ids=longer).shape == (2, 162)


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    """What a reader pastes runs, on the weights that ship."""
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.startswith("tensor([[")


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_padded_rows_are_those_rows_alone(model: Any, side: str) -> None:
    """Pitfall 8, padding shifts blocks: logits of both sides; zero length differences included."""
    rows = ids_of(61, 17, 90, 1)
    inputs = padded(rows, side)
    got = run(model, "minim3", **inputs).logits
    for i, row in enumerate(rows):
        alone = run(model, "eager", input_ids=row[None]).logits[0]
        real = got[i, -len(row) :] if side == "left" else got[i, : len(row)]
        torch.testing.assert_close(real, alone, atol=1e-4, rtol=1e-4)
    if side == "right":
        expected = run(model, "eager", **inputs).logits
        at = inputs["attention_mask"].bool()
        torch.testing.assert_close(got[at], expected[at], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.inference_mode()
def test_left_padded_rows_generate_as_alone(model: Any, cache: str) -> None:
    rows = ids_of(73, 12, 40)
    got = tokens(model, "minim3", **padded(rows, "left"), cache_implementation=cache)
    for i, row in enumerate(rows):
        assert torch.equal(got[i, 73:], tokens(model, "eager", input_ids=row[None])[0, len(row) :])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    left=st.lists(st.booleans(), min_size=4, max_size=4),
    cuts=st.lists(st.integers(1, 59), max_size=3),
    static=st.booleans(),
)
@torch.inference_mode()
def test_any_padding_and_any_cut_of_a_prompt(
    model: Any, lengths: list[int], left: list[bool], cuts: list[int], static: bool
) -> None:
    """Rows padded on either side, empty rows too, in pieces through either cache: every row as eager has it alone."""
    width = max(*lengths, 1)
    rows = ids_of(*lengths)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    places = []
    for i, row in enumerate(rows):
        places.append(slice(width - len(row), width) if left[i] else slice(0, len(row)))
        ids[i, places[i]], mask[i, places[i]] = row, 1
    config = model.config.text_config
    cache = transformers.StaticCache(config=config, max_cache_len=width + 5) if static else None
    cache = cache or transformers.DynamicCache(config=config)
    ends = sorted({cut for cut in cuts if cut < width} | {width})
    parts = []
    for start, end in zip([0, *ends], ends):
        piece = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        parts.append(run(model, "minim3", **piece, past_key_values=cache, use_cache=True).logits)
    got = torch.cat(parts, dim=1)
    assert got.isfinite().all()
    for i, row in enumerate(rows):
        if len(row):
            alone = run(model, "eager", input_ids=row[None]).logits[0]
            torch.testing.assert_close(got[i, places[i]], alone, atol=1e-4, rtol=1e-4)


# Training


def gradients(model: Any, implementation: str, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = run(model, implementation, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        # Where one expert is chosen its weight is constant: the router's gradient is rounding, of the order 1e-9.
        assert (got[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-8, name


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_are_those_of_eager(seed: int) -> None:
    """Every parameter, the vision tower included; the index projections get none on either side."""
    model, inputs = random_model(seed), random_inputs(seed, 100)
    labels = inputs["input_ids"].clone()
    expected, wanted = gradients(model, "eager", **inputs, labels=labels)
    loss, got = gradients(model, "minim3", **inputs, labels=labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert_equal_gradients(got, wanted)
    assert not any("indexer" in name for name in got)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # a later name of gradient_checkpointing_enable
def test_gradients_with_checkpointing_and_right_padding(reentrant: bool) -> None:
    """Pitfall 24, recomputation that picks other blocks: training mode, layers computed twice, rows of two lengths."""
    model = random_model(2).train()
    inputs = padded(ids_of(88, 51), "right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected, wanted = gradients(model, "eager", **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss, got = gradients(model, "minim3", **inputs)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert_equal_gradients(got, wanted)


# What is handed over


@torch.inference_mode()
def test_block_ids_from_elsewhere(model: Any) -> None:
    """Pitfall 5, [T, H, K] read as [H, T, K]: ids of transformers' own indexer, in its order, attend the same."""
    attention = next(m for m in model.modules() if isinstance(m, theirs.MiniMaxM3VLAttention) and m.indexer is not None)
    config = model.config.text_config
    hidden = torch.randn(2, 70, config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(70)[None]
    rotary = model.model.language_model.rotary_emb(hidden, positions)
    model.set_attn_implementation("eager")
    ids = attention.indexer(hidden, rotary, None, positions.expand(2, -1))
    expected, _ = attention(hidden, rotary, None, position_ids=positions)
    rows = plugin.make_token_rows(2, 70, 70, config=config)
    model.set_attn_implementation("minim3")
    attention.indexer.forward = lambda *args: ids
    try:
        got, _ = attention(hidden, rotary, rows, position_ids=positions)
    finally:
        del attention.indexer.forward
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    shifted = plugin.TokenRows([0, 3], [70, 70], 70, 70)
    with pytest.raises(ValueError, match="count from slot 0"):
        plugin.attention_forward(attention, *(torch.zeros(2, 8, 70, 16),) * 3, shifted, block_indices=ids)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@torch.inference_mode()
def test_nothing_of_size_s_by_s_exists() -> None:
    """The reason for it all: no mask, no scores and no bias whose size grows with the square of the prompt."""
    config = random_config(0).text_config
    config.index_block_size = 64
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    largest = {}
    for implementation, length in (("minim3", 3000), ("eager", 1000)):
        with Largest() as seen:
            run(model, implementation, input_ids=ids_of(length)[0][None], logits_to_keep=1)
        largest[implementation] = seen.elements / length**2
    assert largest["eager"] >= 1  # the counter counts
    assert largest["minim3"] < 0.3


# Leaving others alone


@torch.inference_mode()
def test_other_implementations_and_models_are_as_before(model: Any) -> None:
    """The indexer is replaced at the first forward with "minim3", for that alone, and can be put back."""
    plugin.unregister()
    plugin.register()
    untouched = theirs.MiniMaxM3VLIndexer.forward
    inputs = {"input_ids": torch.stack(ids_of(70, 70))}
    other = random_model(5)
    before = run(model, "eager", **inputs).logits, run(other, "sdpa", **inputs).logits
    assert theirs.MiniMaxM3VLIndexer.forward is untouched
    run(model, "minim3", **inputs)
    assert theirs.MiniMaxM3VLIndexer.forward is not untouched
    assert torch.equal(other(**inputs).logits, before[1])  # another model, while this one is set to "minim3"
    assert torch.equal(run(model, "eager", **inputs).logits, before[0])
    plugin.unregister()
    assert theirs.MiniMaxM3VLIndexer.forward is untouched
    with pytest.raises(ValueError, match="minim3"):
        model.set_attn_implementation("minim3")


def test_an_unknown_indexer_is_named(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """A later transformers may change the method that is replaced: say so instead of replacing something else."""
    plugin.unregister()
    plugin.register()
    monkeypatch.setattr(theirs.MiniMaxM3VLIndexer, "forward", lambda self, hidden_states, mask: None)
    with pytest.raises(ValueError, match=r"indexer that this version of minim3 does not know.*'mask'"):
        run(model, "minim3", input_ids=torch.stack(ids_of(9)))


# Errors


def with_hole() -> Tensor:
    mask = torch.ones(2, 40)
    mask[1, 5:9] = 0
    return mask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": with_hole()}, "row 1 has holes: 36 tokens between slots 0 and 40"),
        ({"attention_mask": torch.ones(2, 1, 40, 40, dtype=torch.bool)}, r"mask of shape \(2, 1, 40, 40\)"),
        ({"attention_mask": torch.ones(2, 30)}, r"shape \(2, 30\)"),
        ({"position_ids": torch.arange(40).remainder(25)[None]}, "from 24 to 0 at token 24"),
        ({"position_ids": torch.arange(40).remainder(25)[None], "use_cache": False}, "packed documents"),
        ({"cu_seq_lens_q": torch.tensor([0, 25, 40])}, "cu_seq_lens_q"),
    ],
)
@torch.inference_mode()
def test_what_the_kernels_would_ignore_is_refused(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, "minim3", input_ids=torch.stack(ids_of(40, 40)), **arguments)


def test_dropout_is_refused_in_training_alone() -> None:
    config = random_config(0).text_config
    config.attention_dropout = 0.25
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="minim3")
    ids = ids_of(20)[0][None]
    model.eval()(input_ids=ids)
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.25"):
        model.train()(input_ids=ids)


@torch.inference_mode()
def test_a_cache_without_index_keys_is_named(model: Any) -> None:
    cache = transformers.DynamicCache()
    with pytest.raises(ValueError, match="DynamicLayer, which keeps no index keys"):
        run(model, "minim3", input_ids=ids_of(20)[0][None], past_key_values=cache)


@torch.inference_mode()
def test_models_of_another_kind_are_refused() -> None:
    """The name is registered for all of transformers: nothing but MiniMax-M3 may run under it."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"input_ids": ids_of(9)[0][None]}
    picture = {"pixel_values": torch.randn(1, 3, 32, 32)}
    for config, inputs in (
        (transformers.LlamaConfig(**small, vocab_size=300), text),
        (transformers.ViTConfig(**small, image_size=32), picture),
    ):
        model = transformers.AutoModel.from_config(config, attn_implementation="minim3")
        with pytest.raises(ValueError, match="runs MiniMax-M3 models"):
            model(**inputs)
