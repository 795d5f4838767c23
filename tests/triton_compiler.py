"""Compiles every Triton kernel for a GPU that need not be there: `python tests/triton_compiler.py 90 bfloat16`.

Each launch of the released shapes is compiled instead of run, for the given compute capability and dtype; a line says
what it takes of registers and shared memory. What is launched is what the launching code makes of the shapes. With
`--loops`, lines below say what an iteration of each inner loop costs a multiprocessor of compute capability 9.0.
"""

import inspect
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import jit

from minim3.kernels.triton import (
    alignment,
    attention,
    by_key,
    decode,
    experts,
    fused,
    layout,
    norm,
    prefill,
    rotation,
    routing,
    select,
    swiglu,
)

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
T, HEADS, KV_HEADS, DIM, BLOCK, TOPK = 256, 64, 4, 128, 128, 16


def compile_instead(capability: int, most_stack: int, show_loops: bool = False) -> None:
    """From now on a launch compiles its kernel and does nothing else."""
    seen = set()

    def run(self: jit.JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        given = inspect.signature(self.fn).bind(*args, **kwargs).arguments
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(self.params):
            name, value = parameter.name, given[parameter.name]
            if parameter.is_constexpr or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(place,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        key = self.fn.__name__, str(signature), str(constants), str(options)
        if key in seen:
            return
        seen.add(key)
        source = ASTSource(self, signature, constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        products = {name: made.asm["ptx"].count(name) for name in ("wgmma.mma", "mma.sync")}
        registers, stack = resources(made.asm["cubin"])
        costs = loops(made.asm["cubin"], made.metadata.num_warps) if show_loops else []
        print(
            self.fn.__module__, self.fn.__name__, options, f"shared {made.metadata.shared}", f"registers {registers}",
            products, *costs, flush=True,
        )  # fmt: skip
        if self.fn.__module__.endswith(("swiglu", "experts")):
            # They drop NaN, which then trains on unseen.
            assert not re.search(r"\bm(in|ax)(\.ftz)?\.f32", made.asm["ptx"]), "a minimum or maximum of the GPU"
        assert made.metadata.shared <= SHARED_BYTES[capability], "more shared memory than a program may have"
        assert stack <= most_stack, f"{stack} bytes of registers spill to memory"

    jit.JITFunction.run = run  # type: ignore[method-assign]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    printed = dumped(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found, printed
    return int(found[1]), int(found[2])


def dumped(cubin: bytes, what: str) -> str:
    tool = Path(triton.backends.nvidia.__file__).with_name("bin") / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def loops(cubin: bytes, warps: int) -> list[str]:
    """A line for each inner loop: cycles that an iteration keeps the tensor cores, the schedulers and the special
    function units of a multiprocessor busy, if nothing else held them up.

    2,048 multiply-adds of bf16 a cycle, one instruction a cycle in each of four schedulers, of which integer, compare
    and conversion instructions take two, and 16 exponentials a cycle (CUDA C++ Programming Guide, throughput of
    arithmetic instructions, 9.0).
    """
    code = []
    for line in dumped(cubin, "-sass").splitlines():
        found = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line)
        if found:
            code.append((int(found[1], 16), found[2]))
    jumps = [(int(m[1], 16), at) for at, text in code if (m := re.search(r"^BRA.*0x([0-9a-f]+)", text))]
    back = {(to, at) for to, at in jumps if to < at}
    lines = []
    for first, last in sorted(back):
        if any((to, at) != (first, last) and first <= to and at <= last for to, at in back):
            continue
        names = [text.split()[0] for at, text in code if first <= at <= last]
        tensor = sum(64 * int(m[1]) * int(m[2]) for x in names if (m := re.match(r"HGMMA\.64x(\d+)x(\d+)", x)))
        tensor += sum(16 * 8 * 16 * 4 for x in names if x.startswith("HMMA.16816"))
        slow = sum(bool(re.match(r"FMNMX|V?IMNMX|[FI]SET|F?SEL|V?IADD|LOP|LEA|SHF|PRMT|F2F|P2R", x)) for x in names)
        special = sum(x.startswith("MUFU") for x in names)
        lines.append(
            f"\n    {len(names)} instructions: tensor cores {tensor * warps / 4 / 2048:.0f}, "
            f"schedulers {(len(names) + slow) * warps / 4:.0f}, exponentials {special * 8 * warps / 4:.0f} cycles"
        )
    return lines


def launch_all(dtype: torch.dtype, eight_bits: bool) -> None:
    cu = [0, T]
    q, k, v = (torch.empty(T, heads, DIM, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    index_q, index_k = torch.empty(T, KV_HEADS, DIM, dtype=dtype), torch.empty(T, DIM, dtype=dtype)
    ids = torch.zeros(T, KV_HEADS, TOPK, dtype=torch.int32)
    run = {"block_size": BLOCK, "topk_blocks": TOPK}
    for score_type in ("max", "lse"):
        select.select_blocks(index_q, index_k, cu, cu, score_type=score_type, **run)
    kept = select._GROUP, select._FEW_ROWS
    for select._GROUP, select._FEW_ROWS in ((2, 0), (2, 1 << 20)):
        select.select_blocks(index_q, index_k, cu, cu, **run)
    select._GROUP, select._FEW_ROWS = kept
    for queries in (16, 1024):
        packed = index_q[:1].expand(queries, -1, -1), torch.empty(1 << 17, DIM, dtype=dtype), [0, queries], [0, 1 << 17]
        select.select_blocks(*packed, **run)
    where = layout.packed_layout(cu, cu, None, q, k)
    select.index_log_sum_exp(index_q, index_k, where, BLOCK, 0.1)
    for leaves in ([q, k, v], [x.clone().requires_grad_() for x in (q, k, v)]):
        for out, _ in (
            attention.block_sparse_attention(*leaves, ids, cu, cu, block_size=BLOCK),
            attention.varlen_attention(*leaves, cu, cu),
            attention.varlen_attention(*leaves, cu, cu, causal=False),
        ):
            if out.requires_grad:
                out.sum().backward()
    by_key.forward(q, k, v, ids, where, None, BLOCK, 0.1, q, torch.empty(T, HEADS))
    for chosen in (ids, None):
        leaves = [index_q.clone().requires_grad_(), index_k.clone().requires_grad_()]
        alignment.indexer_kl(q, k, *leaves, chosen, cu, cu, block_size=BLOCK).backward()
    pages, table = torch.empty(8, KV_HEADS, BLOCK, DIM, dtype=dtype), torch.arange(8).view(1, 8)
    for count, cache in ((1, dtype), (T, dtype), *[(n, torch.float8_e4m3fn) for n in (1, T) if eight_bits]):
        held, step = pages.to(cache), layout.paged_layout(table, [1000], [0, count], BLOCK, count, None)
        select.select_blocks_paged(index_q[:count], held[:, 0].contiguous(), table, [1000], [0, count], **run)
        for chosen, size in ((ids[:count], BLOCK), (None, 64)):
            if count == 1:
                for splits in (None, 1):
                    decode.decode(q[:1], held, held, table, chosen, step, block_size=size, scale=0.1, splits=splits)
            else:
                prefill.forward(q, held, held, chosen, step, page_table=table, block_size=size, scale=0.1)
    most, routing.MOST_SORTED = routing.MOST_SORTED, 0  # what is only compiled sorts nothing
    for tokens in (4, 400):
        x, w13, w2 = (torch.empty(*s, dtype=dtype) for s in ((tokens, 512), (8, 768, 512), (8, 512, 384)))
        choice = torch.stack([torch.randperm(8)[:4] for _ in range(tokens)])
        leaves = [x, *[w.requires_grad_() for w in (w13, w2, torch.rand(tokens, 4))]]
        experts.grouped_experts(*leaves[:3], choice, leaves[3], alpha=1.7, limit=7.0).sum().backward()
    routing.MOST_SORTED = most
    slots = torch.arange(8)
    rotation.norm_rope_store(
        q[:8, :KV_HEADS], torch.empty(DIM, dtype=dtype), torch.empty(8, 64), eps=1e-6, pages=pages, slots=slots
    )
    packed = torch.empty(8, HEADS + 2 * KV_HEADS + 5, DIM, dtype=dtype)
    rotation.norm_rope_store_packed(
        packed, packed[0, KV_HEADS:], torch.empty(8, 64), eps=1e-6, heads=(HEADS, KV_HEADS, 4), slots=slots,
        pages=(pages, pages, pages[:, 0].contiguous()),
    )  # fmt: skip
    hidden, scale = torch.empty(8, 6144, dtype=dtype), torch.empty(6144)
    for residual, more in ((None, None), (hidden, None), (hidden, hidden)):
        fused.add_norm(hidden, residual, scale, eps=1e-6, more=more)
    for count, bias in ((128, torch.empty(128)), (16, None)):
        routing.route(torch.empty(8, count), bias, top_k=4, scoring_func="sigmoid", factor=2.0)
        routing.sort_by_expert(torch.zeros(64, 4, dtype=torch.int64), count)
    for leaf in (hidden, hidden.clone().requires_grad_()):
        gate_up = swiglu.swiglu_oai(*leaf.chunk(2, dim=-1), 1.7, 7.0)
        turned = rotation.norm_rope_store(leaf.view(8, -1, DIM), scale[:DIM], torch.empty(8, 64), eps=1e-6)
        normed = norm.rms_norm(leaf, scale, eps=1e-6)
        if leaf.requires_grad:
            (gate_up.sum() + turned.sum() + normed.sum()).backward()


if __name__ == "__main__":
    # Exact products of fp32 hold whole rows in registers, and do spill.
    most = 1 << 16 if sys.argv[2] == "float32" else 128
    compile_instead(int(sys.argv[1]), most_stack=most, show_loops="--loops" in sys.argv)
    launch_all(getattr(torch, sys.argv[2]), eight_bits=int(sys.argv[1]) >= 89 and sys.argv[2] != "float32")
