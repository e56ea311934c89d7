import pytest

from lightning_ddst.utils.registry import Registry


def test_what_is_registered_is_found_by_its_name():
    rules = Registry("rule")

    @rules.register("first")
    def first():
        return 1

    assert rules.find("growth", "first") is first
    assert list(rules) == ["first"]


def test_an_unknown_name_is_rejected_with_the_nearest_one():
    rules = Registry("rule")
    rules.register("gradient")(len)
    rules.register("random")(sum)
    with pytest.raises(ValueError, match=r"growth='gradinet' .*gradient, random\. Did you mean"):
        rules.find("growth", "gradinet")
    with pytest.raises(ValueError, match=r"growth='x' is unknown; allowed are gradient, random\.$"):
        rules.find("growth", "x")


def test_a_name_is_taken_once_but_a_definition_may_be_repeated():
    rules = Registry("rule")

    def define():
        @rules.register("mine")
        def mine():
            return 1

        return mine

    define()
    again = define()
    assert rules["mine"] is again
    with pytest.raises(ValueError, match="rule 'mine' is registered already, by "):
        rules.register("mine")(len)
    assert rules["mine"] is again


def test_a_decorator_without_parentheses_is_rejected():
    rules = Registry("rule")
    with pytest.raises(TypeError, match="the name of a rule must be text"):

        @rules.register
        def mine():
            return 1
