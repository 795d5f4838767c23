"""What a forward call promises: outputs, losses, masks, media, gradients, and direct calls of the parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
from minim3.model.multimodal import MiniMaxM3VLModel
from tests.tiny_models import IMAGE, VIDEO, VOCABULARY, media_prompt, padded, random_ids, text_model, vl_model

Text, Whole = MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> Text:
    return text_model(num_mtp_modules=2)


@pytest.fixture(scope="module")
def whole() -> Whole:
    return vl_model(num_mtp_modules=1)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


# Rows, padding, positions


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right", "middle"]),
    extra=st.integers(0, 6),
    spelled=st.sampled_from(["attention_mask", "bool", "padding_mask", "both"]),
)
@torch.no_grad()
def test_alone_in_a_batch_or_padded_the_logits_are_equal(
    model: Text, lengths: list[int], side: str, extra: int, spelled: str
) -> None:
    rows = [random_ids(length, seed=length) for length in lengths]
    ids, mask = padded(rows, side, max(lengths) + extra)
    masks = {
        "attention_mask": {"attention_mask": mask}, "bool": {"attention_mask": mask.bool()},
        "padding_mask": {"padding_mask": mask == 0}, "both": {"attention_mask": mask, "padding_mask": mask == 0},
    }[spelled]  # fmt: skip
    output = model(ids, **masks, output_mtp_logits=True)
    assert not output.logits[mask == 0].any(), "logits at padding are zero"
    for row, tokens in enumerate(rows):
        alone = model(tokens[None], output_mtp_logits=True)
        places = mask[row].bool()
        close(output.logits[row, places], alone.logits[0])
        for got, expected in zip(output.mtp_per_depth_logits or (), alone.mtp_per_depth_logits or (), strict=True):
            close(got[row, places], expected[0])


@torch.no_grad()
def test_a_row_of_padding_alone_and_a_batch_of_nothing(model: Text) -> None:
    ids, mask = random_ids(2, 12), torch.ones(2, 12)
    mask[0] = 0
    output = model(ids, attention_mask=mask)
    assert not output.logits[0].any()
    close(output.logits[1], model(ids[1:]).logits[0])
    with pytest.raises(ValueError, match="hides them all"):
        model(ids, attention_mask=torch.zeros(2, 12))
    with pytest.raises(ValueError, match=r"no tokens: the input is \[2, 0\]"):
        model(ids[:, :0])


def test_holes_and_wrong_shapes_are_refused(model: Text, whole: Whole) -> None:
    ids, mask = random_ids(2, 12), torch.ones(2, 12)
    mask[1, 4:6] = 0
    for refused in (model, whole):
        with pytest.raises(ValueError, match="row 1 of the attention mask has a hole"):
            refused(ids, attention_mask=mask)
        with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 11\], the input is \[2, 12\]"):
            refused(ids, attention_mask=mask[:, 1:])
        with pytest.raises(ValueError, match=r"\[2, 1, 12, 12\]"):
            refused(ids, attention_mask=torch.ones(2, 1, 12, 12))
        with pytest.raises(ValueError, match=r"labels have the shape \[2, 11\]"):
            refused(ids, labels=ids[:, 1:])
        with pytest.raises(ValueError, match="input_ids"):
            refused(ids[0])
        with pytest.raises(ValueError, match="input_ids"):
            refused()
        with pytest.raises(ValueError, match="not both"):
            refused(ids, inputs_embeds=torch.zeros(2, 12, 32))


def test_the_cache_arguments_of_transformers_are_refused(model: Text, whole: Whole) -> None:
    ids = random_ids(1, 3)
    for refused in (model, whole):
        with pytest.raises(ValueError, match=r"model\.generate"):
            refused(ids, use_cache=True)
        with pytest.raises(ValueError, match="Engine"):
            refused(ids, past_key_values=())
        refused(ids, use_cache=False, past_key_values=None)


@torch.no_grad()
def test_position_ids(model: Text) -> None:
    """Default: 0, 1, ... from a row's first token. A common offset changes nothing, a stretch does; `[1, S]` serves all
    rows."""
    ids, mask = padded([random_ids(20), random_ids(13, seed=1)], "left", 24)
    expected = model(ids, attention_mask=mask).logits
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    close(model(ids, attention_mask=mask, position_ids=positions).logits, expected)
    close(model(ids, attention_mask=mask, position_ids=positions + 77).logits, expected, 1e-4)
    close(model(ids, attention_mask=mask, position_ids=torch.arange(24)[None]).logits, expected, 1e-4)
    stretched = model(ids, attention_mask=mask, position_ids=positions * 2).logits
    assert (stretched - expected).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"\[2, 24, \.\.\.\], got \[2, 23\]"):
        model(ids, attention_mask=mask, position_ids=positions[:, 1:])


# Outputs


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_is_next_token_cross_entropy_alone(model: Text, side: str) -> None:
    """Shifted once, within rows, over labels that are not -100; nothing of MTP or balance in it."""
    rows = [random_ids(17), random_ids(9, seed=1), random_ids(1, seed=2)]
    ids, mask = padded(rows, side, 20)
    labels = ids.clone()  # labels at padding are not -100: padding is known by the mask
    labels[0, 10:13] = -100
    output = model(ids, attention_mask=mask, labels=labels, output_mtp_logits=True, output_router_logits=True)
    parts = []
    for row in range(3):
        logits, wanted = output.logits[row, mask[row].bool()], labels[row, mask[row].bool()]
        parts.append(F.cross_entropy(logits[:-1], wanted[1:], ignore_index=-100, reduction="none")[wanted[1:] != -100])
    close(output.loss, torch.cat(parts).mean())
    assert len(torch.cat(parts)) == 16 + 8 - 3
    assert torch.isnan(model(ids, labels=torch.full_like(ids, -100)).loss), "as PyTorch's cross-entropy of nothing"
    close(model(ids, attention_mask=mask, labels=labels, logits_to_keep=1).loss, output.loss)


@torch.no_grad()
def test_logits_to_keep(model: Text) -> None:
    ids = random_ids(2, 15)
    logits = model(ids).logits
    close(model(ids, logits_to_keep=1).logits, logits[:, -1:])
    close(model(ids, logits_to_keep=4).logits, logits[:, -4:])
    close(model(ids, logits_to_keep=torch.tensor([0, 14, 3])).logits, logits[:, [0, 14, 3]])
    assert model(ids, logits_to_keep=0).logits.shape == (2, 15, VOCABULARY)


@torch.no_grad()
def test_hidden_states_and_router_logits(model: Text) -> None:
    ids, mask = padded([random_ids(11), random_ids(5, seed=1)], "left", 12)
    output = model(ids, attention_mask=mask, output_hidden_states=True, output_router_logits=True)
    assert len(output.hidden_states) == 4, "embeddings, after each layer but the last, after the final norm"
    assert all(state.shape == (2, 12, 32) for state in output.hidden_states)
    close(output.hidden_states[0], model.get_input_embeddings()(ids) * mask[..., None])
    close(model.lm_head(output.hidden_states[-1]), output.logits)
    close(model.model(ids, attention_mask=mask), output.hidden_states[-1])
    assert [tuple(logits.shape) for logits in output.router_logits] == [(24, 4), (24, 4)], "one a MoE layer"
    assert all(logits.dtype == torch.float32 for logits in output.router_logits)
    real = [logits[mask.flatten().bool()] for logits in output.router_logits]
    probabilities = torch.cat(real).softmax(-1)
    chosen = F.one_hot(probabilities.topk(2).indices, 4).sum(1).float()
    close(output.aux_loss, 4 * (chosen.mean(0) * probabilities.mean(0)).sum())
    plain = model(ids, attention_mask=mask)
    assert plain.hidden_states is plain.router_logits is plain.aux_loss is plain.loss is plain.indexer_kl is None


@pytest.mark.parametrize("side", ["left", None])
def test_gradients_reach_the_hidden_states(model: Text, side: str | None) -> None:
    """They were views beside the path to the logits: probes and saliency maps read no gradient."""
    ids, mask = padded([random_ids(11), random_ids(5, seed=1)], side, 12) if side else (random_ids(2, 12), None)
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    for state in output.hidden_states:
        state.retain_grad()
    output.logits.square().sum().backward()
    assert all(state.grad is not None and state.grad.abs().sum() > 0 for state in output.hidden_states)
    model.zero_grad()


@torch.no_grad()
def test_outputs_are_read_by_place_and_by_name(model: Text) -> None:
    ids = random_ids(2, 9)
    output = model(ids, labels=ids)
    assert output[0] is output.loss
    assert output[:2] == (output.loss, output.logits)
    assert output["logits"] is output.logits
    assert "loss" in output
    assert "hidden_states" not in output
    assert model(ids)[0].shape == (2, 9, VOCABULARY)
    with pytest.raises(KeyError, match="hidden_states"):
        output["hidden_states"]


@torch.no_grad()
def test_an_empty_batch_of_media_is_none(whole: Whole) -> None:
    ids = random_ids(2, 9)
    patch = media_prompt()["pixel_values"].shape[1]
    empty = {"pixel_values": torch.zeros(0, patch), "image_grid_thw": torch.zeros(0, 3, dtype=torch.int64)}
    close(whole(ids, **empty).logits, whole(ids).logits)
    assert whole.embed_multimodal(**empty) == []
    close(whole(ids, pixel_values=empty["pixel_values"], image_grid_thw=[]).logits, whole(ids).logits)
    for pixels, rows in ((media_prompt()["pixel_values"], []), (empty["pixel_values"], [[1, 2, 2]])):
        with pytest.raises(ValueError, match="patches"):
            whole(ids, pixel_values=pixels, image_grid_thw=torch.tensor(rows, dtype=torch.int64).view(-1, 3))
    prompt = media_prompt()
    grid = prompt["image_grid_thw"].tolist()
    found = whole.embed_multimodal(pixel_values=prompt["pixel_values"], image_grid_thw=grid)
    assert sum(len(one) for one in found) == prompt["pixel_values"].shape[0] // 4


@torch.no_grad()
def test_mtp_logits_in_training_mode_or_on_request(model: Text, whole: Whole) -> None:
    ids = random_ids(2, 20)
    assert model(ids).mtp_per_depth_logits is None
    asked = model(ids, output_mtp_logits=True)
    assert [logits.shape for logits in asked.mtp_per_depth_logits] == [(2, 20, VOCABULARY)] * 2
    depths = model.model.mtp_logits(model.model(ids), ids, model.lm_head)
    for got, expected in zip(asked.mtp_per_depth_logits, depths, strict=True):
        close(got, expected)
    model.train()
    whole.train()
    try:
        close(model(ids).mtp_per_depth_logits[1], asked.mtp_per_depth_logits[1])
        assert model(ids, output_mtp_logits=False).mtp_per_depth_logits is None
        assert len(whole(**media_prompt()).mtp_per_depth_logits) == 1
        embeds = model.get_input_embeddings()(ids)
        assert model(inputs_embeds=embeds).mtp_per_depth_logits is None
    finally:
        model.eval()
        whole.eval()
    with pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=embeds, output_mtp_logits=True)
    without = text_model()
    with pytest.raises(ValueError, match="no MTP modules"):
        without(ids, output_mtp_logits=True)
    with pytest.raises(ValueError, match="no MTP modules"):
        without.model.mtp_logits(without.model(ids), ids, without.lm_head)


@torch.no_grad()
def test_embeddings_in_the_place_of_ids(model: Text, whole: Whole) -> None:
    ids, mask = padded([random_ids(18), random_ids(7, seed=1)], "right", 18)
    for each in (model, whole):
        embeds = each.get_input_embeddings()(ids)
        close(each(inputs_embeds=embeds, attention_mask=mask).logits, each(ids, attention_mask=mask).logits)
    prompt = media_prompt()
    flat = whole.embed_packed(prompt["input_ids"][0], **{k: v for k, v in prompt.items() if k != "input_ids"})
    close(whole(inputs_embeds=flat[None]).logits, whole(**prompt).logits)
    with pytest.raises(ValueError, match="not inputs_embeds"):
        whole(inputs_embeds=flat[None], pixel_values=prompt["pixel_values"], image_grid_thw=prompt["image_grid_thw"])


# Media


@torch.no_grad()
def test_pictures_go_to_their_own_rows(whole: Whole) -> None:
    """Features are handed out in order of the rows, whatever the padding; each row as if alone."""
    first, second = media_prompt(0), media_prompt(1, tail=9)
    text = random_ids(15, seed=9)
    ids, mask = padded([first["input_ids"][0], text, second["input_ids"][0]], "left", 60)
    media = {name: torch.cat([first[name], second[name]]) for name in first if name != "input_ids"}
    output = whole(ids, attention_mask=mask, **media)
    close(output.logits[0, mask[0].bool()], whole(**first).logits[0])
    close(output.logits[1, mask[1].bool()], whole(text[None]).logits[0])
    close(output.logits[2, mask[2].bool()], whole(**second).logits[0])
    assert output.image_hidden_states.shape == (14, 32)
    assert output.video_hidden_states.shape == (24, 32)
    body = MiniMaxM3VLModel(whole.config).eval()
    body.load_state_dict({k.replace("language_model.model.", "language_model."): v
                          for k, v in whole.state_dict().items() if "lm_head" not in k})  # fmt: skip
    close(whole.lm_head(body(ids, attention_mask=mask, **media)), output.logits)


@torch.no_grad()
def test_a_clip_reaches_itself_and_later_tokens_only(whole: Whole) -> None:
    """Media tokens are causal like text."""
    prompt = media_prompt()
    swapped = prompt | {"pixel_values_videos": prompt["pixel_values_videos"].flip(0)}
    before = int((prompt["input_ids"][0] == VIDEO).nonzero()[0])
    changed = (whole(**prompt).logits - whole(**swapped).logits)[0].abs().amax(-1)
    assert changed[:before].max() < 1e-5
    assert changed[before:].min() > 1e-4


def test_counts_that_differ_name_both(whole: Whole) -> None:
    prompt = media_prompt()
    ids = prompt["input_ids"].clone()
    ids[0, int((ids[0] == IMAGE).nonzero()[0])] = 5
    with pytest.raises(ValueError, match=r"6 image placeholder tokens \(id 60\).* 7 features"):
        whole(**prompt | {"input_ids": ids})
    with pytest.raises(ValueError, match=r"12 video placeholder.* 8 features"):
        whole(**prompt | {"pixel_values_videos": prompt["pixel_values_videos"][:32],
                          "video_grid_thw": prompt["video_grid_thw"][:1]})  # fmt: skip
    with pytest.raises(ValueError, match=r"7 image placeholder.* 0 features"):
        whole(prompt["input_ids"])
    with pytest.raises(ValueError, match="patches tensor without grid"):
        whole(prompt["input_ids"], pixel_values=prompt["pixel_values"])
    with pytest.raises(ValueError, match="hold 28 patches, pixel values have 27"):
        whole(**prompt | {"pixel_values": prompt["pixel_values"][1:]})
    with pytest.raises(ValueError, match=r"\[patches, 24\]"):
        whole(**prompt | {"pixel_values": prompt["pixel_values"][:, 1:]})
    with pytest.raises(ValueError, match="cannot be cut into 2x2"):
        whole.get_image_features(torch.zeros(3, 24), [[1, 1, 3]])


@torch.no_grad()
def test_documents_may_share_a_picture(whole: Whole) -> None:
    """image_order says which grid row each use shows; the tower runs once a row."""
    prompt = media_prompt()
    ids = torch.cat([torch.full((6,), IMAGE), random_ids(3), torch.full((1,), IMAGE), torch.full((6,), IMAGE)])
    pixels, grid = prompt["pixel_values"], prompt["image_grid_thw"]
    shared = whole.embed_packed(ids, pixel_values=pixels, image_grid_thw=grid, image_order=torch.tensor([0, 1, 0]))
    repeated = whole.embed_packed(
        ids, pixel_values=torch.cat([pixels, pixels[:24]]), image_grid_thw=torch.cat([grid, grid[:1]])
    )
    close(shared, repeated)
    with pytest.raises(ValueError, match=r"13 image placeholder.* 12 features"):
        whole.embed_packed(ids, pixel_values=pixels, image_grid_thw=grid, image_order=torch.tensor([0, 0]))


# Gradients


def test_every_parameter_learns_and_the_indexer_from_its_own_loss_alone() -> None:
    """A part that is built, loaded and never trained would go unnoticed: vision tower, MTP, router, norms."""
    model = vl_model(num_mtp_modules=1).train()
    prompt = media_prompt()
    output = model(**prompt, labels=prompt["input_ids"], output_indexer_kl=True)
    assert len(output.indexer_kl) == 3, "two sparse layers and the block of the MTP module"
    drafts = F.cross_entropy(output.mtp_per_depth_logits[0][0, :-2], prompt["input_ids"][0, 2:])
    (output.loss + drafts).backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        if "indexer" in name:
            assert parameter.grad is None, f"{name}: the choice of blocks has no gradient"
        else:
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert parameter.grad.abs().max() > 0, f"{name} gets no gradient"
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "indexer" not in name}
    sum(output.indexer_kl).backward()
    for name, parameter in model.named_parameters():
        if "indexer" in name:
            assert parameter.grad is not None, f"{name} is not reached by the alignment loss"
            assert parameter.grad.abs().max() > 0, f"{name} is not reached by the alignment loss"
        else:
            assert torch.equal(parameter.grad, before[name]), f"{name} is moved by the alignment loss"


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_autocast_leaves_router_and_kernels_in_fp32(backend: str) -> None:
    """Autocast turned products inside the ops to bf16: the experts crashed, the router lost its small bits."""
    model, prompt = vl_model(backend=backend), media_prompt()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**prompt, labels=prompt["input_ids"], output_router_logits=True, output_indexer_kl=True)
        generated = model.generate(**prompt, max_new_tokens=3, eos_token_id=None)
    assert {logits.dtype for logits in output.router_logits} == {torch.float32}
    (output.loss + sum(output.indexer_kl)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert generated.shape[1] == prompt["input_ids"].shape[1] + 3
    assert abs(output.loss - model(**prompt, labels=prompt["input_ids"]).loss) < 0.1


def test_fp64_model_and_finite_differences() -> None:
    """fp32 inside means at least fp32: a model in fp64 has gradients that central differences confirm."""
    model = text_model().cast(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    ids = random_ids(1, 23)
    output = model(ids, labels=ids, output_indexer_kl=True)
    assert output.logits.dtype == output.loss.dtype == torch.float64
    (output.loss + sum(output.indexer_kl)).backward()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slope = (parameter.grad * direction).sum()
        values = []
        for step in (1e-6, -2e-6):
            parameter.data += step * direction
            with torch.no_grad():
                got = model(ids, labels=ids, output_indexer_kl=True)
            # The teacher of the alignment loss is detached, so only the indexer's own weights follow it.
            values.append(sum(got.indexer_kl) if "indexer" in name else got.loss)
        parameter.data += 1e-6 * direction
        difference = (values[0] - values[1]) / 2e-6
        assert abs(difference - slope) <= 1e-6 + 1e-4 * abs(slope), (name, difference, slope)


def test_an_id_outside_the_vocabulary_is_named() -> None:
    """Torch's own `index out of range in self` names neither the id nor the size."""
    for model in (text_model(), vl_model()):
        with pytest.raises(ValueError, match=f"hold {VOCABULARY}, the vocabulary has ids 0 to {VOCABULARY - 1}"):
            model(input_ids=torch.tensor([[1, VOCABULARY]]))
        with pytest.raises(ValueError, match="hold -1"):
            model(input_ids=torch.tensor([[-1]]))


def test_from_config_takes_a_dict_and_the_text_part_of_a_whole_config() -> None:
    """A raw dict or a whole config used to end in an AttributeError deep inside."""
    config = vl_model().config
    assert Whole.from_config(config.to_dict()).config.text_config == config.text_config
    assert Text.from_config(config).config == config.text_config
    with pytest.raises(ValueError, match="no vision part"):
        Whole.from_config(config.text_config)
