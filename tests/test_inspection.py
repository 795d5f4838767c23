"""What an inspection reports is what the model did: blocks, scores, experts, weights, text, pictures, statistics."""

import base64
import io
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import minim3.inspection.recording as record_module
from minim3 import kernels
from minim3.inference.engine import Engine
from minim3.inference.request import SamplingParams
from minim3.inspection import Inspection, encode_answer, record, render_report, write_report
from minim3.inspection.report import content_hash
from minim3.inspection.statistics import expert_load, selection_statistics
from minim3.inspection.tokens import describe_tokens
from minim3.kernels import reference
from minim3.model.batch import ForwardBatch, ForwardRecord, LayerChoices
from minim3.processing.image import MiniMaxM3VLImageProcessor
from minim3.processing.processor import MiniMaxM3VLProcessor
from minim3.processing.tokenizer import Tokenizer
from minim3.processing.video import MiniMaxM3VLVideoProcessor
from tests.tiny_models import random_ids, text_model, vl_config, vl_model

PROMPT, ANSWER = 21, 9


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> MiniMaxM3VLProcessor:
    """A processor for text alone. The tiny models' vocabulary of 64 is the beginning of its own."""
    return MiniMaxM3VLProcessor(None, tokenizer)


def look(processor: MiniMaxM3VLProcessor, seed: int = 0, **changes: Any) -> tuple[Inspection, Any, Tensor]:
    """An inspection of random ids, the model, and the ids that were fed."""
    model = text_model(seed, **changes)
    ids = random_ids(PROMPT + ANSWER, seed=seed)
    found = record(model, processor, ids[:PROMPT].tolist(), answer_ids=ids[PROMPT:].tolist(), name="tiny")
    return found, model, ids[:-1]


def forward(model: Any, ids: Tensor, **lists: Any) -> tuple[Tensor, ForwardRecord]:
    kept = ForwardRecord(**lists)
    with torch.no_grad():
        hidden = model.text_model.forward_packed(model.embed_tokens_packed(ids), ForwardBatch.packed([len(ids)]), kept)
    return hidden, kept


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"index_topk_blocks": 3, "index_init_blocks": 1},
        {"index_topk_blocks": 3, "index_local_blocks": 2, "index_score_type": "lse"},
    ],
)
def test_blocks_and_experts_are_those_of_the_forward_pass(
    plain: MiniMaxM3VLProcessor, seed: int, changes: dict[str, Any]
) -> None:
    """An answer token that shows the row of its own position, or a layer that shows another's record."""
    found, model, ids = look(plain, seed, **changes)
    _, kept = forward(model, ids, block_indices=[], expert_ids=[], router_logits=[])
    assert kept.block_indices is not None
    assert kept.expert_ids is not None
    assert kept.router_logits is not None
    sparse = [layer for layer in found.layers if layer.attention == "sparse"]
    assert [layer.layer for layer in sparse] == [1, 2]
    for layer, blocks in zip(sparse, kept.block_indices, strict=True):
        assert layer.selected is not None
        rows = [[[b for b in head if b >= 0] for head in heads] for heads in blocks[PROMPT - 1 :].tolist()]
        assert [[list(head) for head in heads] for heads in layer.selected] == rows
        assert layer.chooses == (True,) * ANSWER
    moe = [layer for layer in found.layers if layer.mlp == "moe"]
    for layer, ids_TK, logits in zip(moe, kept.expert_ids, kept.router_logits, strict=True):
        assert layer.expert_ids is not None
        assert layer.expert_weights is not None
        _, weights = model.text_model.layers[layer.layer].mlp.route(logits, ids_TK)
        for position, (experts, shown) in enumerate(zip(layer.expert_ids, layer.expert_weights, strict=True)):
            known = dict(zip(ids_TK[position].tolist(), weights[position].tolist()))
            assert dict(zip(experts, shown)) == pytest.approx(known, abs=1e-4)
            assert list(shown) == sorted(shown, reverse=True)


@pytest.mark.parametrize("score_type", ["max", "lse"])
def test_scores_explain_the_selection_by_the_reference(plain: MiniMaxM3VLProcessor, score_type: str) -> None:
    """Scores of another head, layer, scale or position than the selection was made by."""
    found, model, ids = look(plain, 1, index_topk_blocks=3, index_score_type=score_type)
    states: list[Tensor] = []
    forward(model, ids, hidden_states=states)
    for layer in found.layers[1:]:
        assert layer.scores is not None
        assert layer.selected is not None
        block = model.text_model.layers[layer.layer]
        with torch.no_grad():
            freqs_cis = model.text_model.make_freqs_cis(torch.arange(len(ids)))
            normed = block.input_layernorm(states[layer.layer])
            index_q, index_k = block.self_attn.indexer.project(normed, freqs_cis)
        cu = [0, len(ids)]
        chosen = reference.select_blocks(
            index_q, index_k.squeeze(1), cu, cu, block_size=4, topk_blocks=3, score_type=score_type
        )
        for token in range(ANSWER):
            position = PROMPT - 1 + token
            for head in range(2):
                selected = [b for b in chosen[position, head].tolist() if b >= 0]
                assert list(layer.selected[token][head]) == selected
                scores = layer.scores[token][head]
                assert len(scores) == position // 4 + 1
                free = sorted(range(len(scores) - 1), key=lambda b: -scores[b])[:2]
                assert sorted([*free, len(scores) - 1]) == selected
                keys = index_k[: position + 1, 0] @ index_q[position, head] * 16**-0.5
                expected = [part.amax() if score_type == "max" else part.logsumexp(0) for part in keys.split(4)]
                assert scores == pytest.approx([float(one) for one in expected], abs=2e-4)


def test_a_forward_pass_that_follows_the_reported_choices_is_the_same(plain: MiniMaxM3VLProcessor) -> None:
    """Reporting choices that were recorded but not attended to."""
    found, model, ids = look(plain, 2)
    free, kept = forward(model, ids, choices={})
    assert kept.choices is not None

    def following(change: int) -> Tensor:
        choices = {}
        for layer in found.layers:
            assert kept.choices is not None
            known = kept.choices[layer.layer]
            blocks = known.block_indices
            if layer.selected is not None and blocks is not None:
                blocks = blocks.clone()
                blocks[PROMPT - 1 :] = -1
                for token, heads in enumerate(layer.selected):
                    for head, chosen in enumerate(heads):
                        blocks[PROMPT - 1 + token, head, : len(chosen)] = torch.tensor(chosen) - change
            choices[layer.layer] = LayerChoices(blocks, known.expert_ids)
        return forward(model, ids, choices=choices)[0]

    torch.testing.assert_close(following(0), free, rtol=0, atol=0)
    assert not torch.allclose(following(1), free)


def test_blocks_are_those_that_generation_itself_selected(
    plain: MiniMaxM3VLProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass over everything, reported, that differs from the chunks and single tokens that wrote the answer."""
    model, ids = text_model(4), random_ids(PROMPT, seed=4)
    steps: list[Tensor] = []  # of each layer and step: the blocks of its last query
    select = kernels.select_blocks_paged

    def watch(*arguments: Any, **options: Any) -> Tensor:
        blocks = select(*arguments, **options)
        steps.append(blocks[-1].clone())
        return blocks

    monkeypatch.setattr(kernels, "select_blocks_paged", watch)
    engine = Engine(model, page_size=4, max_tokens_per_step=8)
    monkeypatch.setattr(engine.runner, "decoding", None)  # whose selection has no function of its own to watch
    request = engine.add_request(ids.tolist(), SamplingParams(max_new_tokens=ANSWER, ignore_eos=True))
    engine.run()
    monkeypatch.undo()
    found = record(model, plain, ids.tolist(), answer_ids=request.output_ids)
    written = [steps[place : place + 2] for place in range(len(steps) - 2 * ANSWER, len(steps), 2)]
    for token, layers in enumerate(written):
        for layer, blocks in zip(found.layers[1:], layers, strict=True):
            assert layer.selected is not None
            selected = [tuple(b for b in head if b >= 0) for head in blocks.tolist()]
            assert list(layer.selected[token]) == selected, (token, layer.layer)


def test_an_answer_of_its_own_is_greedy_and_as_likely_as_the_logits_say(plain: MiniMaxM3VLProcessor) -> None:
    """An answer shown beside the choices of another one; probabilities off by one place."""
    model, ids = text_model(3), random_ids(PROMPT, seed=3)
    found = record(model, plain, ids.tolist(), max_new_tokens=7)
    answer = [token.id for token in found.tokens[PROMPT:]]
    with torch.no_grad():
        greedy = model.generate(ids[None], max_new_tokens=7, do_sample=False)[0, PROMPT:].tolist()
        assert answer == greedy[: len(answer)]
        fed = torch.tensor([*ids.tolist(), *answer])
        probabilities = model(fed[None]).logits[0].softmax(-1)
    assert [one.rank for one in found.written] == [1] * len(answer)
    for place, one in enumerate(found.written):
        assert one.probability == pytest.approx(float(probabilities[PROMPT - 1 + place, answer[place]]), abs=2e-5)
        assert [value for _, value in one.likeliest] == sorted((value for _, value in one.likeliest), reverse=True)
    limited = record(model, plain, ids.tolist(), max_new_tokens=100, max_tokens=PROMPT + 3)
    assert len(limited.tokens) == PROMPT + 3


def test_nothing_is_left_in_the_model(plain: MiniMaxM3VLProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks that stay behind, above all after a failure, would slow every later step down and hold on to memory."""
    _, model, _ = look(plain)
    hooks = [layer.self_attn._forward_pre_hooks for layer in model.text_model.layers]
    assert not any(hooks)

    def fail(*_: Any) -> Any:
        raise FloatingPointError("on purpose")

    monkeypatch.setattr(record_module, "_block_scores", fail)
    with pytest.raises(FloatingPointError):
        record(model, plain, [5, 6, 7], answer_ids=[8])
    assert not any(hooks)


def test_limits_are_errors_that_say_both_numbers(plain: MiniMaxM3VLProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that eats all memory, of a server above all."""
    model = text_model()
    with pytest.raises(ValueError, match=r"31 tokens.*at most 30"):
        record(model, plain, [5] * 30, answer_ids=[6], max_tokens=30)
    with pytest.raises(ValueError, match=r"31 tokens.*at most 30"):
        record(model, plain, [5] * 30, max_tokens=30)
    with pytest.raises(ValueError, match="the answer is empty"):
        record(model, plain, [5] * 30, answer_ids=[])
    with pytest.raises(ValueError, match="token id 64 of the answer"):
        record(model, plain, [5] * 30, answer_ids=[64])
    with pytest.raises(ValueError, match="layer 3 is asked for, the model has layers 0 to 2"):
        record(model, plain, [5], answer_ids=[6], layers=[3])
    one = record(model, plain, [5] * 30, answer_ids=[6], layers=[2])
    assert [layer.selected is not None for layer in one.layers] == [False, False, True]
    assert all(layer.selection is not None for layer in one.layers[1:])
    monkeypatch.setattr(record_module, "MAX_NUMBERS", 100)
    with pytest.raises(ValueError, match=r"2 layers of 31 tokens are .* at most 100"):
        record(model, plain, [5] * 30, answer_ids=[6], layers=[1, 2])


def test_a_model_without_sparse_layers_or_experts_can_be_looked_into(plain: MiniMaxM3VLProcessor) -> None:
    """A report that takes the released model's shape for granted."""
    found, _, _ = look(plain, layer_types=("full_attention",) * 3, mlp_layer_types=("dense",) * 3)
    assert (found.block_size, found.num_index_heads, found.num_experts) == (0, 0, 0)
    assert all(layer.selected is None and layer.expert_ids is None and layer.load is None for layer in found.layers)
    assert "minim3Inspect" in render_report(found)


# Text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 420), st.integers(0, 255)), max_size=40))
def test_texts_put_together_are_the_decoded_text(tokenizer: Tokenizer, token_ids: list[int]) -> None:
    """Characters of several tokens shown twice, or not at all."""
    tokens = describe_tokens(tokenizer, token_ids, {}, ())
    assert "".join(token.text for token in tokens) == tokenizer.decode(token_ids)
    assert all(a.stop == b.start for a, b in pairwise(tokens))
    assert all(token.stop - token.start == len(token.text) for token in tokens)


def test_the_character_belongs_to_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    euro = [tokenizer.token_to_id(character) for character in "âĤ¬"]  # the three bytes of €, as byte-level BPE has them
    assert None not in euro
    tokens = describe_tokens(tokenizer, [one for one in euro if one is not None], {}, ())
    assert [token.text for token in tokens] == ["", "", "€"]


def test_an_answer_known_as_a_message_gets_the_ids_it_was_written_with(plain: MiniMaxM3VLProcessor) -> None:
    """The page knows an answer as text: its ids must follow the prompt as generated ones do, reasoning included."""
    tokenizer = plain.tokenizer
    question = [{"role": "user", "content": "is there a red circle?"}]
    end = tokenizer.eos_token_id
    for mode, answer, start in (
        ("adaptive", {"content": "the answer"}, [tokenizer.token_to_id("</mm:think>")]),
        ("adaptive", {"content": "ai", "reasoning_content": "think"}, [tokenizer.token_to_id("<mm:think>")]),
        ("disabled", {"content": "the answer"}, []),
        ("enabled", {"content": "ai", "reasoning_content": "think"}, []),
    ):
        message = {"role": "assistant", **answer}
        ids = encode_answer(plain, question, message, thinking_mode=mode)
        assert ids[: len(start)] == start
        assert ids[-1] == end
        assert tokenizer.decode(ids[:-1]).endswith(answer["content"])
        cut = encode_answer(plain, question, message, thinking_mode=mode, finished=False)
        assert cut == ids[:-1]
    with pytest.raises(ValueError, match="in another thinking mode"):
        encode_answer(plain, question, {"role": "assistant", "content": "the answer"}, thinking_mode="enabled")


# Pictures and clips


@pytest.fixture(scope="module")
def seeing(tokenizer: Tokenizer) -> tuple[Any, MiniMaxM3VLProcessor]:
    """A model that sees, with a tokenizer whose placeholders are its own."""
    image, video = tokenizer.token_to_id("]<]image[>["), tokenizer.token_to_id("]<]video[>[")
    config = vl_config(vocab_size=450)
    assert config.vision_config is not None
    assert image is not None
    assert video is not None
    vision = replace(config.vision_config, patch_size=14)
    config = replace(config, image_token_index=image, video_token_index=video, vision_config=vision)
    model = type(vl_model())(config)
    processor = MiniMaxM3VLProcessor(MiniMaxM3VLImageProcessor(), tokenizer, MiniMaxM3VLVideoProcessor())
    return model.eval(), processor


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def decode_png(url: str) -> np.ndarray:
    header, _, data = url.partition(",")
    assert header in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def test_places_and_thumbnails_are_what_the_model_saw(seeing: tuple[Any, MiniMaxM3VLProcessor]) -> None:
    """Patches outlined in the wrong row, the second picture's on the first, or a picture that was never shown."""
    model, processor = seeing
    first, second, clip = picture(56, 112, 0), picture(84, 56, 1), [picture(56, 84, seed) for seed in range(2, 7)]
    parts: list[dict[str, Any]] = [{"type": "text", "text": "a"}, {"type": "image", "image": first}]
    parts += [{"type": "video", "video": clip}, {"type": "text", "text": "b"}, {"type": "image", "image": second}]
    messages = [{"role": "user", "content": parts}]
    found = record(model, processor, messages, answer_ids=[5, 6])
    shapes = [(item.kind, item.times, item.rows, item.columns, item.width, item.height) for item in found.media]
    assert shapes == [
        ("image", 1, 2, 4, 112, 56),
        ("image", 1, 3, 2, 56, 84),
        ("video", 3, 2, 3, 84, 56),
    ]
    assert (decode_png(found.media[0].thumbnails[0] or "") == first).all()
    assert (decode_png(found.media[1].thumbnails[0] or "") == second).all()
    for time, frame in enumerate((clip[0], clip[2], clip[4])):
        assert (decode_png(found.media[2].thumbnails[time] or "") == frame).all()
    order = [token.place for token in found.tokens if token.place is not None]
    expected = [(0, 0, r, c) for r in range(2) for c in range(4)]
    expected += [(2, t, r, c) for t in range(3) for r in range(2) for c in range(3)]
    expected += [(1, 0, r, c) for r in range(3) for c in range(2)]
    assert [(place.media, place.time, place.row, place.column) for place in order] == expected
    assert {token.kind for token in found.tokens if token.place} == {"image", "video"}


def test_long_clips_have_thumbnails_up_to_a_limit(
    seeing: tuple[Any, MiniMaxM3VLProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clip of 768 frames would make a report of many megabytes."""
    monkeypatch.setattr("minim3.inspection.tokens.MAX_THUMBNAILS", 3)
    clip = [picture(56, 56, seed) for seed in range(10)]  # chunks of 4 and 1 temporal patches
    messages = [{"role": "user", "content": [{"type": "video", "video": clip}]}]
    found = record(*seeing, messages, answer_ids=[5])
    assert [[url is not None for url in item.thumbnails] for item in found.media] == [[True] * 3 + [False], [False]]


# Statistics


def slow_statistics(blocks: Tensor, size: int, topk: int, init: int, local: int) -> dict[str, Any]:
    """The same figures by loops over sets."""
    rows = [[{b for b in head if b >= 0} for head in heads] for heads in blocks.tolist()]
    choosing = [p for p in range(len(rows)) if p // size + 1 > topk]
    counted = choosing or list(range(len(rows)))
    chosen = [(p, head) for p in counted for head in rows[p]]
    total = sum(len(head) for _, head in chosen)
    forced_first = sum(sum(b < init for b in head) for _, head in chosen)
    forced_last = sum(sum(b > p // size - local for b in head) for p, head in chosen)
    pairs = [(rows[p - 1][h], rows[p][h]) for p in counted[1:] for h in range(len(rows[0]))]
    heads = [(rows[p][a], rows[p][b]) for p in counted for a in range(len(rows[0])) for b in range(a)]
    windows = [counted[i : i + 8] for i in range(0, len(counted) - 7, 8)]
    unions = [len(set().union(*(rows[p][h] for p in window))) for window in windows for h in range(len(rows[0]))]
    return {
        "num_queries": len(rows) * len(rows[0]), "num_choosing": len(choosing) * len(rows[0]),
        "mean_selected": total / len(chosen), "share_init": forced_first / total, "share_local": forced_last / total,
        "new_blocks": sum(len(b - a) for a, b in pairs) / len(pairs) if pairs else 0.0,
        "distinct_of_8": sum(unions) / len(unions) if unions else None,
        "head_overlap": sum(len(a & b) / len(a | b) for a, b in heads) / len(heads) if heads else None,
        "by_distance": [sum(p // size - d in head for p, head in chosen) for d in range((len(rows) - 1) // size + 1)],
        "seen_at": [sum(p // size - d >= 0 for p, head in chosen) for d in range((len(rows) - 1) // size + 1)],
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 3), st.integers(0, 1), st.integers(1, 2), st.integers(0, 9))
def test_statistics_of_a_selection(num_tokens: int, num_heads: int, init: int, local: int, seed: int) -> None:
    """Shares over the wrong queries, distances off by a block."""
    generator = torch.Generator().manual_seed(seed)
    index_q, index_k = (torch.randn(num_tokens, *shape, generator=generator) for shape in ((num_heads, 4), (4,)))
    size, topk, cu = 3, 4, [0, num_tokens]
    blocks = reference.select_blocks(
        index_q, index_k, cu, cu, block_size=size, topk_blocks=topk, init_blocks=init, local_blocks=local
    )
    found = selection_statistics(blocks, size, topk, init, local)
    slow = slow_statistics(blocks, size, topk, init, local)
    by_distance, seen_at = slow.pop("by_distance"), slow.pop("seen_at")
    for name, value in slow.items():
        assert getattr(found, name) == (None if value is None else pytest.approx(value, abs=1e-3)), name
    edges = [(0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)]
    for counts, slow_counts in ((found.selected_at, by_distance), (found.available_at, seen_at)):
        assert list(counts) == [sum(slow_counts[a : b + 1]) for a, b in edges[: len(counts)]]
        assert sum(counts) == sum(slow_counts)


def test_expert_load_of_prompt_and_answer() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0]])
    load = expert_load(ids, 3, 4)
    assert (load.prompt, load.answer) == ((3, 2, 1, 0), (1, 0, 0, 1))
    assert load.balance == pytest.approx(2.0)
    share = np.array([4, 2, 1, 1]) / 8
    assert load.entropy == pytest.approx(float(-(share * np.log(share)).sum() / np.log(4)), abs=1e-4)
    assert expert_load(torch.tensor([[0, 1], [2, 3]]), 1, 4).balance == 1.0


# The report


def test_json_holds_everything_and_comes_back(plain: MiniMaxM3VLProcessor, tmp_path: Path) -> None:
    found, _, _ = look(plain)
    file = write_report(found, tmp_path / "report.json")
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data == json.loads(json.dumps(found.to_dict()))
    assert data["num_prompt_tokens"] == PROMPT
    assert len(data["layers"][1]["selected"]) == ANSWER
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(ValueError, match=r"FILE.html or FILE.json"):
        write_report(found, tmp_path / "report.pdf")


def test_a_report_loads_nothing_and_lets_no_text_out(plain: MiniMaxM3VLProcessor) -> None:
    """Model text or a title that ends the script element, and a page that calls home."""
    evil = "</script><script>alert(1)</script><!-- {{js}} {{data}} \"'&"
    ids = [int(i) for i in plain.tokenizer.encode("</script><img src=x onerror=alert(1)><!--{{css}}")]
    model = text_model(vocab_size=450)
    found = record(model, plain, ids, answer_ids=ids, name=evil)
    page = render_report(found, title=evil)
    assert page.count("</script>") == 2
    assert "alert(1)</script>" not in page
    assert "<img src=x" not in page
    assert "<!--" not in page.replace("<!doctype", "")
    data = re.search(r'<script type="application/json" id="inspection">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data.group(1))["model"] == evil
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy.group(1).startswith("default-src &#x27;none&#x27;")
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)[-1]
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)[-1]
    assert content_hash(script) in policy.group(1)
    assert content_hash(style) in policy.group(1)
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", page)
    assert not re.search(r"(?:https?:)?//[\w.-]+\.\w", outside), "an address in the report"
