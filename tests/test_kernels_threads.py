"""Pieces of a kernel on several threads: the same numbers, the same errors, no trace left behind."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minim3 import kernels
from minim3.kernels.portable import threads

LENGTH, BLOCK, TOPK = 400, 16, 4
CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run_layer() -> list[torch.Tensor]:
    """Selection, attention, alignment and their gradients."""
    g = torch.Generator().manual_seed(0)
    q, k, v, index_q = (torch.randn(LENGTH, heads, 16, generator=g).requires_grad_() for heads in (4, 2, 2, 2))
    index_k = torch.randn(LENGTH, 16, generator=g).requires_grad_()
    cu = [0, LENGTH]
    ids = kernels.select_blocks(index_q, index_k, cu, cu, block_size=BLOCK, topk_blocks=TOPK, implementation="portable")
    out, lse = kernels.block_sparse_attention(q, k, v, ids, cu, cu, block_size=BLOCK, implementation="portable")
    kl = kernels.indexer_kl(q, k, index_q, index_k, ids, cu, cu, block_size=BLOCK, implementation="portable")
    (out.square().sum() + kl).backward()
    grads = [x.grad for x in (q, k, v, index_q, index_k)]
    return [ids, out.detach(), lse, kl.detach(), *(x for x in grads if x is not None)]


def test_threads_change_no_number(two_threads: None) -> None:
    """Pieces that write to the same place, or pick up another's rows, would differ from run to run."""
    several = [run_layer() for _ in range(3)]
    torch.set_num_threads(1)
    for results in several:
        for one, other in zip(run_layer(), results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
            assert torch.equal(one, other)


def test_pieces_run_side_by_side_with_one_thread_each(two_threads: None) -> None:
    meet = threading.Barrier(2, timeout=20)
    seen: list[tuple[int, bool, bool]] = []

    def piece() -> None:
        meet.wait()  # would time out if one ran after the other
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    threads.run_all([piece, piece], CPU)
    with torch.inference_mode():
        threads.run_all([piece, piece], CPU)
    assert seen == [(1, False, False)] * 2 + [(1, False, True)] * 2
    assert torch.get_num_threads() == 2
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [2], "the pool's setting must not become the default of other threads"


def test_an_error_in_a_piece_comes_out(two_threads: None) -> None:
    def fail() -> None:
        raise ValueError("of a piece")

    with pytest.raises(ValueError, match="of a piece"):
        threads.run_all([lambda: None, fail, lambda: None], CPU)


def test_counters_of_operators_see_every_piece(two_threads: None) -> None:
    """Dispatch modes hold for one thread: work on another would be missing from a FLOP count."""
    x = torch.ones(8, 8)
    with FlopCounterMode(display=False) as counter:
        threads.run_all([lambda: torch.mm(x, x)] * 4, CPU)
    assert counter.get_total_flops() == 4 * 2 * 8**3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_its_parents_threads(two_threads: None) -> None:
    threads.run_all([lambda: None, lambda: None], CPU)
    child = os.fork()
    if child == 0:
        done: list[int] = []
        threads.run_all([lambda: done.append(1), lambda: done.append(2)], CPU)
        os._exit(0 if len(done) == 2 else 1)
    timer = threading.Timer(30, os.kill, (child, 9))
    timer.start()
    _, status = os.waitpid(child, 0)
    timer.cancel()
    assert status == 0


def test_rooms_serve_in_and_out_of_inference_mode(two_threads: None) -> None:
    """A buffer first made in inference mode could not be written to by a training step after it."""
    expected = run_layer()
    threads._kept.__dict__.clear()
    with torch.inference_mode():
        first = threads.room("test", 4, torch.zeros(1))
        first += 1.0
    second = threads.room("test", 4, torch.zeros(1))
    second += 1.0
    assert second.data_ptr() == first.data_ptr()
    assert second.tolist()[1:] == first.tolist()[1:]
    assert threads.room("test", 4, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    for one, other in zip(expected, run_layer(), strict=True):
        assert torch.equal(one, other)


def test_what_a_room_held_does_not_show(two_threads: None) -> None:
    """Rooms come with old numbers: whatever is read must have been written before."""
    expected = run_layer()
    poison_all_rooms()
    for one, other in zip(expected, run_layer(), strict=True):
        assert torch.equal(one, other)


def poison_all_rooms() -> None:
    meet = threading.Barrier(2, timeout=20)

    def poison() -> None:
        meet.wait()
        for buffer in threads._kept.__dict__.get("buffers", {}).values():
            buffer.fill_(float("nan"))

    threads.run_all([poison, poison], CPU)


def test_other_devices_keep_to_the_thread_that_asked(two_threads: None) -> None:
    """A new thread has another current stream: its kernels would not wait for the inputs."""
    seen: list[threading.Thread] = []
    threads.run_all([lambda: seen.append(threading.current_thread())] * 4, torch.device("meta"))
    assert set(seen) == {threading.current_thread()}
