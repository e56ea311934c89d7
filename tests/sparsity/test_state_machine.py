"""Everything that happens to a sparse network in training, in any order."""

import copy
import io

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn
from torch.nn.utils import clip_grad_norm_

from lightning_ddst.sparsity import DISTRIBUTIONS, MaskedNetwork, MaskEnforcer, allocate

LAYERS, TOTAL = 4, 240
SPECTRAL = {"parametrization": nn.utils.parametrizations.spectral_norm, "hook": nn.utils.spectral_norm}


class Drifting(torch.optim.Optimizer):
    """Moves every weight and writes into all of its state, whatever the gradients are."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            drift = state.setdefault("drift", torch.zeros_like(parameter))
            drift.add_(0.01)
            parameter.sub_(drift).sub_(parameter.grad, alpha=0.01)


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.9),
    "drifting": Drifting,
}
SETTINGS = st.fixed_dictionaries(
    {
        "scope": st.sampled_from(["global", "layer"]),
        "growth": st.sampled_from(["gradient", "random", "momentum"]),
        "distribution": st.sampled_from(sorted(DISTRIBUTIONS)),
        "initial": st.sampled_from(["random", "magnitude"]),
        "layer_floor": st.sampled_from([0.25, 0.05, 1.0]),
    }
)
COUNTS = st.integers(LAYERS, TOTAL).map(lambda count: count / TOTAL)
DENSITIES = COUNTS | st.floats(LAYERS / TOTAL, 1.0)
RATES = st.floats(0.05, 1.0) | st.just(0.0)
SEEDS = st.integers(0, 2**16)


def network(spectral):
    """Images of 4x4 to 3 numbers; weights of 72, 48, 24 and 96 entries."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        SPECTRAL[spectral](nn.Conv2d(4, 3, 2, stride=2)),
        nn.Tanh(),
        nn.ConvTranspose2d(3, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def backward(net, seed):
    generator = torch.Generator().manual_seed(seed)
    images, targets = torch.randn(4, 2, 4, 4, generator=generator), torch.randn(4, 3, generator=generator)
    (net(images) - targets).tanh().pow(2).sum(1).mean().backward()


class Training:
    """A sparse network, what trains it and what keeps it sparse; drawn, or as it was saved."""

    def __init__(self, spectral, optimizer, options, density, seed, saved=None):
        self.made_of = (spectral, optimizer, options)
        torch.manual_seed(seed)
        self.network = network(spectral)
        self.optimizer = OPTIMIZERS[optimizer](self.network.parameters())
        if saved is not None:
            self.network.load_state_dict(saved["network"])
            self.optimizer.load_state_dict(saved["optimizer"])
        state = saved and saved["sparse"]
        self.sparse = MaskedNetwork(self.network, density, seed=seed, state=state, **options)
        self.gradients = MaskEnforcer(self.sparse, [self.optimizer]).gradients
        if saved is not None:
            self.gradients.load_state_dict(saved["gradients"])
            for name, grad in saved["grads"].items():
                self.network.get_parameter(name).grad = grad

    def state(self):
        kinds = ("network", "optimizer", "sparse", "gradients")
        return {**{kind: getattr(self, kind).state_dict() for kind in kinds}, "grads": self.grads()}

    def checkpoint(self):
        file = io.BytesIO()
        torch.save(self.state(), file)
        return file.getvalue()

    def restored(self, checkpoint, seed):
        """A new one, of other weights before it loads."""
        return Training(*self.made_of, density=0.5, seed=seed, saved=read(checkpoint))

    def grads(self):
        return {name: p.grad.clone() for name, p in self.network.named_parameters() if p.grad is not None}

    def everything(self):
        return copied(flat({"saved": self.state(), "counts": self.sparse.layer_counts}))

    def update(self, seed):
        self.optimizer.zero_grad()
        backward(self.network, seed)
        self.optimizer.step()

    def weight_state(self):
        """Weight-shaped optimizer state by kind and the weight's name."""
        return {
            (kind, name): value
            for name, parameter in self.sparse.parameters.items()
            for kind, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape
        }


def read(checkpoint):
    return torch.load(io.BytesIO(checkpoint), weights_only=True)


def flat(value, path=()):
    """The leaves of a nested state by their paths."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {place: leaf for key, part in items for place, leaf in flat(part, (*path, key)).items()}
    return {path: value}


def copied(leaves):
    return {path: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for path, leaf in leaves.items()}


def differing(one, other):
    """Paths at which two flat states are not bit for bit the same."""
    return [
        path
        for path in one.keys() | other.keys()
        if path not in one
        or path not in other
        or type(one[path]) is not type(other[path])
        or not (
            torch.equal(one[path], other[path]) if isinstance(one[path], torch.Tensor) else one[path] == other[path]
        )
    ]


class SparseTraining(RuleBasedStateMachine):
    """Also models the dense gradients, by the gradients of an unmasked twin."""

    def __init__(self, optimizer):
        super().__init__()
        self.kind = optimizer

    @initialize(
        spectral=st.sampled_from(sorted(SPECTRAL)),
        options=SETTINGS,
        density=DENSITIES | st.just(1.0),
        seed=SEEDS,
    )
    def begin(self, spectral, options, density, seed):
        self.options = options
        self.training = Training(spectral, self.kind, options, density, seed)
        self.twin = network(spectral)
        self.plain = OPTIMIZERS[self.kind](self.twin.parameters())
        self.target = density
        self.arrived = {}  # dense gradients of the update that is under way
        self.kept = {}  # and what is there for growth
        self.changed = False  # whether gradients were, since the last pass
        self.passes = 0  # since the last step
        self.saved = None
        if options["initial"] == "random" or options["scope"] == "layer":
            assert self.sparse.layer_counts == self.allocation(density)

    @property
    def sparse(self):
        return self.training.sparse

    # ---- updates ---------------------------------------------------------------------------------------

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        self.training.optimizer.zero_grad(set_to_none)
        self.arrived = {}

    # Only between updates, as the package does it.
    @precondition(lambda self: not self.passes)
    @rule(recording=st.booleans())
    def record(self, recording):
        self.training.gradients.recording = recording

    @rule(seed=SEEDS)
    def accumulate(self, seed):
        """A backward pass; without `zero_grad` it adds to what is there."""
        self.twin.load_state_dict(self.training.network.state_dict())
        self.twin.zero_grad()
        before = self.training.grads()
        for net in (self.twin, self.training.network):
            backward(net, seed)
        twins = {name: parameter.grad for name, parameter in self.twin.named_parameters()}
        for name, grad in self.training.grads().items():
            expected = twins[name] + before[name] if name in before else twins[name]
            mask = self.sparse.masks.get(name, torch.tensor(True))
            torch.testing.assert_close(grad, expected.masked_fill(~mask, 0))
        self.passes += 1
        if self.training.gradients.needed:
            for name in self.sparse.masks:
                # All 0 after a change is not told from cleared.
                adds = name in self.arrived and (before[name].any() or not self.changed)
                self.arrived[name] = twins[name].clone() + (self.arrived[name] if adds else 0)
            self.changed = False

    @precondition(lambda self: self.passes)
    @rule(largest=st.floats(0.01, 1.0))
    def clip(self, largest):
        norm = torch.cat([grad.flatten() for grad in self.training.grads().values()] or [torch.zeros(1)]).norm()
        assert torch.allclose(clip_grad_norm_(self.training.network.parameters(), largest), norm)
        self.changed = True

    # Not right after gradients were cleared: dense ones of before that would be kept.
    @precondition(lambda self: self.passes and any(grad.any() for grad in self.training.grads().values()))
    @rule()
    def step(self):
        self.twin.load_state_dict(self.training.network.state_dict())
        for name, grad in self.training.grads().items():
            self.twin.get_parameter(name).grad = grad
        self.plain.load_state_dict(copy.deepcopy(self.training.optimizer.state_dict()))
        for optimizer in (self.plain, self.training.optimizer):
            optimizer.step()
        # A plain step, masked: of weights and their state, not of biases and norms.
        for name, parameter in self.training.network.named_parameters():
            plain = self.twin.get_parameter(name)
            mask = self.sparse.masks.get(name, torch.tensor(True))
            assert torch.equal(parameter, plain.masked_fill(~mask, 0)), name
            state = self.training.optimizer.state[parameter]
            assert state.keys() == self.plain.state[plain].keys()
            for kind, value in self.plain.state[plain].items():
                expected = value.masked_fill(~mask, 0) if value.shape == plain.shape else value
                assert torch.equal(state[kind], expected), (name, kind)
        averages = self.options["growth"] == "momentum"
        for name, gradient in self.arrived.items():
            kept = self.kept.get(name, gradient)
            self.kept[name] = 0.9 * kept + 0.1 * gradient if averages else gradient
        self.arrived, self.passes = {}, 0

    @rule(seed=SEEDS, passes=st.integers(1, 2), set_to_none=st.booleans(), largest=st.none() | st.floats(0.01, 1.0))
    def update(self, seed, passes, set_to_none, largest):
        self.zero_grad(set_to_none)
        for number in range(passes):
            self.accumulate(seed + number)
        if largest is not None:
            self.clip(largest)
        self.step()

    # ---- changes of the masks ----------------------------------------------------------------------------

    def take(self, seed):
        """Dense gradients as they are or, with a seed, of an update for this purpose."""
        if seed is not None:
            self.zero_grad(True)
            self.training.gradients.recording = True
            self.accumulate(seed)
            self.step()
        taken = self.training.gradients.pop()
        if self.options["growth"] == "random":
            assert taken == {}
        else:
            assert (taken or {}).keys() == self.kept.keys()
        if self.options["growth"] == "gradient":
            self.kept = {}
        return taken

    @rule(rate=RATES, seed=st.none() | SEEDS)
    def explore(self, rate, seed):
        gradients = self.take(seed)
        number, pools = 0, self.pools()
        prunable = {name: self.sparse.layer_counts[name] - floor for name, floor in self.floors().items()}
        for pool in pools:
            active = sum(self.sparse.layer_counts[name] for name in pool)
            size = sum(self.sparse.masks[name].numel() for name in pool)
            number += min(int(rate * active + 1e-9), size - active, sum(prunable[name] for name in pool))
        if number and gradients is None:
            self.refused("explore", rate)
            return
        counts = self.sparse.layer_counts
        grown, again = self.change(lambda: self.sparse.explore(rate, gradients), gradients, number)
        assert grown <= number <= grown + again
        assert self.sparse.active == sum(counts.values())
        if self.options["scope"] == "layer":
            assert self.sparse.layer_counts == counts

    @rule(density=DENSITIES, seed=st.none() | SEEDS)
    def resize(self, density, seed):
        gradients = self.take(seed)
        before, goal = self.sparse.active, round(density * TOTAL)
        if goal > before and gradients is None:
            self.refused("resize", density)
            return
        masks = {name: mask.clone() for name, mask in self.sparse.masks.items()}
        counts, expected = self.sparse.layer_counts, self.allocation(density)
        grown, _ = self.change(lambda: self.sparse.resize(density, gradients), gradients, abs(goal - before), density)
        self.target = density
        assert grown == max(0, goal - before)
        assert self.sparse.active == goal
        for name, mask in self.sparse.masks.items():
            assert not ((masks[name] & ~mask) if goal >= before else (mask & ~masks[name])).any()
        if self.options["scope"] == "layer" and all((expected[n] - counts[n]) * (goal - before) >= 0 for n in counts):
            assert goal == before or self.sparse.layer_counts == expected

    @rule(
        call=st.sampled_from(
            [("resize", (LAYERS - 1) / TOTAL), ("resize", 0.0), ("resize", 1.01), ("explore", -0.1), ("explore", 1.1)]
        )
    )
    def ask_too_much(self, call):
        self.refused(*call, message="density=|rate=")

    def refused(self, change, value, message="gradients must hold"):
        before = self.training.everything()
        with pytest.raises(ValueError, match=message):
            getattr(self.sparse, change)(value)
        assert differing(self.training.everything(), before) == []

    def pools(self):
        names = list(self.sparse.masks)
        return [names] if self.options["scope"] == "global" else [[name] for name in names]

    def allocation(self, density):
        shapes = [weight.shape for weight in self.sparse.parameters.values()]
        return dict(zip(self.sparse.masks, allocate(shapes, density, self.options["distribution"]), strict=True))

    def floors(self, density=None):
        """Returns the weights that pruning leaves in each layer."""
        counts = self.sparse.layer_counts
        if self.options["scope"] == "layer":
            return dict.fromkeys(counts, 1)
        shares = self.allocation(self.sparse.density if density is None else density)
        share = self.options["layer_floor"]
        return {name: min(count, max(1, int(share * shares[name]))) for name, count in counts.items()}

    def change(self, act, gradients, number, density=None):
        """Looks at what a change of `number` weights does; returns how many grew for sure, and how many may have."""
        state, floors = self.training.weight_state(), self.floors(density)
        before = copy.deepcopy((self.sparse.parameters, self.sparse.masks, state, self.training.grads()))
        untouched = self.untouched()
        result = act()
        assert result in (number, None)
        assert differing(self.untouched(), untouched) == []
        weights, masks, state, grads = before
        parameters, sure, unsure = self.sparse.parameters, {}, 0
        for name, now in self.sparse.masks.items():
            was, old, new = masks[name], weights[name].detach(), parameters[name].detach()
            stayed = was & now & (old != 0) & (new == old)
            gone = was & (old != 0) & ~stayed  # and it may have come again, from 0
            grown = sure[name] = now & ~stayed & (~was | gone)
            unclear = now & was & (old == 0)
            unsure += int(unclear.sum())
            assert torch.equal(stayed | grown | unclear, now)
            assert not new[grown].any()
            assert int(gone.sum()) <= number
            if gone.any() and stayed.any():
                assert old[gone].abs().max() <= old[stayed].abs().min()
            assert self.sparse.layer_counts[name] >= floors[name]
            values = self.training.weight_state()
            for (kind, owner), value in state.items():
                if owner == name:
                    assert torch.equal(values[kind, name][stayed], value[stayed])
                    assert not values[kind, name][grown].any()
            if name in grads:
                assert torch.equal(parameters[name].grad[stayed], grads[name][stayed])
                assert not parameters[name].grad[grown].any()
        if gradients:
            for pool in self.pools():
                best = [gradients[name][sure[name]].abs() for name in pool]
                rest = [gradients[name][~self.sparse.masks[name]].abs() for name in pool]
                if (best := torch.cat(best)).numel() and (rest := torch.cat(rest)).numel():
                    assert best.min() >= rest.max()
        for weight in self.sparse.weights.values():
            for spectral in weight.spectral if number else ():
                matrix = weight.parameter.detach().flatten(1)
                u, v = spectral.vectors()
                largest = torch.linalg.matrix_norm(matrix, 2)
                assert u @ matrix @ v == pytest.approx(largest.item(), rel=1e-4)
                assert [u.norm().item(), v.norm().item()] == pytest.approx([1.0, 1.0], rel=1e-4)
        return sum(int(grown.sum()) for grown in sure.values()), unsure

    def untouched(self):
        """Checks what no change of the masks may change."""
        masked, shaped = self.sparse.masks.keys(), self.training.weight_state().values()
        values = self.training.network.state_dict().items()
        others = {name: value for name, value in values if name not in masked and not name.endswith(("_u", "_v"))}
        state = [
            v for s in self.training.optimizer.state.values() for v in s.values() if all(v is not w for w in shaped)
        ]
        grads = {name: grad for name, grad in self.training.grads().items() if name not in masked}
        return copied(flat({"values": others, "state": state, "grads": grads}))

    # ---- saving ------------------------------------------------------------------------------------------

    @rule()
    def save(self):
        model = copy.deepcopy((self.kept, self.arrived, self.passes))
        self.saved = self.training.checkpoint(), self.sparse.layer_counts, model

    @precondition(lambda self: self.saved)
    @rule(seed=SEEDS)
    def load(self, seed):
        """Goes back to what was saved, whatever happened since."""
        checkpoint, counts, model = self.saved
        self.training, saved = self.training.restored(checkpoint, seed), read(checkpoint)
        assert differing(self.training.everything(), flat({"saved": saved, "counts": counts})) == []
        self.kept, self.arrived, self.passes = copy.deepcopy(model)
        self.target, self.changed = saved["sparse"]["target"], True

    @rule(seed=SEEDS, rate=RATES, density=DENSITIES, goes_on=st.booleans())
    def resume(self, seed, rate, density, goes_on):
        """A restored copy goes the same way as the original, bit for bit."""
        other = self.training.restored(self.training.checkpoint(), seed + 1)
        assert differing(other.everything(), self.training.everything()) == []
        grads = self.training.grads()
        if any(name in grads and not grads[name].any() for name in self.arrived):
            for training in (self.training, other):
                training.optimizer.zero_grad()  # the copy does not tell these from cleared
            self.arrived = {}
        self.accumulate(seed)  # to what waits for a step
        self.step()
        backward(other.network, seed)
        other.optimizer.step()
        assert differing(other.everything(), self.training.everything()) == []
        other.gradients.recording = True
        for change, value in (("explore", rate), ("resize", density)):
            getattr(self, change)(value, seed)
            other.update(seed)
            getattr(other.sparse, change)(value, other.gradients.pop())
            assert differing(other.everything(), self.training.everything()) == []
        self.update(seed, passes=1, set_to_none=True, largest=None)
        other.update(seed)
        assert differing(other.everything(), self.training.everything()) == []
        if goes_on:
            self.training = other

    # ---- what holds at any time --------------------------------------------------------------------------

    @invariant()
    def counts_are_exact(self):
        counts = {name: int(mask.sum()) for name, mask in self.sparse.masks.items()}
        assert self.sparse.layer_counts == counts
        assert min(counts.values()) >= 1
        assert self.sparse.total == TOTAL
        assert self.sparse.target == self.target
        assert self.sparse.active == sum(counts.values()) == round(self.target * TOTAL)
        assert self.sparse.density == self.sparse.active / TOTAL
        assert abs(self.sparse.density - self.target) <= 0.5 / TOTAL + 1e-9

    @invariant()
    def weights_are_masked_and_nothing_else(self):
        weights = {name: p for name, p in self.training.network.named_parameters() if p.dim() > 1}
        assert weights.keys() == self.sparse.masks.keys()
        for name, weight in weights.items():
            mask = self.sparse.masks[name]
            assert weight is self.sparse.parameters[name]
            assert mask.dtype == torch.bool
            assert mask.shape == weight.shape
            assert not weight[~mask].any()
            assert weight.grad is None or not weight.grad[~mask].any()
        for (kind, name), value in self.training.weight_state().items():
            assert not value[~self.sparse.masks[name]].any(), kind

    @invariant()
    def all_is_finite(self):
        for path, value in {**flat(self.training.network.state_dict()), **self.training.grads()}.items():
            assert value.isfinite().all(), path
        for state in self.training.optimizer.state.values():
            assert all(value.isfinite().all() for value in state.values() if isinstance(value, torch.Tensor))

    @invariant()
    def dense_gradients_are_those_of_the_twin(self):
        torch.testing.assert_close(self.training.gradients.state_dict()["kept"], self.kept, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sparse_training_in_any_order(optimizer):
    run_state_machine_as_test(
        lambda: SparseTraining(optimizer), settings=settings(max_examples=5, stateful_step_count=20, deadline=None)
    )
