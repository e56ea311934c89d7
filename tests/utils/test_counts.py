import pytest

from lightning_ddst.utils.counts import describe_times


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 times"), (1, "once"), (2, "twice"), (3, "3 times"), (1200, "1,200 times")]
)
def test_numbers_of_times_in_words(count: int, words: str) -> None:
    assert describe_times(count) == words
