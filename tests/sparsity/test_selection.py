import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_ddst.sparsity import largest, select

INF = float("inf")


def first_by_stable_sort(scores, k):
    """The definition: sorted from large to small, equal ones in their order, the first k."""
    flat = scores.reshape(-1)
    marks = torch.zeros(flat.numel(), dtype=torch.bool)
    marks[flat.sort(descending=True, stable=True).indices[:k]] = True
    return marks.view(scores.shape)


# ---- one tensor ------------------------------------------------------------------------------------


def test_the_largest_are_marked_in_their_shape():
    marks = largest(torch.tensor([[3.0, -1.0, 2.0], [7.0, 0.0, -5.0]]), 3)
    assert marks.tolist() == [[True, False, True], [True, False, False]]
    assert marks.dtype == torch.bool


def test_of_equal_scores_at_the_threshold_the_lowest_flat_index_is_taken():
    # 9 and 5 are above the threshold 2, which stands at 1, 2 and 5; one of them is left to take.
    marks = largest(torch.tensor([[1.0, 2.0, 2.0], [9.0, 5.0, 2.0]]), 3)
    assert marks.tolist() == [[False, True, False], [True, True, False]]


@pytest.mark.parametrize("value", [0.0, -3.5, 1e30, -INF])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_of_all_equal_scores_exactly_the_first_k_are_marked(value, k):
    assert largest(torch.full((2, 3), value), k).flatten().tolist() == [True] * k + [False] * (6 - k)


def test_zeros_of_either_sign_are_equal():
    assert largest(torch.tensor([-0.0, 0.0, -0.0, 0.0]), 2).tolist() == [True, True, False, False]


def test_none_and_all():
    scores = torch.tensor([[1.0, 2.0], [3.0, -INF]])
    assert not largest(scores, 0).any()
    assert largest(scores, 4).all()
    assert largest(torch.empty(0), 0).shape == (0,)


def test_minus_infinity_is_marked_only_when_nothing_else_is_left():
    scores = torch.tensor([-INF, 1.0, -INF, -1e30])
    assert largest(scores, 2).tolist() == [False, True, False, True]
    assert largest(scores, 3).tolist() == [True, True, False, True]


@pytest.mark.parametrize("k", [-1, 7])
def test_more_than_all_or_less_than_none_is_rejected(k):
    with pytest.raises(ValueError, match=rf"k={k} must be between 0 and the number of scores, 6"):
        largest(torch.zeros(2, 3), k)


def test_scores_are_not_changed_and_may_be_a_view():
    scores = torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]).t()  # rows 1 2 3 and 4 5 6, stored by columns
    before = scores.clone()
    assert largest(scores, 2).tolist() == [[False, False, False], [False, True, True]]
    assert torch.equal(scores, before)


@pytest.mark.parametrize("k", range(7))
def test_ties_in_a_view_go_by_its_own_flat_index_not_by_its_memory(k):
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]).t()  # rows 0 1 0 and 1 0 0, stored by columns
    assert torch.equal(largest(scores, k), first_by_stable_sort(scores.contiguous(), k))


def test_half_precision_scores_are_chosen_exactly():
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)  # with many ties
    assert torch.equal(largest(scores, 100), first_by_stable_sort(scores, 100))


@settings(deadline=None)
@given(st.lists(st.sampled_from([-INF, -2.0, -0.0, 0.0, 0.5, 3.0]), min_size=1, max_size=40), st.data())
def test_marks_equal_those_of_a_stable_sort(values, data):
    k = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values)
    assert torch.equal(largest(scores, k), first_by_stable_sort(scores, k))


# ---- one large tensor, of which only a part is sorted -----------------------------------------------

SIZE = 2**18 + 1003  # every 4th is sampled
_PLACES = torch.arange(SIZE)


def _normal():
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0))


def _few(places):
    scores = torch.zeros(SIZE)
    scores[places] = torch.arange(1.0, len(places) + 1)
    return scores


LARGE = {
    "random": _normal(),
    "sorted up": _normal().sort().values,
    "sorted down": _normal().sort(descending=True).values,
    "all equal": torch.full((SIZE,), 2.5),
    "zero but a few": _few(torch.arange(0, SIZE, 5000)),
    "zero but a few that are not sampled": _few(torch.arange(1, SIZE, 5000) // 4 * 4 + 1),
    "large only where sampled": _normal() + 10.0 * (_PLACES % 4 == 0),
    "large only where not sampled": _normal() + 10.0 * (_PLACES % 4 != 0),
    "four values": _normal().mul(2).round().clamp(-1, 2),
    "mostly not eligible": torch.where(_PLACES % 7 == 3, _normal(), -INF),
    "nearly nothing eligible": torch.where(_PLACES % 50_000 == 3, _normal(), -INF),
}


@pytest.mark.parametrize("name", LARGE)
def test_marks_in_a_large_tensor_equal_those_of_a_stable_sort(name):
    scores = LARGE[name]
    order = scores.sort(descending=True, stable=True).indices
    for k in (1, 6, 53, 1000, SIZE // 10, SIZE // 2, SIZE - 2, SIZE):
        expected = torch.zeros(SIZE, dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(largest(scores, k), expected), k


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("limit", [SIZE, 10])
def test_choice_over_large_layers_equals_a_stable_sort(name, limit):
    layers = [part.clone() for part in LARGE[name].split([1000, 150_000, SIZE - 151_000])]
    # Those of -inf are not eligible; the first layer gives at most the limit.
    eligible = [layer > -INF for layer in layers]
    scores = [torch.where(allowed, layer, 1e9) for layer, allowed in zip(layers, eligible, strict=True)]
    numbers = [int(allowed.sum()) for allowed in eligible]
    limits = [min(limit, numbers[0]), *numbers[1:]]
    for k in (5, 1000, SIZE // 10):
        if k > sum(limits):
            continue
        chosen, counts = select(scores, eligible, k, limits)
        assert counts == [int(marks.sum()) for marks in chosen]
        marks = torch.cat(chosen)
        expected = first_by_stable_sort(torch.cat(layers), k)
        if expected[:1000].sum() > limit:
            first = first_by_stable_sort(layers[0], limit)
            expected = torch.cat([first, first_by_stable_sort(torch.cat(layers[1:]), k - limit)])
        assert torch.equal(marks, expected), k


# ---- several layers ----------------------------------------------------------------------------------


def tensors(*rows, dtype=torch.float32):
    return [torch.tensor(row, dtype=dtype) for row in rows]


def lists(selection):
    marks, counts = selection
    assert counts == [int(layer.sum()) for layer in marks]
    return [layer.int().tolist() for layer in marks]


def test_layers_compete_and_only_eligible_weights_are_marked():
    scores = tensors([[9.0, 1.0], [5.0, 4.0]], [8.0, 3.0, 6.0])
    eligible = tensors([[0, 1], [1, 1]], [0, 1, 1], dtype=torch.bool)
    # Without the ineligible 9 and 8 the largest three are 6, 5 and 4.
    assert lists(select(scores, eligible, 3, [3, 2])) == [[[0, 0], [1, 1]], [0, 0, 1]]


def test_a_layer_gives_no_more_than_its_limit_and_the_others_make_up_for_it():
    scores = tensors([9.0, 8.0, 7.0], [3.0, 2.0], [1.0, 0.0])
    eligible = [torch.ones(len(score), dtype=torch.bool) for score in scores]
    assert lists(select(scores, eligible, 3, [3, 2, 2])) == [[1, 1, 1], [0, 0], [0, 0]]
    assert lists(select(scores, eligible, 3, [1, 2, 2])) == [[1, 0, 0], [1, 1], [0, 0]]
    # The first layer's limit sends two to the second, whose limit sends one of them to the third.
    assert lists(select(scores, eligible, 3, [1, 1, 2])) == [[1, 0, 0], [1, 0], [1, 0]]
    assert lists(select(scores, eligible, 3, [0, 2, 2])) == [[0, 0, 0], [1, 1], [1, 0]]


def test_ties_go_to_the_first_layer_and_then_to_the_lowest_flat_index():
    scores = tensors([[0.0, 0.0]], [0.0, 0.0, 0.0])
    eligible = tensors([[0, 1]], [1, 1, 1], dtype=torch.bool)
    assert lists(select(scores, eligible, 3, [1, 3])) == [[[0, 1]], [1, 1, 0]]


def test_marking_none_and_every_eligible_weight():
    scores = tensors([1.0, 2.0, 3.0], [4.0, 5.0])
    eligible = tensors([1, 0, 1], [0, 1], dtype=torch.bool)
    assert lists(select(scores, eligible, 0, [2, 1])) == [[0, 0, 0], [0, 0]]
    assert lists(select(scores, eligible, 3, [2, 1])) == [[1, 0, 1], [0, 1]]


def test_a_key_is_compared_instead_of_the_scores():
    scores = tensors([-5.0, 1.0, 2.0], [3.0, -4.0])
    eligible = tensors([1, 1, 1], [1, 1], dtype=torch.bool)
    assert lists(select(scores, eligible, 2, [3, 2])) == [[0, 0, 1], [1, 0]]
    assert lists(select(scores, eligible, 2, [3, 2], torch.abs)) == [[1, 0, 0], [0, 1]]


@pytest.mark.parametrize("limit", [2 * SIZE, 1000])
@pytest.mark.parametrize("start", [0, 3])
def test_a_key_is_compared_in_large_layers_and_views_too(start, limit):
    values, allowed = torch.randn(2 * SIZE), torch.rand(2 * SIZE) < 0.3
    scores, eligible = [values[start:]], [allowed[start:]]
    (marks,), (count,) = select(scores, eligible, limit // 20, [limit], torch.abs)
    magnitudes = torch.where(eligible[0], scores[0].abs(), -INF)
    assert torch.equal(marks, first_by_stable_sort(magnitudes, limit // 20))
    assert count == limit // 20


@pytest.mark.parametrize("k", [-1, 3])
def test_more_than_the_limits_allow_is_rejected(k):
    scores = tensors([1.0, 2.0, 3.0], [4.0, 5.0])
    eligible = [torch.ones(len(score), dtype=torch.bool) for score in scores]
    with pytest.raises(ValueError, match=rf"cannot choose k={k} weights: between 0 and 2 are available"):
        select(scores, eligible, k, [1, 1])


@settings(deadline=None)
@given(st.data())
def test_choice_over_layers_equals_taking_one_after_the_other_in_sorted_order(data):
    layers = data.draw(
        st.lists(
            st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.booleans()), min_size=1, max_size=8),
            min_size=1,
            max_size=5,
        )
    )
    limits = [data.draw(st.integers(0, sum(allowed for _, allowed in layer))) for layer in layers]
    k = data.draw(st.integers(0, sum(limits)))

    expected = [[0] * len(layer) for layer in layers]
    in_order = sorted(
        (-score, i, j) for i, layer in enumerate(layers) for j, (score, allowed) in enumerate(layer) if allowed
    )
    for _, i, j in in_order:
        if sum(map(sum, expected)) < k and sum(expected[i]) < limits[i]:
            expected[i][j] = 1

    scores = [torch.tensor([score for score, _ in layer]) for layer in layers]
    eligible = [torch.tensor([allowed for _, allowed in layer]) for layer in layers]
    assert lists(select(scores, eligible, k, limits)) == expected


@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
@pytest.mark.parametrize("allowed", [0.4, 0.6, 0.9])
def test_a_sample_spares_sorting_most_scores_however_many_are_chosen(share, allowed):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(400_000, generator=generator)
        eligible = torch.rand(400_000, generator=generator) < allowed
        k = int(share * eligible.sum())
        compared = []

        def key(values, compared=compared):
            compared.append(values.numel())
            return values

        (marks,), (count,) = select([scores], [eligible], k, [k], key)
        assert int(marks.sum()) == count == k
        # Once all of them, a sample of up to 2**15, and those near the threshold.
        assert 400_000 < sum(compared) < 1.1 * 400_000 + 2**15
