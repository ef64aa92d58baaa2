"""What `observe` keeps of layers' inputs, against NumPy on inputs captured by plain wrappers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from robuq_bench._compat import import_torchvision
from robuq_bench.errors import UsageError
from robuq_bench.methods.site import Site
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.blocks import blocks_in_order
from robuq_bench.quantization.observing import Observed, memory_bytes, observe
from robuq_bench.quantization.watching import calls_of

ALL = ("tokens", "absmax", "mean", "gram")
WIDTH = 6


class Net(nn.Module):
    """Tokens through `first`, `shared` twice and `last`; never through `unused`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(WIDTH, 2)
        self.unused = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "shared", "drop", "shared", "last"):
            x = getattr(self, name)(x)
        return x


def samples(count: int = 12, tokens: int = 5) -> Tensor:
    return torch.randn(count, tokens, WIDTH, generator=torch.Generator().manual_seed(count))


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[np.ndarray]]]:
    """Inputs by layer, taken by replacing `forward` of the modules: no hook is involved."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    modules = dict(model.named_modules())

    def replaced(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *rest: Any, **others: Any) -> Any:
            found[name].append(x.detach().double().numpy().reshape(-1, x.shape[-1]))
            return forward(x, *rest, **others)

        return call

    for name in names:
        modules[name].forward = replaced(name, modules[name].forward)  # type: ignore[method-assign]
    try:
        yield found
    finally:
        for name in names:
            del modules[name].forward


def check_against_numpy(site: Site, inputs: list[np.ndarray]) -> None:
    rows = np.concatenate(inputs)
    assert site.count == len(rows)
    np.testing.assert_array_equal(site.need("absmax").numpy(), np.abs(rows).max(0))
    np.testing.assert_allclose(site.need("mean").numpy(), rows.mean(0), rtol=1e-9, atol=1e-12)
    gram = site.need("gram")
    assert gram.dtype == torch.float64
    np.testing.assert_allclose(gram.numpy(), rows.T @ rows, rtol=1e-12, atol=1e-12 * len(rows))
    # Every token is one that was seen, and none is there more often than it was.
    seen = Counter(map(bytes, rows.astype(np.float32)))
    kept = Counter(map(bytes, site.need("tokens").numpy()))
    assert site.need("tokens").dtype == torch.float32
    assert kept <= seen


def same(one: Site, other: Site, rtol: float = 0) -> bool:
    torch.testing.assert_close(one.gram, other.gram, rtol=rtol, atol=rtol)
    torch.testing.assert_close(one.mean, other.mean, rtol=rtol, atol=rtol)
    torch.testing.assert_close(one.tokens, other.tokens, rtol=0, atol=0)
    torch.testing.assert_close(one.absmax, other.absmax, rtol=0, atol=0)
    return (one.name, one.seed, one.count) == (other.name, other.seed, other.count)


def toy_case() -> tuple[nn.Module, list[str], list[Any]]:
    return Net(), ["first", "shared", "last"], list(samples().split(4))


def dit_case() -> tuple[nn.Module, list[str], list[Any]]:
    torch.manual_seed(0)
    sizes = {"input_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
    model = DiT(**sizes, num_classes=3, learn_sigma=False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    batches = [(torch.randn(3, 1, 4, 4), torch.tensor([1, 50, 900]), torch.arange(3))] * 2
    names = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    return model, names, batches


def diffusers_case() -> tuple[nn.Module, list[str], list[Any]]:
    import_torchvision()
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2}
    model = DiTTransformer2DModel(**sizes, sample_size=8, num_embeds_ada_norm=10)
    inputs = {"timestep": torch.tensor([3, 700]), "class_labels": torch.tensor([0, 3])}
    batches = [{"hidden_states": torch.randn(2, 4, 8, 8), **inputs} for _ in range(2)]
    names = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    return model, [name for name in names if "transformer_blocks" in name], batches


CASES = [toy_case, dit_case, diffusers_case]


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_inputs(case: Callable[[], Any]) -> None:
    model, names, batches = case()
    with captured(model.eval(), names) as inputs, torch.no_grad():
        for batch in batches:
            if isinstance(batch, dict):
                model(**batch)
            else:
                model(*(batch if isinstance(batch, tuple) else (batch,)))
    observed = observe(model, names, batches, ALL, tokens_per_layer=7)
    assert list(observed) == names
    assert observed.by_group == {}
    for name in names:
        check_against_numpy(observed[name], inputs[name])
        assert len(observed[name].need("tokens")) == min(7, observed[name].count)
        assert observed[name].name == name


def test_only_what_is_needed_is_kept() -> None:
    model, names, batches = toy_case()
    for needs in ((), ("tokens",), ("absmax",), ("gram",)):
        site = observe(model, names, batches, needs)["shared"]
        assert [what for what in ALL if getattr(site, what) is not None] == list(needs)
        assert site.count == 2 * 12 * 5


IDENTITY = nn.Linear(WIDTH, WIDTH)


class Through(nn.Module):
    """`layer` sees the batch itself, `times` times over."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = IDENTITY, times

    def forward(self, x: Tensor) -> None:
        for time in range(self.times):
            self.layer(x + time)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    others=st.permutations(range(6)),
    labels=st.lists(st.sampled_from("abc"), min_size=6, max_size=6),
    tokens=st.integers(1, 40),
    times=st.integers(1, 3),
)
def test_neither_batches_nor_groups_change_what_is_kept(
    sizes: list[int], others: list[int], labels: list[str], tokens: int, times: int
) -> None:
    sizes = [*sizes, 2]  # at least one sample
    x = samples(sum(sizes), 3)
    batches = list(x.split(sizes))
    model = Through(times)

    def run(batches: list[Tensor], groups: list[str] | None = None) -> Observed:
        options: dict[str, Any] = {"tokens_per_layer": tokens, "seed": 4, "groups": groups}
        return observe(model, ["layer"], batches, ALL, **options)

    whole = run([x])["layer"]
    assert same(run(batches)["layer"], whole, rtol=1e-12)
    assert same(run(list(x.split(1)))["layer"], whole, rtol=1e-12)
    # All that belongs to one group is one, in whatever order: none may be empty of samples.
    filled = [batch for batch in batches if len(batch)]
    names = (labels * 2)[: len(filled)]
    grouped = run(filled, names)
    assert same(grouped["layer"], whole, rtol=1e-12)
    assert set(grouped.by_group) == set(names)
    for label, sites in grouped.by_group.items():
        own = torch.cat([b for b, name in zip(filled, names, strict=True) if name == label])
        inputs = [(own + time).double().numpy().reshape(-1, WIDTH) for time in range(times)]
        check_against_numpy(sites["layer"], inputs)
        assert len(sites["layer"].need("tokens")) == min(tokens, times * own.shape[:2].numel())


def test_the_sample_is_uniform_over_all_tokens_and_so_is_its_beginning() -> None:
    """600 tokens numbered by their place; 30 of them, by 400 seeds, in batches of unequal size."""
    x = torch.arange(600.0).view(600, 1).expand(600, WIDTH)
    batches = list(x.split([10, 300, 1, 189, 100]))
    model = Through()
    drawn = [
        observe(model, ["layer"], batches, ["tokens"], tokens_per_layer=30, seed=seed)["layer"]
        for seed in range(400)
    ]
    places = np.stack([site.need("tokens")[:, 0].numpy() for site in drawn])
    assert all(len(set(row)) == 30 for row in places)
    for part in (places, places[:, :5]):
        counts = np.bincount((part.ravel() / 20).astype(int), minlength=30)
        assert stats.chisquare(counts).pvalue > 0.01
    # Later batches are no worse off than the first, which had the room to itself.
    assert abs((places < 10).mean() - 10 / 600) < 4 * np.sqrt(10 / 600 / places.size)


def test_the_sample_depends_on_seed_and_layer_and_on_nothing_else() -> None:
    model, names, batches = toy_case()
    x = batches[0]

    def run(layers: Any, seed: int = 1) -> Observed:
        return observe(model, layers, [x], ALL, tokens_per_layer=6, seed=seed)

    torch.manual_seed(99)
    once = run(names)
    torch.manual_seed(7)
    assert all(same(site, once[name]) for name, site in run(names).items())
    assert same(run(["first"])["first"], once["first"])
    assert not torch.equal(run(names, seed=2)["first"].tokens, once["first"].tokens)
    twice = observe(Through(), {"a": IDENTITY, "b": IDENTITY}, [x], ["tokens"], tokens_per_layer=6)
    assert not torch.equal(twice["a"].need("tokens"), twice["b"].need("tokens"))


@pytest.mark.parametrize("case", CASES)
def test_leaving_the_pass_early_changes_no_statistic(case: Callable[[], Any]) -> None:
    model, names, batches = case()
    calls = calls_of(model, names, batches[0])
    assert set(calls) == set(names)
    for block in ([names[0]], names[1:2], names):
        whole = observe(model, block, batches, ALL, tokens_per_layer=9)
        early = observe(model, block, batches, ALL, tokens_per_layer=9, calls=calls)
        assert all(same(early[name], whole[name]) for name in block)


def test_modules_after_the_last_input_do_not_run() -> None:
    model, names, batches = toy_case()
    assert calls_of(model, names, batches[0]) == ["first", "shared", "shared", "last"]
    calls = calls_of(model, names, batches[0])
    ran = []
    model.last.register_forward_hook(lambda *call: ran.append("last"))
    model.shared.register_forward_hook(lambda *call: ran.append("shared"))
    model.first.register_forward_hook(lambda *call: ran.append("first"))
    observe(model, ["first"], batches, ["absmax"], calls=calls)
    assert ran == []  # an input is seen before its layer runs
    observe(model, ["shared"], batches[:1], ["absmax"], calls=calls)
    assert ran == ["first", "shared"]  # not left at its first call
    del ran[:]
    observe(model, ["first", "shared"], batches[:1], ["absmax"])
    assert ran == ["first", "shared", "shared", "last"]


def test_two_names_of_one_layer_both_see_all_of_it() -> None:
    model = Through(times=2)
    calls = ["a", "b", "a", "b"]
    layers = {"a": IDENTITY, "b": IDENTITY}
    observed = observe(model, layers, [samples()], ALL, calls=calls)
    assert observed["a"].count == observed["b"].count == 2 * 12 * 5
    assert torch.equal(observed["a"].need("gram"), observed["b"].need("gram"))


def test_a_layer_goes_by_any_of_its_names() -> None:
    model = Net()
    model.alias = model.last
    batches = [samples()]
    observed = observe(model, ["alias", "last"], batches, ALL, tokens_per_layer=100)
    assert torch.equal(observed["alias"].need("gram"), observed["last"].need("gram"))
    assert blocks_in_order(model, ["alias", "first"]) == [["first"], ["alias"]]
    assert calls_of(model, ["alias"], batches[0]) == ["alias"]


def test_groups_are_the_batches_of_a_label() -> None:
    """Timestep ranges: the statistics of a range are those of its batches alone."""
    model, names, batches = toy_case()
    observed = observe(
        model, names, batches, ALL, tokens_per_layer=500, groups=["early", "late", "early"]
    )
    assert list(observed.by_group) == ["early", "late"]
    late = observe(model, names, batches[1:2], ALL, tokens_per_layer=500)
    early = observe(model, names, [batches[0], batches[2]], ALL, tokens_per_layer=500)
    for name in names:
        for label, alone in (("early", early[name]), ("late", late[name])):
            site = observed.by_group[label][name]
            torch.testing.assert_close(site.gram, alone.gram, rtol=1e-12, atol=1e-12)
            assert torch.equal(site.need("absmax"), alone.need("absmax"))
            assert site.count == alone.count
            rows = [sorted(each.need("tokens").tolist()) for each in (site, alone)]
            assert rows[0] == rows[1]
        assert observed[name].count == early[name].count + late[name].count


@pytest.mark.parametrize(("labels", "message"), [("ab", "2 labels.*more"), ("abcd", "4 .*only 3")])
def test_labels_must_fit_the_batches(labels: str, message: str) -> None:
    model, names, batches = toy_case()
    with pytest.raises(UsageError, match=message):
        observe(model, names, iter(batches), ALL, groups=labels)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_rank_and_precision(rank: int, dtype: torch.dtype) -> None:
    x = torch.randn(*[2] * (rank - 1), WIDTH, dtype=torch.float32).to(dtype)
    model = nn.Sequential(nn.Linear(WIDTH, 2, dtype=dtype))
    site = observe(model, ["0"], [x], ALL)["0"]
    if dtype != torch.float64:
        check_against_numpy(site, [x.double().numpy().reshape(-1, WIDTH)])
    assert site.count == 2 ** (rank - 1)
    assert {site.need("tokens").dtype, site.need("absmax").dtype} == {torch.float32}


def test_batches_without_samples_count_for_nothing() -> None:
    x = samples()
    model = Through()
    whole = observe(model, ["layer"], [x], ALL)["layer"]
    assert same(observe(model, ["layer"], [x[:0], x, x[:0]], ALL)["layer"], whole)
    with pytest.raises(UsageError, match="'layer' was called, but saw no tokens"):
        observe(model, ["layer"], [x[:0]], ALL)
    with pytest.raises(UsageError, match="'layer' was called in group 1, but saw no tokens"):
        observe(model, ["layer"], [x, x[:0]], ALL, groups=[0, 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("needs", [(), ("tokens",), ALL])
def test_what_is_not_finite_is_named(bad: float, needs: tuple[Any, ...]) -> None:
    x = samples()
    x[3, 1, 2] = bad
    x[3, 1, 3] = bad
    with pytest.raises(UsageError, match=r"layer 'layer': 1 of 60 tokens.*NaN or infinity"):
        observe(Through(), ["layer"], [x], needs)


def test_what_is_no_row_of_floats_is_named() -> None:
    embedding = nn.Sequential(nn.Embedding(4, WIDTH))
    with pytest.raises(UsageError, match=r"'0': expected floats.*int64 \[3\]; leave"):
        observe(embedding, ["0"], [torch.arange(3)], ALL)
    with pytest.raises(UsageError, match="'0': called on no tensor but int"):
        observe(nn.Sequential(nn.Identity()), ["0"], [(3,)], ALL)
    with pytest.raises(UsageError, match=r"'0': expected floats \[..., 6\].*\[2, 5\]"):
        observe(nn.Sequential(nn.Identity()), ["0"], [torch.ones(2, 6), torch.ones(2, 5)], ALL)


def test_layers_that_are_not_there_or_not_called_are_named() -> None:
    model, names, batches = toy_case()
    with pytest.raises(UsageError, match="no layer 'frist' to observe; did you mean 'first'"):
        observe(model, ["frist"], batches, ALL)
    with pytest.raises(UsageError, match="'unused' was not called: "):
        observe(model, [*names, "unused"], batches, ALL)
    with pytest.raises(UsageError, match="'unused' is not among `calls`"):
        observe(model, [*names, "unused"], batches, ALL, calls=names)
    with pytest.raises(UsageError, match="'unused' is not among `calls`"):
        blocks_in_order(model, [*names, "unused"], names)
    choose = nn.ModuleDict({"a": nn.Linear(WIDTH, 2), "b": nn.Linear(WIDTH, 2)})
    batches = [("a", batches[0]), ("b", batches[0])]
    options: dict[str, Any] = {"forward": lambda model, batch: model[batch[0]](batch[1])}
    assert set(observe(choose, ["a", "b"], batches, ALL, **options)) == {"a", "b"}
    with pytest.raises(UsageError, match="layer 'b' was not called in group 0"):
        observe(choose, ["a", "b"], batches, ALL, groups=[0, 1], **options)


def test_what_cannot_be_asked_for() -> None:
    model, names, batches = toy_case()
    with pytest.raises(UsageError, match=r"nothing called 'abs_max'.*did you mean 'absmax'"):
        observe(model, names, batches, ["abs_max"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="tokens_per_layer must be at least 1, got 0"):
        observe(model, names, batches, ALL, tokens_per_layer=0)
    with pytest.raises(UsageError, match="no calibration batches"):
        observe(model, names, [], ALL)
    with pytest.raises(UsageError, match=r"a batch must be .*, got int; give `forward`"):
        observe(model, names, [3], ALL)


class BoomError(RuntimeError):
    pass


@pytest.mark.parametrize("how", ["to the end", "left early", "failing", "failing in a hook"])
def test_the_model_is_left_as_it_was(how: str) -> None:
    model, names, batches = toy_case()
    model.train()
    model.shared.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules()}
    during: list[bool] = []

    def forward(model: nn.Module, x: Tensor) -> None:
        during.extend([model.training, model.drop.training, torch.is_grad_enabled()])
        model(x)
        if how == "failing":
            raise BoomError

    if how == "failing in a hook":
        batches[1][0, 0, 0] = torch.nan
    calls = calls_of(model, names, samples()) if how == "left early" else None
    failures = {"failing": BoomError, "failing in a hook": UsageError}
    if how in failures:
        with pytest.raises(failures[how]):
            observe(model, names, batches, ALL, forward=forward)
    else:
        observe(model, names, batches, ALL, forward=forward, calls=calls)
    assert during
    assert not any(during)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {n: dict(module._forward_pre_hooks) for n, module in model.named_modules()} == hooks
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_hooks_act_before_and_always_called_ones_at_the_end() -> None:
    model, _, batches = toy_case()
    model.first.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    ended: list[bool] = []
    model.register_forward_hook(lambda *call: ended.append(True), always_call=True)
    site = observe(model, ["first"], batches, ALL, calls=["first"])["first"]
    check_against_numpy(site, [(samples() * 2).double().numpy().reshape(-1, WIDTH)])
    assert len(ended) == len(batches)


def test_a_layer_that_is_called_by_keyword() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 2))
    forward = lambda model, x: model[0](input=x)  # noqa: E731
    site = observe(model, ["0"], [samples()], ALL, forward=forward)["0"]
    assert site.count == samples().numel() // WIDTH
    check_against_numpy(site, [samples().double().numpy().reshape(-1, WIDTH)])


def test_a_compiled_model_shows_its_layers() -> None:
    """Its code was made without the hooks, and would run without them."""
    model = Net()
    model.compile(backend="eager")
    model.eval()(samples())
    site = observe(model, ["shared"], [samples()], ALL)["shared"]
    assert site.count == 2 * 12 * 5


def test_progress_and_the_line_about_memory(caplog: pytest.LogCaptureFixture) -> None:
    model, names, batches = toy_case()
    told: list[Any] = []
    caplog.set_level(logging.INFO, logger="robuq_bench.quantization.observing")
    observe(model, names, batches, ALL, on_batch=lambda *call: told.append(call))
    observe(model, names, iter(batches), ALL, on_batch=lambda *call: told.append(call))
    assert told == [(1, 3), (2, 3), (3, 3), (1, None), (2, None), (3, None)]
    size = memory_bytes([WIDTH] * 3, ALL, 4096) / 1e6
    assert f"absmax, gram, mean, tokens of 3 layers in at most {size:.4g} MB" in caplog.text
