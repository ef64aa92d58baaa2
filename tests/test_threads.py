"""Work side by side: each piece on its share of threads, stopped together, threads given back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from robuq_bench.threads import run_side_by_side


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4, "a caller's threads were not given back"
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("workers", "count", "share"), [(1, 3, 4), (2, 3, 2), (3, 3, 1), (9, 2, 2), (9, 9, 1)]
)
def test_every_piece_has_its_share_of_the_threads(workers: int, count: int, share: int) -> None:
    together = threading.Barrier(min(workers, count, 4))
    seen: list[tuple[int, int, str]] = []

    def work(item: int) -> Iterator[None]:
        assert torch.is_inference_mode_enabled()
        if item < together.parties:  # as many at a time as there are workers
            together.wait(timeout=20)
        yield
        seen.append((item, torch.get_num_threads(), threading.current_thread().name))

    run_side_by_side(work, range(count), workers)
    assert sorted(item for item, *_ in seen) == list(range(count))
    assert {threads for _, threads, _ in seen} == {share}
    assert not torch.is_inference_mode_enabled()
    assert len({name for *_, name in seen}) >= together.parties


def test_an_error_stops_the_others_at_their_next_step() -> None:
    started = threading.Barrier(2)
    failed = threading.Event()
    begun: list[int] = []

    def work(item: int) -> Iterator[None]:
        begun.append(item)
        started.wait(timeout=20)
        if item == 1:
            failed.set()
            raise ValueError("of piece 1")
        assert failed.wait(timeout=20)
        while True:
            yield

    with pytest.raises(ValueError, match="of piece 1"):
        run_side_by_side(work, range(50), 2)
    assert sorted(begun) == [0, 1]


def test_a_product_in_a_worker_has_the_bits_of_one_thread() -> None:
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(333, 333, generator=generator) for _ in range(4)]
    found: dict[int, torch.Tensor] = {}

    def work(item: int) -> Iterator[None]:
        found[item] = operands[item] @ operands[item]
        yield

    run_side_by_side(work, range(4), 4)
    torch.set_num_threads(1)
    for item, operand in enumerate(operands):
        assert torch.equal(found[item], operand @ operand)
    torch.set_num_threads(4)
