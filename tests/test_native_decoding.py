"""The decoder in C: the same bits in any company, tiles, quantized weights, drafts, and words where it cannot run.

That it computes what the modules compute is tested in `test_model_decoding`, with the portable form.
"""

import platform
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minim3 import kernels
from minim3.kernels import native
from minim3.kernels.native import build
from minim3.model.causal_lm import MiniMaxM3SparseForCausalLM
from minim3.model.decoding import DecodingModel
from minim3.model.layers import rotary_table
from minim3.model.native_decoding import NativeDecodingModel, NativeHead, _Known
from minim3.model.quantization import Quantization, quantize_model
from minim3.model.quantized import QuantizedExperts, QuantizedLinear
from minim3.model.weight_formats import MXFP8Matrix, int4_layout, quantize
from tests import tiny_models
from tests.test_model_decoding import NEEDS_COMPILER, Steps, cached, compare, embeddings

SOURCES = sorted(Path(build.__file__).parent.glob("*.[ch]"))
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
WIDE = {"hidden_size": 64, "intermediate_size": 64, "shared_intermediate_size": 64, "dense_intermediate_size": 128}
"""Widths that 4-bit blocks of rows and groups of columns divide."""


@pytest.fixture(params=[False, True], ids=["vectors", "tiles"])
def tiles(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether products of many rows run on tiles."""
    if native.use_tiles(request.param) != request.param:
        pytest.skip("this machine has no tiles of bf16")
    yield request.param
    native.use_tiles(True)


def native_form(model: MiniMaxM3SparseForCausalLM) -> NativeDecodingModel:
    model.pack_for_inference()
    form = NativeDecodingModel.of(model.text_model)
    assert form is not None
    return form


def run(form: NativeDecodingModel, model: Any, steps: Steps, seeds: list[int]) -> list[Tensor]:
    """Hidden states of each sequence, whose past and new tokens are those of its seed."""
    rows = []
    batch = cached(model, steps, 4)
    assert batch.pages is not None
    for n, ((stored, new), seed) in enumerate(zip(steps, seeds, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        for layer in batch.pages.layers:
            for pages in (layer.k, layer.v, layer.index_k):
                if pages is not None:
                    for at in range(stored):
                        place = pages[batch.pages.page_table[n, at // 4]][..., at % 4, :]
                        place.copy_(torch.randn(place.shape, generator=generator))
        rows.append(torch.randn(new, model.text_config.hidden_size, generator=generator))
    with torch.inference_mode():
        out = form.forward_packed(torch.cat(rows), batch)
    assert out is not None
    return list(out.split([new for _, new in steps]))


COMPANY = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 3) | st.just(20)), min_size=2, max_size=7)


@NEEDS_COMPILER
@PROPERTY
@given(COMPANY, st.integers(1, 3))
def test_a_sequence_gets_the_same_bits_alone_and_in_company(steps: Steps, threads: int) -> None:
    """Sums in an order that depended on the batch or the threads would turn near ties, and answers with them."""
    native.use_tiles(False)
    try:
        for alone, together in alone_and_together(steps, threads):
            assert torch.equal(alone, together)
    finally:
        native.use_tiles(True)


@NEEDS_COMPILER
@PROPERTY
@given(COMPANY, st.integers(1, 3))
def test_on_tiles_company_makes_no_more_than_a_difference_of_rounding(steps: Steps, threads: int) -> None:
    """A product that has enough rows for tiles in company alone is summed in another order: within fp32, no more."""
    for alone, together in alone_and_together(steps, threads):
        assert (alone - together).abs().max() <= 1e-5 * together.abs().max()


def alone_and_together(steps: Steps, threads: int) -> Iterator[tuple[Tensor, Tensor]]:
    model = tiny_models.text_model(1)
    form, seeds = native_form(model), list(range(len(steps)))
    before = torch.get_num_threads()
    together = run(form, model, steps, seeds)
    try:
        torch.set_num_threads(threads)
        for place, step in enumerate(steps):
            yield run(form, model, [step], [seeds[place]])[0], together[place]
    finally:
        torch.set_num_threads(before)


@NEEDS_COMPILER
@pytest.mark.parametrize("steps", [[(9, 40), (0, 33)], [(0, 100), (3, 100), (50, 1)], [(n, 1) for n in range(50)]])
def test_the_number_of_threads_changes_no_bit(tiles: bool, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads cut the work into other items, and pack what they need themselves."""
    model = tiny_models.text_model(1, **WIDE)
    form, found = native_form(model), []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(native, "_threads", lambda *_: threads)  # noqa: B023
        found.append(torch.cat(run(form, model, steps, list(range(len(steps))))))
    for other in found[1:]:
        assert torch.equal(found[0], other)


ODD_SIZES: list[dict[str, Any]] = [
    {"hidden_size": 40, "intermediate_size": 20, "shared_intermediate_size": 12, "dense_intermediate_size": 36},
    {"num_attention_heads": 14, "num_key_value_heads": 2, "index_n_heads": 2},
    {"head_dim": 48, "index_head_dim": 48, "rotary_dim": 8},
    {"num_local_experts": 7, "num_experts_per_tok": 3},
    {"hidden_size": 71, "intermediate_size": 33, "shared_intermediate_size": 95, "dense_intermediate_size": 65},
]


@NEEDS_COMPILER
@pytest.mark.parametrize("changes", ODD_SIZES)
def test_odd_sizes(tiles: bool, changes: dict[str, Any]) -> None:
    """Rows and columns that no vector or tile divides; five heads past a tile; experts without a token."""
    model = tiny_models.text_model(4, **changes)
    form = native_form(model)
    for steps in ([(9, 1)], [(40, 3), (2, 1), (33, 2)], [(n, 1) for n in range(20, 43)], [(0, 70), (12, 35), (5, 1)]):
        compare(model, form, steps)


@NEEDS_COMPILER
@pytest.mark.parametrize("tiles", [False, True])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 100)), min_size=1, max_size=3), st.sampled_from(ODD_SIZES),
    st.integers(0, 3),
)  # fmt: skip
def test_any_number_of_tokens(tiles: bool, steps: Steps, changes: dict[str, Any], seed: int) -> None:
    """Panels and chunks that tokens fill in part, experts on tiles beside experts that are not."""
    if native.use_tiles(tiles) != tiles or sum(new for _, new in steps) > native.limits().tokens:
        return
    try:
        model = tiny_models.text_model(seed, **changes)
        compare(model, native_form(model), steps)
    finally:
        native.use_tiles(True)


@NEEDS_COMPILER
def test_many_sequences_at_once(tiles: bool) -> None:
    """More tokens than a thread keeps at a time."""
    model = tiny_models.text_model(4)
    compare(model, native_form(model), [(n % 9, 60) for n in range(10 if tiles else 4)])


@NEEDS_COMPILER
def test_equal_scores_go_to_the_lower_block() -> None:
    """Pitfall: an indexer that tells nothing apart. The definition takes the lower blocks, and so must this."""
    model = tiny_models.text_model(2)
    for layer in model.text_model.layers:
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.index_q_proj.weight.data.zero_()
    form = native_form(model)
    for steps in ([(37, 1)], [(41, 3), (22, 1)]):
        compare(model, form, steps)


def dequantized(model: MiniMaxM3SparseForCausalLM) -> MiniMaxM3SparseForCausalLM:
    """A plain model of the weights that a quantized one stands for."""
    plain: Any = MiniMaxM3SparseForCausalLM(model.text_config).eval()
    known = dict(model.named_modules())
    with torch.no_grad():
        for name, module in plain.named_modules():
            found: Any = known[name]
            if isinstance(found, QuantizedLinear):
                assert found.matrix is not None
                module.weight.copy_(found.matrix.dequantize())
            elif isinstance(found, QuantizedExperts):
                for stack, weight in ((found.w13, module.w13), (found.w2, module.w2)):
                    for expert in range(weight.shape[0]):
                        weight[expert].copy_(stack[expert].dequantize())
            else:
                for key, value in found.named_parameters(recurse=False):
                    module.get_parameter(key).copy_(value)
                for key, value in found.named_buffers(recurse=False):
                    module.get_buffer(key).copy_(value)
    return plain.eval()


@NEEDS_COMPILER
@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "mxfp8"])
def test_quantized_weights_are_what_they_stand_for(tiles: bool, format: str) -> None:
    """Against a plain model of the dequantized weights: codes, scales and zeros in their places, in any number."""
    model = tiny_models.text_model(5, **WIDE)
    quantize_model(model, Quantization(format))
    plain = dequantized(model)
    model.pack_for_inference()
    form = NativeDecodingModel.of(model.text_model)
    if form is None:
        layout = int4_layout()
        assert format == "int4"
        assert layout is None or layout.block not in native.int4_blocks()
        pytest.skip("torch packs 4-bit weights here in an order that the kernels do not know")
    plain_form = native_form(plain)
    for steps in ([(9, 1)], [(40, 3), (2, 1), (33, 2)], [(n, 1) for n in range(20, 37)], [(0, 90), (4, 57)]):
        seeds = list(range(len(steps)))
        for got, want in zip(run(form, model, steps, seeds), run(plain_form, plain, steps, seeds), strict=True):
            assert (got - want).abs().max() <= 2e-4 * want.abs().max()


@NEEDS_COMPILER
@pytest.mark.parametrize("columns", [128, 40, 7])
def test_every_number_of_mxfp8(columns: int) -> None:
    """All codes, with scales from one end to the other, in whole vectors and past the last one; NaN shows."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(columns)[: 7 * columns].view(7, columns)
    codes = torch.where(codes & 127 == 127, 0, codes)
    scales = torch.tensor([0, 1, 100, 127, 128, 200, native.MOST_SCALE]).byte().unsqueeze(1)
    matrix = MXFP8Matrix(codes.view(torch.float8_e4m3fn), scales.repeat(1, -(-columns // 32)), columns)
    known, want = _Known(), matrix.dequantize()
    one_by_one = [native.product(known.quantized(matrix), row[None]) for row in torch.eye(columns)]
    assert torch.equal(torch.cat(one_by_one).t(), want)
    together = native.product(known.quantized(matrix), torch.eye(columns)).t()
    assert torch.equal(together, want.where(want.abs() >= 2.0**-126, together))  # tiles take what is smaller for zero
    codes[3, columns - 1] = 255
    got = native.product(known.quantized(matrix), torch.ones(1, columns))[0]
    assert got.isnan().tolist() == [n == 3 for n in range(7)]


@NEEDS_COMPILER
def test_what_4_bit_rows_have_no_blocks_for_is_left_to_others() -> None:
    """The second half of an expert's rows would start in the middle of a block."""
    model = tiny_models.text_model(5)
    quantize_model(model, Quantization("int4"))
    model.pack_for_inference()
    assert NativeDecodingModel.of(model.text_model) is None


@NEEDS_COMPILER
def test_drafts_are_those_of_the_module(tiles: bool) -> None:
    model = tiny_models.text_model(6, num_mtp_modules=2)
    form, mtp = native_form(model), model.text_model.mtp
    assert mtp is not None
    for depth in range(2):
        module: Any = mtp.layers[depth]
        draft = form.draft_module(module, model.text_config)
        assert draft is not None
        for steps in ([(9, 1)], [(30, 2), (3, 1)], [(0, 50), (7, 30)]):
            hidden: Tensor = torch.randn(sum(new for _, new in steps), 32)
            ours, theirs = (cached(model, steps, 4, num_draft_layers=2) for _ in range(2))
            x = embeddings(ours)
            freqs = rotary_table(ours.positions, model.text_config.rotary_dim, model.text_config.rope_theta)
            with torch.inference_mode():
                got = draft.forward_packed(x, ours, hidden)
                want = module(hidden, embed_input=x, freqs_cis=freqs, batch=theirs)
            assert got is not None
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@NEEDS_COMPILER
def test_the_structures_are_those_of_the_c() -> None:
    """A field added to one side alone would shift all behind it."""
    source = "".join(path.read_text() for path in SOURCES)
    for structure in (native.Matrix, native.Pages, native.Selection, native.Norm, native.Activation, native.Experts,
                      native.Layer, native.Model, native.Batch):  # fmt: skip
        end = source.index("} " + structure.__name__ + ";")
        declared = _declared(source[source.rindex("typedef struct {", 0, end) : end])
        assert declared == [name for name, *_ in structure._fields_], structure.__name__


@NEEDS_COMPILER
def test_the_limits_are_those_of_the_c() -> None:
    """Buffers on the stack of C have their sizes: with other limits here they would be overrun."""
    source = "".join(path.read_text() for path in SOURCES)
    for name in ("MOST_ROWS", "MOST_SCALE"):
        (value,) = re.findall(rf"#define {name} (\d+)", source)
        assert int(value) == getattr(native, name)


@NEEDS_COMPILER
@pytest.mark.parametrize("part", ["gate", "up", "down", "shared", "k_proj", "router", "norm"])
def test_a_nan_shows(tiles: bool, part: str) -> None:
    """A limit or a maximum that takes the other number would turn NaN into an answer, without a word."""
    model: Any = tiny_models.text_model(2)
    layer = model.text_model.layers[2]
    experts, shared = layer.block_sparse_moe.experts, layer.block_sparse_moe.shared_experts
    width = experts.w2.shape[2]
    weight, row = {
        "gate": (experts.w13[:], slice(3)), "up": (experts.w13[:, width:], slice(3)), "down": (experts.w2[:], slice(3)),
        "shared": (shared.gate_proj.weight, 5), "k_proj": (layer.self_attn.k_proj.weight, 7),
        "router": (layer.block_sparse_moe.gate.weight, 3), "norm": (layer.input_layernorm.weight, 2),
    }[part]  # fmt: skip
    with torch.no_grad():
        if weight.dim() == 1:
            weight.data[row] = torch.nan
        else:
            weight.data[..., row, :] = torch.nan
    few: Steps = [(9, 1), (20, 2)]
    many: Steps = few if part == "k_proj" else [(3, 60), (0, 40)]  # torch's attention of many loses NaN of keys
    for form, steps in (
        (native_form(model), few),
        (native_form(model), many),
        (DecodingModel.of(model.text_model), few),
    ):
        assert form is not None
        batch = cached(model, steps, 4)
        with torch.inference_mode():
            out = form.forward_packed(embeddings(batch), batch)
            want = model.text_model.forward_packed(embeddings(batch), cached(model, steps, 4))
        assert want.isnan().any()
        assert out is not None
        assert torch.equal(out.isnan().any(1), want.isnan().any(1))


@NEEDS_COMPILER
def test_a_quantized_matrix_that_was_replaced_is_noticed() -> None:
    model: Any = tiny_models.text_model(5, **WIDE)
    quantize_model(model, Quantization("int8"))
    form, experts = native_form(model), model.text_model.layers[2].block_sparse_moe.experts
    batch = cached(model, [(9, 1)], 4)
    with torch.inference_mode():
        assert form.forward_packed(embeddings(batch, 64), batch) is not None
        experts.w13.matrices[0] = quantize(torch.randn(128, 64), "int8")
        assert form.forward_packed(embeddings(batch, 64), batch) is None


@NEEDS_COMPILER
def test_a_tail_behind_a_very_long_prefix_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of it would read all keys, and hold a share of each 512 of them."""
    model = tiny_models.text_model(1)
    form = native_form(model)
    with torch.inference_mode():
        for name, changed in (
            ("limits", lambda: native.BY_VECTORS._replace(pairs=600)),
            ("limits", lambda: native.BY_VECTORS._replace(keys=100)),
            ("_MOST_BYTES", 1000),
        ):
            batch = cached(model, [(40, 70)], 4)
            assert form.forward_packed(embeddings(batch), batch) is not None
            monkeypatch.setattr(native, name, changed)
            assert form.forward_packed(embeddings(batch), batch) is None
            monkeypatch.undo()


@NEEDS_COMPILER
def test_a_head_that_was_replaced_is_asked() -> None:
    model: Any = tiny_models.text_model(1)
    model.pack_for_inference()
    head, x = NativeHead(model), torch.randn(3, 32)
    with torch.inference_mode():
        assert torch.allclose(head(x), model.compute_logits(x), atol=1e-5)
        model.lm_head = torch.nn.Linear(32, 64, bias=False)
        assert torch.equal(head(x), model.lm_head(x))
        model.lm_head.weight.data = torch.randn(64, 32)
        assert torch.equal(head(x), model.lm_head(x))


def _declared(body: str) -> list[str]:
    """Names of the members of a C structure."""
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.S).split("{", 1)[1]
    found = []
    for declaration in body.split(";"):
        words = declaration.replace("*", " ").replace("\n", " ").strip()
        if words:
            first, *others = words.split(",")
            found += [first.split()[-1], *(other.strip() for other in others)]
    return found


# Building


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """As in a process that has built nothing, with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.library.cache_clear()
    kernels._choose.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    build.library.cache_clear()
    kernels._choose.cache_clear()


def test_without_a_compiler_portable_runs_and_says_so(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    choice = kernels.choose(None, "decoder_step", "cpu", torch.float32)
    assert choice.name == "portable"
    assert "no C compiler (cc, gcc or clang) was found" in choice.reason
    with pytest.raises(ValueError, match=r"'native' is not available for decoder_step on cpu.*no C compiler"):
        kernels.choose("native", "decoder_step", "cpu", torch.float32)
    model = tiny_models.text_model()
    model.pack_for_inference()
    assert NativeDecodingModel.of(model.text_model) is None


def test_a_compiler_that_fails_is_quoted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'step.c:1: error: no such flag' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(broken))
    assert native.why_not() == f"{broken} cannot compile the kernels: step.c:1: error: no such flag"
    assert list((fresh / "cache" / "minim3").iterdir()) == [], "something half made was left"


@NEEDS_COMPILER
def test_a_cache_folder_that_cannot_be_made_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "cache").write_text("a file")
    assert "cache/minim3 cannot be made" in (native.why_not() or "")


@NEEDS_COMPILER
def test_a_torn_library_is_made_again(fresh: Path) -> None:
    built = build._built(build.compilers()[0])
    built.write_bytes(b"")
    assert native.why_not() is None
    assert built.stat().st_size > 1000


@NEEDS_COMPILER
def test_without_a_home_folder_the_way_out_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", homeless)
    assert native.why_not() == "there is no home folder to compile kernels into: set XDG_CACHE_HOME"


@NEEDS_COMPILER
def test_a_compiler_may_be_named_with_options(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((found, *_), *_) = build.compilers()
    monkeypatch.setenv("CC", f"{found} -O1")
    assert native.why_not() is None


@NEEDS_COMPILER
@pytest.mark.parametrize("machine", ["x86-64", "x86-64-v3"])
def test_vectors_of_other_machines(fresh: Path, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    """Four and eight lanes, as on older machines, in a process of their own."""
    if platform.machine() != "x86_64":
        pytest.skip("these are other machines' vectors")
    flags = tuple(f"-march={machine}" if flag == "-march=native" else flag for flag in build._FLAGS)
    program = f"""
import minim3.kernels.native.build as build
build._FLAGS = {flags!r}
from minim3.kernels import native
assert native.lanes() == {4 if machine == "x86-64" else 8}
import tests.test_model_decoding as steps
for name in steps.MODELS:
    steps.test_it_computes_what_the_modules_compute(steps.NativeDecodingModel, name)
import tests.test_native_prompts as prompts
prompts.test_it_chooses_what_the_definition_chooses.hypothesis.inner_test([(70, 90)], 16, 9, 2, 3, 0, 1, True, 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@NEEDS_COMPILER
def test_it_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.why_not() is None
    (built,) = (fresh / "cache" / "minim3").iterdir()
    before = built.stat().st_mtime_ns
    build.library.cache_clear()
    monkeypatch.setattr(build, "_compile", None)
    assert native.why_not() is None
    assert built.stat().st_mtime_ns == before


@NEEDS_COMPILER
def test_another_implementation_is_not_run_in_c() -> None:
    for backend in ("portable", "reference"):
        model = tiny_models.text_model(backend=backend)
        model.pack_for_inference()
        assert NativeDecodingModel.of(model.text_model) is None
