import lightning.pytorch
import pytest
import pytorch_lightning

from lightning_ddst.utils.lightning_packages import is_a, package_of

PACKAGES = [lightning.pytorch, pytorch_lightning]


class Timer:
    """Another class of the same name."""


@pytest.mark.parametrize("package", PACKAGES)
def test_an_object_of_either_package_is_known_by_its_class_and_its_base_classes(package):
    stopping = package.callbacks.EarlyStopping("loss")
    assert is_a(stopping, "EarlyStopping")
    assert is_a(stopping, "Callback")
    assert not is_a(stopping, "Timer")
    assert package_of(stopping) is package


@pytest.mark.parametrize("package", PACKAGES)
def test_a_subclass_of_a_user_is_known(package):
    assert is_a(type("Mine", (package.callbacks.Timer,), {})(), "Timer")


def test_a_class_of_another_package_is_not_lightnings():
    assert not is_a(Timer(), "Timer")
    with pytest.raises(
        TypeError, match=r"^Timer must be an instance of a class in lightning\.pytorch or pytorch_lightning"
    ):
        package_of(Timer())
