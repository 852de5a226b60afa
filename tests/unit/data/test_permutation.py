import numpy as np
import pytest

from minicpm.data.permutation import key_of, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
def test_every_place_is_taken_once(size: int) -> None:
    for key in (0, 1, key_of(7, "code", 3)):
        assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_one_place_equals_the_same_place_of_all() -> None:
    everything = permute(np.arange(1000), 1000, 12345)
    assert [int(permute(np.array([i]), 1000, 12345)[0]) for i in (0, 1, 500, 999)] == everything[
        [0, 1, 500, 999]
    ].tolist()


def test_order_depends_on_the_key_and_is_scrambled() -> None:
    one, other = permute(np.arange(5000), 5000, 1), permute(np.arange(5000), 5000, 2)
    assert (one == other).mean() < 0.01
    assert (one == np.arange(5000)).mean() < 0.01
    # A scrambled order has no trend: the rank correlation with the identity is that of chance (σ = 1/√n = 0.014).
    assert abs(np.corrcoef(one, np.arange(5000))[0, 1]) < 0.07
    assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.07


def test_large_sizes_stay_inside() -> None:
    size = (1 << 40) + 7
    places = permute(np.array([0, 1, size - 1]), size, 3)
    assert len(set(places.tolist())) == 3
    assert (places >= 0).all()
    assert (places < size).all()


def test_order_is_fixed_for_good() -> None:
    # A resumed run on another machine or a later version must see the same order.
    assert key_of(1234, "code", 0) == 12116003000164254779
    assert permute(np.arange(10), 10, 99).tolist() == [5, 8, 7, 0, 4, 1, 2, 3, 9, 6]
    assert permute(np.arange(3), 1000, 99).tolist() == [371, 288, 344]
    assert key_of(1, "2") != key_of("1", 2)
