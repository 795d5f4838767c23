"""Weights in fewer bits: how far codes lie from the weights, products against dequantized ones, loading, refusals."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import minim3
from minim3.checkpoint import dequantize_mxfp8, quantize_mxfp8
from minim3.cli import session
from minim3.cli.app import main
from minim3.inference.engine import Engine
from minim3.inference.request import SamplingParams
from minim3.kernels import native
from minim3.loading import stored_format
from minim3.model import quantized as quantized_modules
from minim3.model import weight_formats
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
from minim3.model.moe import MiniMaxM3Experts
from minim3.model.quantization import Quantization, expected_bytes, quantize_model, weight_bytes
from minim3.model.quantized import PackedMatrices, QuantizedExperts, QuantizedLinear, QuantizedModule
from minim3.model.weight_formats import (
    FORMATS,
    Int4Matrix,
    Int8Matrix,
    MXFP8Matrix,
    WeightMatrix,
    num_bytes,
    quantize,
)
from minim3.pocket import evaluate
from tests import tiny_models as tm

shapes = st.tuples(st.integers(1, 150), st.integers(1, 150))
formats = st.sampled_from(FORMATS)


def weights(shape: tuple[int, ...], seed: int, offset: float = 0.0) -> Tensor:
    """Rows and groups of very different sizes, a row and a run of columns of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) + offset
    weight *= torch.exp(3 * torch.randn(shape[0], 1, generator=generator))
    weight[shape[0] // 2] = 0
    weight[:, shape[1] // 3 : shape[1] // 2] = 0
    return weight


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


# Matrices


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 2**31), st.sampled_from([0.0, 1.0]))
def test_int8_is_within_half_a_step_of_every_weight(shape: tuple[int, int], seed: int, offset: float) -> None:
    """A scale rounded after the codes were chosen, or taken over the wrong axis, is further off."""
    weight = weights(shape, seed, offset)
    matrix = Int8Matrix.quantize(weight)
    step = matrix.scales.float().unsqueeze(1)
    assert bool(
        (step <= weight.abs().amax(1, keepdim=True) / 127 * 1.01 + (weight.abs().amax(1, keepdim=True) == 0)).all()
    )
    assert bool(((matrix.dequantize() - weight).abs() <= 0.5001 * step).all())


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from(weight_formats.GROUP_SIZES), st.integers(0, 2**31), st.sampled_from([0.0, 1.0]))
def test_int4_is_within_half_a_step_in_every_group(
    shape: tuple[int, int], group_size: int, seed: int, offset: float
) -> None:
    """Groups that straddle rows, a last group that its padding widens, scale and zero in each other's place."""
    weight = weights(shape, seed, offset)
    got = Int4Matrix.quantize(weight, group_size).dequantize()
    assert got.shape == weight.shape
    for start in range(0, shape[1], group_size):
        group = weight[:, start : start + group_size]
        # Where the group is filled up with zeros, they are in its range.
        filled = group if group.shape[1] == group_size else torch.nn.functional.pad(group, (0, 1))
        low, high = filled.aminmax(dim=1, keepdim=True)
        step = (high - low) / 15
        # bf16 scale and zero: 2**-9 of the zero, and of the eight steps to either end.
        bound = 0.502 * step + 2**-8 * (filled.abs().amax(1, keepdim=True) + 8 * step)
        assert bool(((got[:, start : start + group_size] - group).abs() <= bound + 1e-30).all())


@given(shapes, st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_mxfp8_holds_the_very_values_of_the_format(shape: tuple[int, int], seed: int) -> None:
    """A table of values or powers that is off in one place: held and read must be the same numbers."""
    weight = weights(shape, seed)
    codes, scales = quantize_mxfp8(weight)
    want = dequantize_mxfp8(codes, scales)
    assert torch.equal(MXFP8Matrix.quantize(weight).dequantize(), want)
    assert torch.equal(MXFP8Matrix.of_stored(codes, scales.view(torch.float8_e8m0fnu)).dequantize(), want)


def test_mxfp8_knows_every_code_and_scale() -> None:
    """All 256 codes (NaN among them) with all 255 scales, subnormal ends included."""
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).repeat(255, 1)
    scales = torch.arange(255).to(torch.uint8).unsqueeze(1).repeat(1, 8)
    got = MXFP8Matrix.of_stored(codes, scales).dequantize()
    torch.testing.assert_close(got, dequantize_mxfp8(codes, scales), rtol=0, atol=0, equal_nan=True)
    scales[3, 1] = 255
    with pytest.raises(ValueError, match=r"scale at \[3, 1\] is 255"):
        MXFP8Matrix.of_stored(codes, scales)


@settings(max_examples=60, deadline=None)
@given(shapes, formats, st.sampled_from([1, 2, 3, 16, 17, 64, 65, 90]), st.integers(0, 2**31))
def test_products_are_those_of_the_dequantized_weights(
    shape: tuple[int, int], format: str, rows: int, seed: int
) -> None:
    """Packed products read past rows that are not padded; tiles could lie in another order than the packed codes."""
    matrix = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), format)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(seed + 1))
    got = matrix.product(matrix.prepare(x))
    assert got.shape == (rows, shape[0])
    wide = matrix.dequantize()
    if format == "mxfp8":
        assert error(got, x @ wide.t()) < 1e-5
    else:  # x and the result are bf16, and so is a dequantized tile of 4-bit weights
        want = x.bfloat16().double() @ wide.double().t()
        scale = x.abs().double() @ wide.abs().double().t()
        assert bool(((got.double() - want).abs() <= 2**-7 * scale + 1e-6).all())


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_many_tiles_make_the_same_product(monkeypatch: pytest.MonkeyPatch, format: str, bf16: bool) -> None:
    """Tiles at the wrong rows, and the last, short one; on processors with bf16 arithmetic and without."""
    monkeypatch.setattr(weight_formats, "_TILE_ELEMENTS", 64 * 96)
    monkeypatch.setattr(weight_formats, "_CHUNK_ELEMENTS", 64 * 96)
    monkeypatch.setattr(weight_formats, "_has_bf16_arithmetic", lambda: bf16)
    weight = torch.randn(200, 96)
    matrix, x = quantize(weight, format), torch.randn(70, 96)
    assert error(matrix.dequantize(), weight) < 0.2
    assert error(matrix.product(matrix.prepare(x)).float(), x @ matrix.dequantize().t()) < 1e-2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 140), min_size=1, max_size=4), st.integers(1, 100), formats, st.integers(0, 2**31))
def test_joined_rows_are_the_rows_that_were_joined(sizes: list[int], columns: int, format: str, seed: int) -> None:
    """Padding between the parts of a joint matrix must not show, nor may a view read another part's scales."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Any] = [quantize(torch.randn(n, columns, generator=generator), format) for n in sizes]
    joint, views = type(parts[0]).join(parts)
    assert torch.equal(joint.dequantize(), torch.cat([part.dequantize() for part in parts]))
    x = joint.prepare(torch.randn(3, columns, generator=generator))
    assert joint.product(x).shape == (3, sum(sizes))
    for part, view in zip(parts, views, strict=True):
        assert torch.equal(view.product(x), part.product(x))
    assert joint.num_bytes() == sum(part.num_bytes() for part in parts)


@settings(max_examples=25, deadline=None)
@given(shapes, formats, st.sampled_from(weight_formats.GROUP_SIZES))
def test_the_size_that_is_announced_is_the_size_that_is_taken(
    shape: tuple[int, int], format: str, group_size: int
) -> None:
    """`minim3 info` speaks of memory before anything is loaded."""
    assert quantize(torch.randn(shape), format, group_size).num_bytes() == num_bytes(format, *shape, group_size)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(format: str, value: float) -> None:
    """A NaN becomes some code, and nobody ever learns of it."""
    weight = torch.ones(3, 5)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="NaN"):
        quantize(weight, format)


# Modules


def experts_of(format: str, dtype: torch.dtype = torch.float32) -> tuple[QuantizedExperts, MiniMaxM3Experts]:
    """Quantized experts, and plain ones with the weights that those dequantize to."""
    model = tm.text_model(num_local_experts=6, num_experts_per_tok=3, intermediate_size=40).to(dtype)
    plain = copy.deepcopy(model.text_model.layers[1].get_submodule("block_sparse_moe.experts"))
    quantize_model(model, Quantization(format))
    quantized = model.text_model.layers[1].get_submodule("block_sparse_moe.experts")
    assert isinstance(quantized, QuantizedExperts)
    assert isinstance(plain, MiniMaxM3Experts)
    with torch.no_grad():
        for stack, parameter in ((quantized.w13, plain.w13), (quantized.w2, plain.w2)):
            for expert in range(6):
                parameter[expert] = stack[expert].dequantize()
    return quantized, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 5, 150, 400])
@pytest.mark.parametrize("format", FORMATS)
def test_quantized_experts_compute_what_plain_ones_do(format: str, tokens: int, dtype: torch.dtype) -> None:
    """Weights at the wrong expert, rows at the wrong token, w1 and w3 in each other's place."""
    quantized, plain = experts_of(format, dtype)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 32, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(tokens)])  # the last expert is idle
    share = torch.rand(tokens, 3, generator=generator)
    with torch.no_grad():
        got, want = quantized(x, ids, share), plain(x, ids, share)
    assert got.dtype == dtype
    assert error(got.float(), want.float()) < (1e-5 if format == "mxfp8" and dtype == torch.float32 else 2e-2)


def test_idle_experts_do_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token must not read the weights of all experts."""
    quantized, _ = experts_of("int8")
    used: list[int] = []
    product = quantized_modules._product
    monkeypatch.setattr(quantized_modules, "_product", lambda m, *args: used.append(id(m)) or product(m, *args))
    with torch.no_grad():
        quantized(torch.randn(4, 32), torch.tensor([[1, 4, 2]] * 4), torch.ones(4, 3))
    assert set(used) == {id(stack[expert]) for stack in (quantized.w13, quantized.w2) for expert in (1, 2, 4)}
    assert len(used) == 6


@pytest.mark.parametrize("format", FORMATS)
def test_packed_projections_give_what_they_give_alone(format: str) -> None:
    """One product for q, k, index q, index k and v, though the indexer is held in another format or none."""
    model = tm.text_model(head_dim=16, num_attention_heads=5, num_key_value_heads=1, index_n_heads=1)
    quantize_model(model, format)
    ids = tm.random_ids(1, 30)
    with torch.no_grad():
        alone = model(ids).logits
        model.pack_for_inference()
        packed = model.text_model.layers[1].self_attn._packed
        assert packed is not None
        assert isinstance(packed.linears, PackedMatrices)
        assert packed.is_current(model.text_model.layers[1].self_attn)
        assert error(model(ids).logits, alone) < 1e-5
        before = packed.linears
        model.pack_for_inference()  # as every engine does: nothing is joined again
        again = model.text_model.layers[1].self_attn._packed
        assert again is not None
        assert again.linears is before


def test_a_replaced_projection_ends_its_packing() -> None:
    """A projection put in after packing would be passed over."""
    model = tm.text_model()
    quantize_model(model, "int8")
    model.pack_for_inference()
    mlp = model.text_model.layers[0].get_submodule("mlp")
    ids = tm.random_ids(1, 9)
    with torch.no_grad():
        before = model(ids).logits
        mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
        assert error(model(ids).logits, before) > 1e-3


# Whole models


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A vision-language checkpoint with a MTP module, by format."""
    folder = tmp_path_factory.mktemp("stored")
    model = tm.vl_model(num_mtp_modules=1)
    for format in ("fp32", "bf16", "mxfp8"):
        model.save_pretrained(folder / format, format=format)
    return lambda format: folder / format


def load(path: Path, quantization: Any = None, **options: Any) -> MiniMaxM3SparseForConditionalGeneration:
    options = {"dtype": torch.float32, **options}
    return MiniMaxM3SparseForConditionalGeneration.from_pretrained(path, quantization=quantization, **options)


def greedy(model: Any, ids: Tensor, new_tokens: int = 12) -> list[int]:
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)[
        0, ids.shape[1] :
    ].tolist()


@torch.no_grad()
def test_mxfp8_kept_is_mxfp8_dequantized_on_load(stored: Callable[[str], Path]) -> None:
    """The bits of the checkpoint, not a second quantization of them: equal weights, logits and tokens."""
    kept, dequantized = load(stored("mxfp8"), "mxfp8"), load(stored("mxfp8"))
    wanted = dict(dequantized.named_parameters())
    num_kept = 0
    for name, module in kept.named_modules():
        if isinstance(module, QuantizedLinear):
            assert module.matrix is not None
            assert torch.equal(module.matrix.dequantize(), wanted.pop(f"{name}.weight"))
            num_kept += 1
        elif isinstance(module, QuantizedExperts):
            for stack_name, stack in (("w13", module.w13), ("w2", module.w2)):
                dense = wanted.pop(f"{name}.{stack_name}")
                assert all(torch.equal(stack[expert].dequantize(), dense[expert]) for expert in range(len(dense)))
            num_kept += 2
    assert num_kept == 4 * 4 + 3 + 3 * (3 + 2)  # attention of 4 layers, a dense MLP, 3 MoE layers (one of them MTP's)
    for name, parameter in kept.named_parameters():
        assert torch.equal(parameter, wanted.pop(name))
    assert not wanted
    prompt = tm.media_prompt()
    assert error(kept(**prompt).logits, dequantized(**prompt).logits) < 1e-5
    ids = tm.random_ids(1, 30)
    assert greedy(kept, ids) == greedy(dequantized, ids)


@torch.no_grad()
@pytest.mark.parametrize("source", ["fp32", "mxfp8"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_quantized_model_computes_with_its_dequantized_weights(
    stored: Callable[[str], Path], format: str, source: str
) -> None:
    """Every weight in its place, from either kind of checkpoint: the same model with those weights in fp32."""
    quantized = load(stored(source), format)
    plain = load(stored(source))
    parameters = dict(plain.named_parameters())
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            assert module.matrix is not None
            parameters[f"{name}.weight"].copy_(module.matrix.dequantize())
        elif isinstance(module, QuantizedExperts):
            for stack_name, stack in (("w13", module.w13), ("w2", module.w2)):
                for expert in range(stack.shape[0]):
                    parameters[f"{name}.{stack_name}"][expert] = stack[expert].dequantize()
    # Short enough that every block is chosen: a choice turned by a rounding error is another answer, not a near one.
    ids = tm.random_ids(2, 8)
    got, want = quantized(ids, output_mtp_logits=True), plain(ids, output_mtp_logits=True)
    assert got.mtp_per_depth_logits is not None
    assert want.mtp_per_depth_logits is not None
    bound = 1e-5 if format == "mxfp8" else 0.1  # bf16 products, three layers deep, routing included
    assert float((got.logits - want.logits).norm() / want.logits.norm()) < bound
    for mine, theirs in zip(got.mtp_per_depth_logits, want.mtp_per_depth_logits, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < bound


@pytest.mark.parametrize("format", FORMATS)
def test_loading_quantized_and_quantizing_what_was_loaded_agree(stored: Callable[[str], Path], format: str) -> None:
    """Pieces of experts come one at a time: their halves must not meet another expert's."""
    streamed, converted = load(stored("fp32"), format), load(stored("fp32"))
    quantize_model(converted, format)
    with torch.no_grad():
        prompt = tm.media_prompt()
        assert torch.equal(streamed(**prompt).logits, converted(**prompt).logits)
    assert weight_bytes(streamed) == weight_bytes(converted)


@pytest.mark.parametrize("format", FORMATS)
def test_one_token_after_another_is_the_prompt_at_once(format: str) -> None:
    """Few rows and many take different products: in the engine a request may meet either."""
    model = tm.text_model(index_topk_blocks=32)  # all blocks: a choice that rounding turns is another answer
    quantize_model(model, format)
    found = []
    for per_step in (7, 200):
        engine = Engine(model, max_tokens_per_step=per_step)
        params = SamplingParams(max_new_tokens=1, logprobs=tm.VOCABULARY, ignore_eos=True)
        request = engine.add_request(tm.random_ids(1, 100)[0].tolist(), params)
        engine.run()
        found.append(dict(zip(request.logprobs[0].top_token_ids, request.logprobs[0].top_logprobs, strict=True)))
    few, many = (torch.tensor([logprobs[token] for token in range(tm.VOCABULARY)]) for logprobs in found)
    assert float((few - many).norm() / few.norm()) < (1e-5 if format == "mxfp8" else 0.05)


def test_what_stays_as_it_is(stored: Callable[[str], Path]) -> None:
    """The router decides with small differences, norms are small, pictures are looked at once."""
    models = [load(stored("fp32"), format) for format in FORMATS]
    for model in models:
        assert not any(isinstance(m, QuantizedModule) for m in model.vision_tower.modules())
        assert model.text_model.layers[1].get_parameter("block_sparse_moe.gate.weight").dtype == torch.float32
        assert not any(parameter.requires_grad for parameter in model.parameters())
    formats = [
        [str(getattr(model.get_submodule(f"language_model.{name}"), "format", None)) for model in models]
        for name in ("lm_head", "model.layers.1.self_attn.indexer.index_q_proj", "model.layers.1.self_attn.v_proj",
                     "model.mtp.layers.0.eh_proj", "model.layers.1.block_sparse_moe.experts")
    ]  # fmt: skip
    assert formats == [
        ["bf16", "int8", "int8", "None"], ["bf16", "int8", "int8", "None"], ["bf16", "int8", "int4", "mxfp8"],
        ["bf16", "int8", "int4", "None"], ["bf16", "int8", "int4", "mxfp8"],
    ]  # fmt: skip
    whole = load(stored("fp32"), Quantization("int4", group_size=64, head=False))
    assert isinstance(whole.lm_head, torch.nn.Linear)
    assert whole.text_model.layers[0].self_attn.v_proj.matrix.group_size == 64  # type: ignore[union-attr]


@pytest.mark.parametrize("source", ["bf16", "mxfp8"])
def test_what_a_checkpoint_stores_loses_nothing(stored: Callable[[str], Path], source: str) -> None:
    """Held as they are stored, in half or a quarter of the bytes, weights give the logits of fp32."""
    exact, held = load(stored(source), None), load(stored(source), source)
    ids = torch.arange(40).unsqueeze(0) % 50 + 3
    with torch.inference_mode():
        want, got = exact(input_ids=ids).logits, held(input_ids=ids).logits
    assert error(got, want) < 1e-5
    taken = sum(weight_bytes(held).values()) / sum(weight_bytes(exact).values())
    assert taken < 0.8  # the vision part and the embedding stay as they are


def test_auto_holds_weights_as_they_are_stored(stored: Callable[[str], Path], tmp_path: Path) -> None:
    """Where that loses something (fp32 among them, another dtype) or is slower (no kernels in C), it must not."""
    cpu, fp32 = torch.device("cpu"), torch.float32
    in_c = native.why_not() is None
    for source, format in (("bf16", "bf16"), ("mxfp8", "mxfp8"), ("fp32", None)):
        assert stored_format(stored(source), cpu, fp32) == (format if in_c else None)
    assert stored_format(stored("bf16"), cpu, torch.bfloat16) is None
    assert stored_format(stored("bf16"), torch.device("cuda"), fp32) is None
    mixed = tmp_path / "mixed"
    shutil.copytree(stored("bf16"), mixed)
    tensors = load_file(mixed / "model.safetensors")
    name = next(key for key in tensors if key.endswith("index_q_proj.weight"))
    save_file(tensors | {name: tensors[name].float()}, mixed / "model.safetensors", {"format": "pt"})
    assert stored_format(mixed, cpu, fp32) is None


def test_a_tied_head_stays_with_its_embedding(tmp_path: Path) -> None:
    """Quantizing it would hold the embedding twice; loading must not miss it either."""
    model = tm.text_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    tied = MiniMaxM3SparseForCausalLM.from_pretrained(tmp_path, quantization="int8")
    assert tied.lm_head.weight is tied.text_model.embed_tokens.weight


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("source", ["fp32", "mxfp8"])
def test_the_memory_that_is_announced_is_the_memory_that_is_taken(
    stored: Callable[[str], Path], source: str, format: str | None
) -> None:
    """A table in `minim3 info` that drifts from what loading does."""
    loaded = load(stored(source), format)
    with torch.device("meta"):
        model = MiniMaxM3SparseForConditionalGeneration(loaded.config)
    names = {"fp32": set(), "mxfp8": set()}
    if source == "mxfp8":
        from minim3.checkpoint import mxfp8_parameters

        names["mxfp8"] = mxfp8_parameters(stored("mxfp8"))
    quantization = None if format is None else Quantization(format)
    announced = expected_bytes(model, quantization, torch.float32, names[source])
    assert announced == sum(weight_bytes(loaded).values())


def peak_of_allocations(run: Callable[[], object], mapped: int) -> int:
    """Most bytes that torch held at a time, above those at the start; not counted are maps of a file of this size."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]" and abs(event.nbytes()) != mapped:
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak


@pytest.mark.parametrize("format", FORMATS)
def test_loading_holds_the_quantized_model_and_one_tensor(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model too large for the memory in fp32 must still load: never all of it, or a whole stack, in a wide dtype."""
    monkeypatch.setattr(weight_formats, "_CHUNK_ELEMENTS", 1 << 14)
    model = tm.text_model(hidden_size=128, intermediate_size=128, num_local_experts=32)
    model.save_pretrained(tmp_path, format="bf16")
    del model
    held = sum(weight_bytes(MiniMaxM3SparseForCausalLM.from_pretrained(tmp_path, quantization=format)).values())
    wide = sum(weight_bytes(MiniMaxM3SparseForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)).values())
    peak = peak_of_allocations(
        lambda: MiniMaxM3SparseForCausalLM.from_pretrained(tmp_path, quantization=format),
        (tmp_path / "model.safetensors").stat().st_size,
    )
    largest = 2 * 128 * 128 * 4  # both halves of an expert's w13, in fp32
    assert wide > held + 6 * largest
    assert held <= peak < held + 2 * largest


# The command line


def test_the_command_line_takes_and_names_formats(capsys: pytest.CaptureFixture[str]) -> None:
    """An option that is read and not passed on loads fp32 in silence."""
    formats: list[str | None] = []

    class Recorded(Exception):
        pass

    def record(*_: object, quantization: str | None, **__: object) -> None:
        formats.append(quantization)
        raise Recorded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "load", record)
        for command in (["generate", "hello"], ["chat"], ["demo"]):
            main([*command, "--quantization", "int4"])
            main([*command, "--quantization", "none"])
            main(command)
    assert formats == ["int4", None, "auto"] * 3
    capsys.readouterr()
    assert main(["generate", "hello", "--quantization", "int2"]) == 2
    assert "int2" in capsys.readouterr().err
    assert main(["info"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights loaded")]
    assert len(lines) == 1
    assert f"as {'float32' if native.why_not() else 'bf16'}; with --quantization" in lines[0]  # pocket's is in bf16
    assert all(f" as {format}" in lines[0] for format in FORMATS)


def test_pocket_answers_with_quantized_weights() -> None:
    """What a user does: load with a format, ask about a picture."""
    model, processor = minim3.load(quantization="int8")
    (case,) = evaluate.fresh_questions(3, 1)
    (answer,) = evaluate.model_answers(model, processor, max_new_tokens=4)([case.prompt()])
    assert isinstance(answer, str)
    assert set(weight_bytes(model)) == {"float32", "int8"}


# Refusals


def test_training_moving_casting_and_saving_are_refused(tmp_path: Path) -> None:
    """Each would go wrong in silence: nothing learned, weights left behind, a checkpoint without its weights."""
    model = tm.text_model()
    quantize_model(model, "int4")
    with pytest.raises(ValueError, match="int4 weights cannot be trained: load the model without quantization"):
        model.train()
    with pytest.raises(ValueError, match="pass no gradient on"):
        model(inputs_embeds=torch.randn(1, 3, 32, requires_grad=True))
    with pytest.raises(ValueError, match=r"save one that was loaded without quantization.*minim3 convert"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="have no state dict"):
        model.state_dict()
    with pytest.raises(ValueError, match=r"cannot go to torch.bfloat16"):
        model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"cannot go to torch.float32 on meta"):
        model.to("meta")
    assert not model.eval().training
    assert model.to(torch.float32) is model


@pytest.mark.parametrize(
    ("quantization", "options", "message"),
    [
        ("int2", {}, "quantization is 'int2'; known: bf16, int8, int4, mxfp8"),
        ("int8", {"dtype": torch.float16}, "need dtype float32 or bfloat16"),
        ("int8", {"device": "meta"}, "are for the CPU, the device is meta"),
    ],
)
def test_what_cannot_be_is_said_before_loading(
    stored: Callable[[str], Path], quantization: str, options: dict[str, Any], message: str
) -> None:
    """An error from the middle of a product names nothing that a user chose."""
    with pytest.raises(ValueError, match=message):
        load(stored("fp32"), quantization, **options)
    with pytest.raises(ValueError, match="group_size is 48"):
        Quantization("int4", group_size=48)


def test_a_torch_without_the_product_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products are torch's own, and private: another version may do without."""

    class Nothing:
        pass

    monkeypatch.setattr("minim3.model.quantization.torch.ops.aten", Nothing())
    with pytest.raises(ValueError, match="int4 weights need torch's _weight_int8pack_mm, which torch"):
        Quantization("int4").check_available(torch.device("cpu"), torch.float32)


def test_a_weight_that_cannot_be_held_is_named(tmp_path: Path) -> None:
    """A checkpoint broken in one of its thousands of tensors."""
    model = tm.text_model()
    model.text_model.layers[1].get_parameter("block_sparse_moe.experts.w2").data[2, 0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers.1.block_sparse_moe.experts.2.w2.weight: int8 cannot hold NaN"):
        MiniMaxM3SparseForCausalLM.from_pretrained(tmp_path, quantization="int8")


def test_each_matrix_says_its_format() -> None:
    matrices: list[WeightMatrix] = [quantize(torch.randn(4, 4), format) for format in FORMATS]
    assert [matrix.format for matrix in matrices] == list(FORMATS)


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_that_has_run_can_be_copied(format: str) -> None:
    """What points into the memory of one model must not be taken along to its copy."""
    model = tm.text_model()
    quantize_model(model, format)
    ids = tm.random_ids(1, 30)
    with torch.inference_mode():
        want = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, want)
    with pytest.raises((ValueError, RuntimeError)):
        model.text_model.layers[1].self_attn.q_proj(torch.randn(4, 8))
