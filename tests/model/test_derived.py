"""DoRA's norm is computed once a step, and is never a stale one."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import weft
from support import awake, check_close, config, reference_paths, set_way
from weft.model import fallback
from weft.ops import cache

METHODS = ["DoRA", "DVoRA"]


@pytest.fixture(autouse=True, params=["native", "fused", "tiny"])
def way(request, monkeypatch):
    """The three ways keep norms differently; the tiny one keeps none, and must be right all the same."""
    set_way(monkeypatch, request.param)
    return request.param


def true_output(a):
    """What the adapter's tensors and the base say now, without anything that was kept."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        reference_paths(patch, "1")
        found = a.run()
    fallback.refresh()
    return found


def fresh(a, what):
    check_close(a.run().detach(), true_output(a), torch.float32, what)


def sites(a):
    return list(a.adapter.sites.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 8])
def test_one_norm_a_layer_and_step_whatever_the_micro_batches_and_recomputations(
    method, accumulation, way
):
    if way == "tiny":
        pytest.skip("the tiny way computes the norm with the weight, which it builds anyway")
    a = awake(method)
    optimiser = torch.optim.AdamW(a.adapter.parameters(), lr=1e-3)
    cache.counts.clear()
    for _ in range(3):
        for _ in range(accumulation):
            checkpoint(a.model, a.x, use_reentrant=False).pow(2).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert cache.counts["norm"] <= 3 * len(sites(a))  # the first was there already, from `awake`
    assert cache.counts["norm"] >= 2 * len(sites(a))


def optimiser_that_hides(a):
    class Hidden(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.mul_(1.5)

    Hidden(a.adapter.parameters()).step()


def scale_tensors(a, how):
    for p in a.adapter.parameters():
        how(p)


def in_place(a):
    with torch.no_grad():
        scale_tensors(a, lambda p: p.mul_(1.5))


def through_data(a):
    scale_tensors(a, lambda p: p.data.mul_(1.5))


def preserving_the_version(a):
    for p in a.adapter.parameters():
        with torch.autograd._unsafe_preserve_version_counter(p), torch.no_grad():
            p.mul_(1.5)


def through_numpy(a):
    scale_tensors(a, lambda p: p.detach().numpy().__imul__(1.5))


def load_state_dict(a):
    a.model.load_state_dict({k: v * 1.5 for k, v in a.model.state_dict().items()})


def new_data(a):
    for p in a.adapter.parameters():
        p.data = p.data * 1.5


def base_in_place(a):
    with torch.no_grad():
        a.model.layer.weight.mul_(2)
        a.model.mid.weight.add_(0.5)


def base_through_data(a):
    a.model.layer.weight.data.mul_(2)
    a.model.mid.weight.data.add_(0.5)


def one_number(a):
    """The smallest change that a norm can see."""
    for site in sites(a):
        name = "B" if hasattr(site, "B") else "b"
        getattr(site, name).data.view(-1)[-1].add_(3.0)


def replaced_base(a):
    a.model.layer.weight = torch.nn.Parameter(a.model.layer.weight * 2, requires_grad=False)


def inference_mode(a):
    with torch.inference_mode():
        a.run()
    in_place(a)


def there_and_back(a):
    a.model.double()
    a.run  # noqa: B018
    a.model.float()
    in_place(a)


CHANGES = [
    optimiser_that_hides,
    in_place,
    through_data,
    preserving_the_version,
    through_numpy,
    load_state_dict,
    new_data,
    base_in_place,
    base_through_data,
    one_number,
    replaced_base,
    inference_mode,
    there_and_back,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_no_way_to_change_a_tensor_leaves_a_stale_norm(method, change):
    a = awake(method)
    before = a.run().detach()
    fresh(a, "before")
    change(a)
    assert not torch.allclose(before, true_output(a), rtol=1e-3)
    fresh(a, change.__name__)


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles_have_norms_of_their_own(method):
    a = awake(method)
    a.run()
    for twin in (copy.deepcopy(a.model), pickle.loads(pickle.dumps(a.model))):  # noqa: S301
        assert all(
            not len(site.cache) for site in (twin.layer.weft["default"], twin.mid.weft["default"])
        )
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.5)
        found = twin(a.x)
        a.model.load_state_dict(twin.state_dict())
        check_close(found.detach(), true_output(a), torch.float32)
        fresh(a, "the original")
        a = awake(method)


@pytest.mark.parametrize("method", METHODS)
def test_a_norm_made_without_gradients_or_in_inference_mode_serves_training(method):
    a = awake(method)
    for site in sites(a):
        site.cache.clear()
    with torch.inference_mode():
        a.run()
    a.run().pow(2).sum().backward()
    assert all(p.grad is not None for p in a.adapter.parameters())


def test_a_norm_of_training_has_the_bits_that_it_has_without_an_evaluation_before():
    """A resumed run has had no evaluation; with 300 rows beside it, W A' rounds in another way than
    with three.
    """
    torch.manual_seed(0)
    model = torch.nn.Linear(2048, 768, bias=False)
    adapter = weft.attach(torch.nn.Sequential(model), weft.DoRA(r=16, targets=["0"]))
    torch.nn.init.normal_(dict(adapter.named_parameters())["0.B"], std=2.0)
    x = torch.randn(300, 2048)
    site = next(iter(adapter.sites.values()))
    adapter.model.train()
    alone = adapter.model(x)
    site.cache.clear()
    adapter.model.eval()
    adapter.model(x[:3])
    adapter.model.train()
    assert torch.equal(adapter.model(x), alone)


def test_two_adapters_and_the_base_do_not_share_norms():
    a = awake("DoRA")
    weft.attach(a.model, config("DoRA", r=2), name="second")
    with torch.no_grad():
        for p in a.model.layer.weft["second"].parameters():
            p.add_(0.3)
    for name in ("default", "second", "default"):
        with weft.use(a.model, name):
            fresh(a, name)


def test_the_answer_is_fresh_after_merge_and_unmerge():
    a = awake("DoRA")
    before = a.run().detach()
    weft.merge(a.model)
    weft.unmerge(a.model)
    assert torch.equal(a.run().detach(), before)
    fresh(a, "after unmerge")


def test_the_reference_keeps_nothing(monkeypatch):
    a = awake("DoRA")
    reference_paths(monkeypatch, "1")
    cache.counts.clear()
    for _ in range(3):
        a.run()
    assert not cache.counts


def test_a_wrong_value_of_the_variable_is_named(monkeypatch):
    a = awake("LoRA")
    monkeypatch.setenv("WEFT_REFERENCE", "yes")
    with pytest.raises(weft.ConfigError, match="WEFT_REFERENCE='yes'"):
        weft.use(a.model, "default")
