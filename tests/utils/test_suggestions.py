import pytest

from lightning_ddst.utils.suggestions import did_you_mean, find_nearest


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("chanel", "channel"), ("GANMODULE", "GANModule"), ("cosin", "cosine"), ("xyz", None), (3, None)],
)
def test_the_nearest_name_is_found_in_either_case(name, nearest):
    assert find_nearest(name, ["weight", "channel", "GANModule", "cosine"]) == nearest


def test_the_question_has_the_prefix_and_is_empty_without_a_similar_name():
    assert did_you_mean("hing", ["hinge"]) == " Did you mean 'hinge'?"
    assert did_you_mean("hing", ["hinge"], "--") == " Did you mean --hinge?"
    assert did_you_mean("xyz", ["hinge"]) == ""
