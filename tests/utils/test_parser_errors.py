"""Messages of jsonargparse; tests/test_mistakes.py has those of the whole command."""

import pytest

from lightning_ddst.utils.parser_errors import explain

UNION = """Parser key "a.b":
  Does not validate against any of the Union subtypes
  Subtypes: [tuple[float, float], typing.Literal['one', 'two'], <class 'bool'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'float'>. Got value: x
    - Expected a typing.Literal['one', 'two']
    - Expected a <class 'bool'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'list'>
  Given value: ['x', 'y']"""


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a message\n  of an unknown\nform", "a message of an unknown form"),
        (UNION, "--a.b=['x', 'y'] must be [a number, a number], 'one', 'two', true, false or null."),
        ("unrecognized arguments: --ab.d 3 --x", "--ab.d=3 is not an argument; --help shows all. Did you mean --ab.c?"),
        ("unrecognized arguments: --c 'open", "--c='open is not an argument; --help shows all. Did you mean --ab.c?"),
        (
            "the following arguments are required: fit.data, fit.model",
            "data and model are missing; --help shows all arguments.",
        ),
        (
            "argument --form: invalid choice: 'pgn' (choose from png, svg)",  # as of Python 3.12
            "--form=pgn is unknown; allowed are png, svg. Did you mean 'png'?",
        ),
    ],
)
def test_messages_become_one_line(message, line):
    assert explain(message, ["ab.c", "other"]) == line


def test_a_long_value_is_cut():
    line = explain(f"Parser key \"a\":\n  Expected a <class 'int'>. Got value: {'x' * 200}", [])
    assert line == f"--a={'x' * 80}... must be an integer."
