"""Test how work is shared among processes, and that a single process does all of it."""

import pytest

from distillm_cli.errors import DataError
from distillm_cli.training.distributed import World, in_first_process, is_exchanged, joined, world


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_each_thing_has_one_owner_and_work_is_balanced(size):
    costs = [9, 7, 6, 5, 5, 4, 2, 2, 1, 1, 1, 1]
    shares = [World(rank, size).share(costs) for rank in range(size)]
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    work = [sum(costs[i] for i in share) for share in shares]
    assert max(work) <= max(max(costs), 4 / 3 * sum(costs) / size)


@pytest.mark.parametrize(("rows", "size", "each"), [(8, 1, 8), (8, 2, 4), (8, 3, 3), (2, 3, 1), (0, 2, 1)])
def test_rows_of_a_process(rows, size, each):
    assert World(0, size).rows_each(rows) == each


def test_single_process_exchanges_nothing():
    dist = world()
    assert (dist.size, dist.is_first, dist.is_first_on_machine) == (1, True, True)
    value = object()  # which cannot be pickled by value
    assert dist.gather(lambda: value)[0] is value
    assert dist.broadcast(lambda: value) is value
    assert dist.map(lambda things: [2 * x for x in things], [3, 4, 5], [1, 1, 1]) == [6, 8, 10]
    assert in_first_process(lambda x: x)(value) is value
    assert dist.agree(None) is None
    error = DataError("data.no_rows", "no rows")
    assert dist.agree(error) is error
    assert not is_exchanged(error)
    with joined() as alone:
        assert alone is dist


def test_error_raised_from_an_exchanged_one_is_exchanged():
    exchanged = ValueError("of another process")
    exchanged._distillm_exchanged = True
    wrapped = DataError("data.no_rows", "no rows")
    wrapped.__cause__ = exchanged
    assert is_exchanged(wrapped)
    raised_meanwhile = KeyError("not in the other processes")
    raised_meanwhile.__context__ = exchanged
    assert not is_exchanged(raised_meanwhile)
