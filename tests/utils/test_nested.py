from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_ddst.utils.nested import describe_tensors, find_entries, get_entry, get_first_tensor, tensors_in

ONE, TWO, THREE = torch.tensor(1), torch.tensor(2), torch.tensor(3)
Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Item:
    image: Any
    name: str = "a"


@pytest.mark.parametrize(
    ("value", "places"),
    [
        (ONE, {"": 1}),
        ((ONE, [TWO]), {"0": 1, "1.0": 2}),
        ({"b": ONE, "a": {"c": TWO, 5: THREE}}, {"b": 1, "a.c": 2, "a.5": 3}),
        (OrderedDict(x=None, y="text", z=ONE), {"z": 1}),
        (Pair(ONE, {"t": TWO}), {"0": 1, "1.t": 2}),
        (Item(Item(ONE)), {"image.image": 1}),
        (Item, {}),
        (None, {}),
    ],
)
def test_every_tensor_has_its_place(value, places):
    assert {place: int(tensor) for place, tensor in tensors_in(value)} == places
    for place, number in places.items():
        if place:
            assert get_entry(value, place) == number


def test_places_are_keys_indices_or_paths():
    value = {"a": [ONE, {"b": TWO}], 3: THREE}
    assert get_entry(value, "a.1.b") is TWO
    assert get_entry(value, 3) is get_entry(value, "3") is THREE
    assert get_entry([ONE, TWO], 1) is TWO
    assert get_entry({"a": Pair(ONE, TWO)}, "a.y") is get_entry(Pair(ONE, TWO), 1) is TWO
    assert get_entry({"a": {"b": ONE}, "a.b": TWO}, "a.b") is TWO  # keys may have dots
    assert get_entry([{"x.png": ONE}], "0.x.png") is ONE


def test_indices_may_be_negative_and_asterisks_stand_for_every_entry():
    value = [[ONE, TWO], {"a": (THREE, Pair(ONE, TWO))}]
    assert get_entry(value, "0.-1") is get_entry(value, "-2.1") is TWO
    assert get_entry(value, "-1.a.-1.y") is TWO
    assert get_entry(value, "1.*.0") is THREE  # one entry
    assert [int(entry) for entry in find_entries([*value[:1], [THREE]], "*.*")] == [1, 2, 3]
    assert [int(entry) for entry in find_entries([*value[:1], [THREE]], "*.-1")] == [2, 3]
    assert find_entries(ONE, "") == [ONE]
    with pytest.raises(KeyError):
        find_entries(value, "*.a")  # the first has none


@pytest.mark.parametrize("place", ["b", "a.2", "a.1.b.0", "a.-3", "", 0, "a.*"])
def test_a_place_where_nothing_is_raises(place):
    with pytest.raises(KeyError):
        get_entry({"a": [ONE, {"b": TWO}]}, place)


def test_the_first_tensor():
    assert get_first_tensor({"text": "a", "list": [None, TWO], "last": ONE}) is TWO
    with pytest.raises(TypeError, match="no tensor in what a network returned: dict"):
        get_first_tensor({"text": "a"})


def test_tensors_are_described_with_place_shape_and_type():
    value = {"image": torch.zeros(2, 3), "more": [torch.arange(2), "text"]}
    assert describe_tensors(value) == "image (2, 3) torch.float32, more.0 (2,) torch.int64"
    assert describe_tensors(torch.tensor(1.0)) == "() torch.float32"
    assert describe_tensors("text") == "no tensor"
