"""Boxes: cutting and putting together is plain indexing, and a partition is one that holds each element once."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaflow.parallel import boxes

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def any_box(draw, shape: tuple[int, ...]) -> boxes.Box:
    ends = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    return tuple((start, stop) for start, stop in ends)


@st.composite
def partition(draw, shape: tuple[int, ...]) -> list[boxes.Box]:
    """The whole, cut in two again and again, in any order."""
    held = [boxes.full(shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = held.pop(draw(st.integers(0, len(held) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        start, stop = box[axis]
        cut = draw(st.integers(start, stop))
        held += [(*box[:axis], (start, cut), *box[axis + 1 :]), (*box[:axis], (cut, stop), *box[axis + 1 :])]
    return draw(st.permutations(held))


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


@given(st.data())
def test_any_box_is_put_together_from_any_partition(data):
    shape = data.draw(SHAPES)
    asked, held, whole = data.draw(any_box(shape)), data.draw(partition(shape)), numbered(shape)
    found = np.full(boxes.shape_of(asked), -1)
    for box in held:
        if (common := boxes.meet(asked, box)) is not None:
            piece = whole[boxes.slices(box)]
            found[boxes.slices(boxes.within(common, asked))] = piece[boxes.slices(boxes.within(common, box))]
    assert (found == whole[boxes.slices(asked)]).all()


@given(st.data())
def test_what_two_boxes_have_in_common(data):
    shape = data.draw(SHAPES)
    one, other, whole = data.draw(any_box(shape)), data.draw(any_box(shape)), numbered(shape)
    common = boxes.meet(one, other)
    expected = np.intersect1d(whole[boxes.slices(one)], whole[boxes.slices(other)])
    assert (expected.size == 0) if common is None else (whole[boxes.slices(common)].ravel() == expected).all()


@given(st.data())
def test_boxes_are_a_partition_exactly_where_each_element_is_held_once(data):
    shape = data.draw(SHAPES)
    held = data.draw(partition(shape) | st.lists(any_box(shape), max_size=4))
    counts = np.zeros(shape, int)
    for box in held:
        counts[boxes.slices(box)] += 1
    problem = boxes.fault(shape, held)
    assert (problem is None) == bool((counts == 1).all())
    if problem is not None:
        assert ("missing" in problem) == bool((counts <= 1).all())


@given(st.data())
def test_a_gap_and_an_overlap_are_found(data):
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4).map(tuple))
    held = data.draw(partition(shape))
    filled = data.draw(st.sampled_from([box for box in held if boxes.volume(box)]))
    held.remove(filled)
    assert f"{boxes.volume(filled)} of its {math.prod(shape)} elements are missing" == boxes.fault(shape, held)
    assert ("overlap" if shape else "twice") in boxes.fault(shape, [*held, filled, filled])


@pytest.mark.parametrize("box", [((0, 3),), ((0, 2), (0, 4)), ((-1, 2), (0, 3)), ((2, 1), (0, 3)), ()])
def test_a_box_beyond_the_tensor_is_refused(box):
    assert boxes.fault((2, 3), [box]) == f"{box} does not lie in it"


@given(st.data())
def test_a_range_of_the_elements_is_a_few_boxes_in_order(data):
    shape = data.draw(SHAPES)
    count = math.prod(shape)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count))))
    found = boxes.flat(shape, start, stop)
    elements = [numbered(shape)[boxes.slices(box)].ravel() for box in found]
    assert np.concatenate([*elements, []]).tolist() == list(range(start, stop))
    assert len(found) <= max(2 * len(shape) - 1, 1)


@given(st.data())
def test_runs_follow_the_tensor_s_order(data):
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4).map(tuple))
    box = data.draw(any_box(shape))
    firsts, length = boxes.runs(shape, box)
    found = (firsts[:, None] + np.arange(length)).ravel()
    assert found.tolist() == numbered(shape)[boxes.slices(box)].ravel().tolist()


def test_rows_that_lie_together_are_one_run():
    assert boxes.runs((8, 4, 3), ((2, 5), (0, 4), (0, 3)))[1] == 36
    firsts, length = boxes.runs((8, 4, 3), ((2, 5), (1, 3), (0, 3)))
    assert (firsts.tolist(), length) == ([27, 39, 51], 6)


def test_a_process_s_rows_of_a_fused_matrix_find_their_logical_places():
    """Queries, keys and values of 4 heads, 2 rows each; the second of two processes holds the last two heads of each: 12 rows."""
    own = [((4 * part, 4 * part + 4), (0, 3)) for part in range(3)]
    logical = [((8 * part + 4, 8 * part + 8), (0, 3)) for part in range(3)]
    held = ((2, 6), (0, 3))  # what ZeRO leaves it of those
    moved = [
        boxes.moved(common, source, target) for source, target in zip(own, logical, strict=True) if (common := boxes.meet(held, source))
    ]
    assert moved == [((6, 8), (0, 3)), ((12, 14), (0, 3))]
