"""docs/api.md: every published name has a row, every row that is not "not yet" can be imported, arguments are taken."""

import inspect
import re
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import minim3
from tests.tiny_models import media_prompt, text_model, vl_model

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
ROWS = [
    [cell.strip() for cell in line.strip("|\n ").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not line.startswith(("| published name", "|---"))
]
NOT_YET = "not yet"
WHOLE, TEXT = "MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3SparseForCausalLM"
# What the three systems publish: Class.method, each with the arguments that mean something here.
MASKS = ["position_ids", "attention_mask", "padding_mask"]
PARTS = ["freqs_cis", "attention_mask", "padding_mask"]
MEDIA = ["pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"]
BUILT = ["config", "moe_config", "backend"]
PUBLISHED: dict[str, list[str]] = {
    "MiniMaxM3CausalLMOutput": ["logits", "mtp_per_depth_logits"],
    TEXT: BUILT, f"{TEXT}.from_config": BUILT, f"{TEXT}.forward": ["input_ids", *MASKS],
    f"{TEXT}.from_pretrained": ["path"], f"{TEXT}.initialize_weights": ["buffer_device", "dtype"],
    f"{TEXT}.get_input_embeddings": [], f"{TEXT}.set_input_embeddings": ["value"],
    f"{TEXT}.get_output_embeddings": [], f"{TEXT}.set_output_embeddings": ["value"],
    WHOLE: BUILT, f"{WHOLE}.from_config": BUILT, f"{WHOLE}.from_pretrained": ["path"],
    f"{WHOLE}.forward": [
        "input_ids", *MEDIA, *MASKS, "inputs_embeds", "past_key_values", "labels", "logits_to_keep",
        "output_router_logits", "output_hidden_states", "use_cache",
    ],
    f"{WHOLE}.initialize_weights": ["buffer_device", "dtype"],
    f"{WHOLE}.get_input_embeddings": [], f"{WHOLE}.set_input_embeddings": ["value"],
    f"{WHOLE}.get_output_embeddings": [], f"{WHOLE}.set_output_embeddings": ["value"],
    f"{WHOLE}.customize_pipeline_stage_modules": [], f"{WHOLE}.get_pipeline_stage_metas": [],
    "MiniMaxM3TextModel": ["config", "backend", "moe_config"],
    "MiniMaxM3TextModel.forward": ["input_ids", *MASKS, "inputs_embeds"],
    "MiniMaxM3TextModel.init_weights": ["buffer_device"], "MiniMaxM3TextModel.make_freqs_cis": ["position_ids"],
    "MiniMaxM3TextModel.mtp_logits": ["hidden_states", "input_ids", "lm_head", *MASKS],
    "build_moe_config": ["config", "dtype"], "ModelClass": BUILT,
    "Block": ["layer_idx", "config", "moe_config", "backend"], "Block.forward": ["x", *PARTS],
    "MiniMaxM3Attention": ["config", "backend", "is_sparse_attention_layer"],
    "MiniMaxM3Indexer": ["config", "sparse_cfg", "backend"],
    "MiniMaxM3Indexer.forward": ["x", "freqs_cis", "num_q_heads"],
    "build_block_sparse_attn_bias": [
        "idx_q", "idx_k", "block_size", "topk_blocks", "init_blocks", "local_blocks", "num_q_heads", "score_type",
    ],
    "_padding_mask_to_additive_bias": ["attention_mask", "ref"], "swiglu_oai": ["gate", "up", "alpha", "limit"],
    "MiniMaxM3MLP": ["config", "intermediate_size", "backend"],
    "MiniMaxM3RMSNorm": ["dim", "eps", "gemma"], "MiniMaxM3RMSNorm.reset_parameters": [],
    "MiniMaxM3MTPBlock": BUILT, "MiniMaxM3MTPBlock.forward": ["hidden_states", "embed_input", *PARTS],
    "MiniMaxM3MTP": [*BUILT, "num_modules"],
    "MiniMaxM3MTP.forward": ["hidden_states", "input_ids", "embed_fn", "lm_head", "freqs_cis"],
    "MiniMaxM3MTP.init_weights": [],
    "MiniMAXGemmaRMSNorm": ["hidden_size", "eps"], "MiniMAXGemmaRMSNorm.forward": ["x", "residual"],
    "MiniMaxM3MoE": ["config"], "MiniMaxM3SparseAttention": ["config"],
    f"{TEXT}.embed_input_ids": ["input_ids"], f"{TEXT}.compute_logits": ["hidden_states"],
    f"{TEXT}.get_expert_mapping": [], f"{TEXT}.load_weights": [],
    f"{WHOLE}.get_placeholder_str": ["modality", "i"], f"{WHOLE}.embed_multimodal": MEDIA,
    "_is_moe_layer": ["config", "layer_id"], "_sparse_attention_layer_ids": ["config"],
    "MiniMaxM3VLConfig": [
        "vision_config", "text_config", "image_token_index", "video_token_index", "projector_hidden_size",
        "tie_word_embeddings",
    ],
    "MiniMaxM3VLTextConfig": ["layer_types", "mlp_layer_types", "index_n_heads", "index_topk_blocks"],
    "MiniMaxM3VLVisionConfig": ["patch_size", "temporal_patch_size", "spatial_merge_size"],
    "MiniMaxM3VLProcessor": ["image_processor", "tokenizer", "video_processor", "chat_template"],
    "MiniMaxM3VLProcessor.__call__": ["images", "text", "videos", "return_tensors"],
    "MiniMaxM3VLProcessor.apply_chat_template": [
        "messages", "tokenize", "add_generation_prompt", "return_dict", "return_tensors",
    ],
    "MiniMaxM3VLProcessor.decode": [], "MiniMaxM3VLProcessor.batch_decode": [],
    "MiniMaxM3VLProcessor.post_process_image_text_to_text": [
        "generated_outputs", "skip_special_tokens", "clean_up_tokenization_spaces",
    ],
    "MiniMaxM3VLImageProcessor": ["min_pixels", "max_pixels"],
    "MiniMaxM3VLImageProcessor.preprocess": ["images"], "MiniMaxM3VLVideoProcessor": ["do_resize"],
    "MiniMaxM3VLVisionModel": ["config"], "MiniMaxM3VLVisionModel.forward": ["pixel_values", "image_grid_thw"],
    "MiniMaxM3VLTextModel": ["config"], "MiniMaxM3VLModel": ["config"],
    "MiniMaxM3VLModel.get_image_features": ["pixel_values", "image_grid_thw"],
    "MiniMaxM3VLModel.get_video_features": ["pixel_values_videos", "video_grid_thw"],
    "MiniMaxM3VLForCausalLM": ["config"], f"{WHOLE}.generate": ["input_ids"],
}  # fmt: skip
ELSEWHERE = {f"{TEXT}.get_expert_mapping", f"{TEXT}.load_weights"}  # rows that point to a function of another kind


def find(path: str) -> Any:
    """The object at a dotted path: the longest importable module, then attributes."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            module = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[count:], module)
    raise AssertionError(path)


def rows_of(name: str) -> list[list[str]]:
    return [row for row in ROWS if row[0] == f"`{name}`"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_every_name_of_the_table_can_be_imported(row: list[str]) -> None:
    published, system, here, differs = row
    assert published
    assert differs
    assert set(system.split(", ")) <= {"NeMo", "vLLM", "transformers"}
    if here == NOT_YET:
        return
    match = re.fullmatch(r"`([\w.]+)`", here)
    assert match, f"{here!r} is neither a path nor {NOT_YET!r}"
    assert find(match[1]) is not None
    name = re.fullmatch(r"`([\w.]+)`", published)
    if name and name[1] not in ELSEWHERE:
        assert match[1].endswith("." + name[1]), "the published name is the name"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_have_rows_and_take_their_arguments(name: str) -> None:
    rows = rows_of(name)
    assert rows, f"{name} has no row"
    for row in rows:
        if row[2] == NOT_YET or name in ELSEWHERE:
            continue
        parameters = inspect.signature(find(row[2].strip("`"))).parameters
        assert set(PUBLISHED[name]) <= set(parameters), f"{name} takes {list(parameters)}"


def test_published_positions() -> None:
    """Arguments that the three systems pass by place stand in that place."""
    for name, first in (
        ("MiniMaxM3Attention", ["config", "backend"]), ("Block", ["layer_idx", "config", "moe_config", "backend"]),
        ("MiniMaxM3Indexer", ["config", "sparse_cfg", "backend"]), ("MiniMaxM3TextModel", ["config", "backend"]),
        ("MiniMaxM3MLP", ["config", "intermediate_size", "backend"]),
        ("MiniMaxM3MTP", ["config", "moe_config", "backend", "num_modules"]), (TEXT, BUILT), (WHOLE, BUILT),
        ("MiniMaxM3RMSNorm", ["dim", "eps", "gemma"]), ("MiniMaxM3VLImageProcessor.preprocess", ["self", "images"]),
    ):  # fmt: skip
        assert list(inspect.signature(find(rows_of(name)[0][2].strip("`"))).parameters)[: len(first)] == first


def test_settings_of_the_image_processor() -> None:
    processor = minim3.MiniMaxM3VLImageProcessor(patch_size=16, temporal_patch_size=2, merge_size=2, max_pixels=100352)
    assert (processor.patch_size, processor.max_pixels) == (16, 100352)
    out = processor.preprocess(images=[torch.zeros(3, 64, 64, dtype=torch.uint8)], return_tensors="pt")
    assert out["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_attributes_that_the_table_promises() -> None:
    text, whole = text_model(num_mtp_modules=1), vl_model()
    block, sparse = text.model.layers[0], text.model.layers[1]
    instances = {
        TEXT: [text], WHOLE: [whole], "MiniMaxM3TextModel": [text.model], "Block": [block, sparse],
        "MiniMaxM3Attention": [block.self_attn, sparse.self_attn], "MiniMaxM3Indexer": [sparse.self_attn.indexer],
        "MiniMaxM3MLP": [block.mlp, sparse.shared_experts], "MiniMaxM3MTP": [text.model.mtp],
        "MiniMaxM3MTPBlock": [text.model.mtp.layers[0]], "MiniMaxM3MoE": [sparse.mlp],
    }  # fmt: skip
    promised = {row[0].strip("`"): row[3] for row in ROWS if row[3].startswith("attributes ")}
    assert promised.keys() == instances.keys()
    for name, words in promised.items():
        names = re.match(r"attributes ((?:`\w+`(?: \([\w ]+\))?(?:, )?)+)", words)
        assert names
        for attribute in re.findall(r"`(\w+)`", names[1]):
            assert all(hasattr(instance, attribute) for instance in instances[name]), f"{name}.{attribute}"


@torch.no_grad()
def test_embed_multimodal_gives_one_tensor_a_grid_row() -> None:
    model, prompt = vl_model(), media_prompt()
    media = {name: tensor for name, tensor in prompt.items() if name != "input_ids"}
    features = model.embed_multimodal(**media)
    assert [len(part) for part in features] == [6, 1, 8, 4]
    output = model(**prompt)
    assert torch.equal(torch.cat(features[:2]), output.image_hidden_states)
    assert torch.equal(torch.cat(features[2:]), output.video_hidden_states)
    assert model.embed_multimodal() == []
    assert type(model).get_placeholder_str("image", 0) == "]<]image[>["
    with pytest.raises(ValueError, match="'sound'"):
        model.get_placeholder_str("sound", 0)


def test_public_names_of_the_package() -> None:
    """`from minim3 import X` for every X it lists; a mistyped name is an AttributeError, not a silent None."""
    for name in minim3.__all__:
        assert getattr(minim3, name) is not None
        assert name in dir(minim3)
    for name, module in minim3._PUBLIC.items():
        assert getattr(minim3, name) is getattr(import_module(module), name)
    with pytest.raises(AttributeError, match="MiniMaxM4"):
        _ = minim3.MiniMaxM4
