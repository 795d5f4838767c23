"""A whole small model on a GPU: its tokens are the CPU's in fp32, and near them in bf16."""

import copy

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from minim3.inference.engine import Engine
from minim3.inference.request import SamplingParams
from minim3.model.fused import FusedModel
from tests.tiny_models import random_ids, text_model

SHAPE = {"index_block_size": 32, "index_topk_blocks": 3, "hidden_size": 64, "vocab_size": 256,
         "max_position_embeddings": 512}  # fmt: skip


def models() -> tuple:
    model = text_model(3, **SHAPE)
    return model, copy.deepcopy(model).cuda()


def test_greedy_tokens_equal_the_cpu() -> None:
    """Three prompts of different lengths, padded, beyond the budget of blocks; near ties end a comparison."""
    cpu, gpu = models()
    ids = random_ids(3, 300)
    mask = torch.ones(3, 300, dtype=torch.int64)
    mask[1, :150], mask[2, :299] = 0, 0
    run = {"max_new_tokens": 40, "do_sample": False}
    want = cpu.generate(input_ids=ids, attention_mask=mask, **run)
    got = gpu.generate(input_ids=ids.cuda(), attention_mask=mask.cuda(), **run).cpu()
    for row, (a, b) in enumerate(zip(want, got)):
        for place in range(300, min(len(a), len(b))):
            if a[place] != b[place]:
                seen = torch.cat([mask[row], torch.ones(place - 300, dtype=torch.int64)])
                best = cpu(a[None, :place], attention_mask=seen[None]).logits[0, -1].topk(2).values
                assert best[0] - best[1] < 1e-4, f"row {row} differs at {place}"
                break


@pytest.mark.parametrize("drafts", [0, 2])
def test_graphs_give_the_tokens_of_single_launches(drafts: int) -> None:
    """Requests that end at different times, over a cache that grows; free pages hold NaN. Near ties are none here."""
    model = text_model(3, num_mtp_modules=1, **SHAPE).cuda()
    answers = []
    for cuda_graphs in (False, True):
        engine = Engine(model, cuda_graphs=cuda_graphs, num_speculative_tokens=drafts, poison=True, initial_pages=8)
        assert isinstance(engine.runner.decoding, FusedModel)
        requests = []
        for seed, (length, count) in enumerate([(200, 60), (31, 20), (90, 40), (64, 8), (5, 50)]):
            params = SamplingParams(max_new_tokens=count, temperature=0.0, ignore_eos=True)
            requests.append(engine.add_request(random_ids(length, seed=seed).tolist(), params))
        engine.run()
        graphs = engine.runner.graphs
        assert (graphs is not None and graphs.num_recorded > 0) == cuda_graphs
        answers.append([request.output_ids for request in requests])
    assert answers[0] == answers[1]


def test_a_cache_in_eight_bits_stays_near() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8_e4m3fn needs compute capability 8.9")
    model, ids = text_model(3, **SHAPE).cuda().bfloat16(), random_ids(200).tolist()
    logprobs = []
    for name in ("auto", "fp8"):
        engine = Engine(model, kv_cache_dtype=name)
        params = SamplingParams(max_new_tokens=1, temperature=0.0, logprobs=20)
        request = engine.add_request(ids, params)
        engine.run()
        found = request.logprobs[0]
        logprobs.append(dict(zip(found.top_token_ids, found.top_logprobs)))
    shared = logprobs[0].keys() & logprobs[1].keys()
    assert len(shared) >= 10
    assert max(abs(logprobs[0][i] - logprobs[1][i]) for i in shared) < 0.5


def test_logits_and_gradients_equal_the_cpu() -> None:
    cpu, gpu = models()
    ids = random_ids(2, 250)
    grads = []
    for model in (cpu, gpu):
        device = next(model.parameters()).device
        out = model(ids.to(device), labels=ids.to(device), output_indexer_kl=True)
        (out.loss + sum(out.indexer_kl)).backward()
        grads.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    want, got = grads
    assert want.keys() == got.keys()
    for name, grad in got.items():
        assert (grad - want[name]).abs().max() <= 2e-3 * want[name].abs().max() + 1e-6, name


def test_bf16_logits_are_as_near_as_the_portable_kernels() -> None:
    """bf16 weights: the error against fp32 is at most twice that of the plain operators on the same device."""
    model = text_model(3, **SHAPE)
    ids = random_ids(1, 400).cuda()
    exact = model.cuda()(ids).logits
    errors = []
    for backend in ("portable", "triton"):
        half = text_model(3, backend=backend, **SHAPE).cuda().bfloat16()
        errors.append(float((half(ids).logits.float() - exact).norm()))
    assert errors[1] <= 2 * errors[0]
