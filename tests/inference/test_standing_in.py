"""A packed model stands in for the model it came from: shared layers, hooks, dtypes, pickling."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import making
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from robuq_bench.config import Plan, load_plan
from robuq_bench.errors import CheckpointError, ConfigError, UsageError
from robuq_bench.inference import PackedLinear, export_packed, load_packed, pack_
from robuq_bench.inference import prepare_for_inference as prepare
from robuq_bench.inference.packed_linear import packed_layers
from robuq_bench.inference.random_weights import pack_random_
from robuq_bench.models.dit import DiT
from robuq_bench.quantization.convert import quantize_
from robuq_bench.quantization.linear import QuantizedLinear
from robuq_bench.quantization.module_tree import exchange_layers, names_of

Student = Callable[..., tuple[DiT, Plan]]
PLAN = load_plan("a4")


class Shared(nn.Module):
    """One linear layer and one norm under two names each, and two tables that are one tensor."""

    def __init__(self, share: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 32)
        self.inner = nn.Sequential(self.first if share else nn.Linear(32, 32), nn.GELU())
        self.norm = nn.LayerNorm(32)
        self.last_norm = self.norm
        self.table = nn.Embedding(5, 32)
        self.head = nn.Embedding(5, 32)
        if share:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x) + self.table.weight.sum(0))
        return self.last_norm(self.inner(x)) @ self.head.weight.T


def quantized(model: nn.Module, **changes: Any) -> nn.Module:
    """Every linear layer quantized under all its names, with its hooks."""
    settings = {"rank": 4, **changes}
    layers: dict[nn.Module, nn.Module] = {
        linear: making.quantized(linear, names[0], **settings)
        for linear, names in names_of(model, nn.Linear).items()
    }
    return exchange_layers(model.eval(), layers)


@torch.no_grad()
def test_a_shared_layer_stays_one_layer_from_packing_to_loading(tmp_path: Path) -> None:
    model, x = quantized(Shared()), torch.randn(3, 32)
    expected = model(x)
    assert pack_(model) is model
    assert isinstance(model.first, PackedLinear)
    assert model.inner[0] is model.first
    assert torch.equal(model(x), expected)
    path = tmp_path / "m.safetensors"
    rows = {row["part"]: row["bytes"] for row in export_packed(model, path, plan=PLAN)}
    assert rows["ternary codes"] == -(-32 * 32 // 5)
    assert rows["rest"] == 4 * (32 + 32 + 5 * 32)
    loaded, facts = load_packed(path, into=Shared())
    assert loaded.inner[0] is loaded.first
    assert loaded.last_norm is loaded.norm
    assert loaded.head.weight is loaded.table.weight
    assert loaded.table.weight.requires_grad
    assert torch.equal(loaded(x), expected)
    assert list(facts["bits_by_layer"]) == ["first"]
    with pytest.raises(CheckpointError, match=r"\['first', 'inner\.0'\] are one layer in the file"):
        load_packed(path, into=Shared(share=False))


@pytest.mark.parametrize("make", [Shared, lambda: nn.Linear(32, 32)])
@torch.no_grad()
def test_a_plan_packs_and_loads_what_is_shared_or_a_layer_itself(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model, x = quantize_(make(), PLAN).eval(), torch.randn(3, 32)
    expected = model(x)
    packed = pack_(model)
    export_packed(packed, tmp_path / "m.safetensors", plan=PLAN)
    loaded, _ = load_packed(tmp_path / "m.safetensors", into=make())
    for found in (packed, loaded):
        assert torch.equal(found(x), expected)
        assert len(packed_layers(found)) == 1
        assert not names_of(found, nn.Linear)


def test_an_instance_that_shares_more_than_the_file_is_refused_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    export_packed(pack_(quantized(Shared(share=False))), path, plan=PLAN)
    into = Shared()
    with pytest.raises(CheckpointError, match=r"\['first'\] are one layer in the file"):
        load_packed(path, into=into)
    into.inner = nn.Sequential(nn.Linear(32, 32), nn.GELU())
    with pytest.raises(CheckpointError, match=r"'head\.weight' and 'table\.weight' are one tensor"):
        load_packed(path, into=into)
    assert type(into.first) is nn.Linear
    load_packed(path, into=Shared(share=False))


@torch.no_grad()
def test_a_model_that_is_a_layer_is_returned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 8), torch.randn(2, 12)
    layer = quantized(linear)
    expected = layer(x)
    packed = pack_(layer)
    assert isinstance(packed, PackedLinear)
    assert list(packed_layers(packed)) == [""]
    path = tmp_path / "m.safetensors"
    export_packed(packed, path, plan=PLAN)
    loaded, _ = load_packed(path, into=nn.Linear(12, 8))
    prepared = prepare(quantized(linear), "reference")
    for model in (packed, loaded, prepared):
        assert torch.equal(model(x), expected)
    assert isinstance(pack_random_(nn.Linear(16, 16), PLAN), PackedLinear)


def test_hooks_go_over_to_the_packed_layer(tmp_path: Path) -> None:
    calls: list[str] = []
    model = Shared()
    model.first.register_forward_hook(lambda *_: calls.append("forward"))
    handle = model.first.register_forward_pre_hook(lambda *_: calls.append("pre"))
    quantized_model = quantized(Shared())
    for layer in names_of(quantized_model, QuantizedLinear):
        layer.register_forward_hook(lambda *_: calls.append("quantized"))
    path = tmp_path / "m.safetensors"
    export_packed(pack_(quantized_model), path, plan=PLAN)
    quantized_model(torch.zeros(1, 32))
    assert calls == ["quantized"] * 2
    calls.clear()
    load_packed(path, into=model)
    model(torch.zeros(1, 32))
    assert calls == ["pre", "forward"] * 2
    handle.remove()
    calls.clear()
    model(torch.zeros(1, 32))
    assert calls == ["forward"] * 2


def test_fused_blocks_refuse_hooks_they_would_drop(student: Student) -> None:
    model, _ = student("a8")
    model.blocks[1].attn.proj.register_forward_hook(lambda *_: None)
    with pytest.raises(UsageError, match=r"blocks\.1\.attn\.proj has a hook"):
        prepare(model, "integer")
    assert isinstance(model.blocks[1].attn.proj, QuantizedLinear), "nothing was changed"
    prepare(model, "integer", fuse=False)
    other, _ = student("a8")
    calls: list[int] = []
    other.blocks.register_forward_hook(lambda *_: calls.append(1))
    prepare(other, "integer")(torch.zeros(1, 1, 8, 8), torch.tensor([1]), torch.tensor([1]))
    assert calls == [1]
    with pytest.raises(UsageError, match="export the model before prepare_for_inference"):
        export_packed(other, Path("never"), plan=PLAN)


@pytest.mark.parametrize("part", ["master_weight", "bias", "branch.up"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_not_packed(part: str, value: float) -> None:
    model = quantized(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    with torch.no_grad():
        dict(model.named_parameters())[f"1.{part}"].view(-1)[3] = value
    with pytest.raises(UsageError, match=rf"'{part}' of layer '1' has NaN or infinite values"):
        pack_(model)
    assert all(isinstance(layer, QuantizedLinear) for layer in model), "nothing was changed"


def test_what_is_not_packed_yet_is_not_exported(tmp_path: Path) -> None:
    model = quantized(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    model[0] = pack_(nn.Sequential(model[0]))[0]
    with pytest.raises(UsageError, match="layer '1' is quantized but not packed; call pack_"):
        export_packed(model, tmp_path / "m.safetensors", plan=PLAN)


def test_what_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    class Masked(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(16, 16), nn.LayerNorm(16))
            self.register_buffer("mask", torch.tensor([[0.0, float("-inf")], [0.0, 0.0]]))

    path = tmp_path / "m.safetensors"
    model = pack_(quantized(Masked()))
    for storage in ("base3/fp32/fp32", "base3/fp16/fp16", "base3/int8/int8"):
        export_packed(model, path, plan=PLAN, storage=storage)
        loaded, _ = load_packed(path, into=Masked())
        assert torch.equal(loaded.get_buffer("mask"), model.get_buffer("mask"))
    path.unlink()
    for name in ("1.weight", "mask"):
        broken = copy.deepcopy(model)
        broken.state_dict()[name].view(-1)[1] = float("nan")
        with pytest.raises(UsageError, match=f"^{name} has NaN or infinite values"):
            export_packed(broken, path, plan=PLAN)
    broken = copy.deepcopy(model)
    broken[0].scale[2] = float("inf")
    with pytest.raises(UsageError, match=r"^0\.scale has NaN or infinite values"):
        export_packed(broken, path, plan=PLAN)
    assert not path.exists()


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 0, "rotation": "hadamard", "weight": "ternary-absmean"},
        {"rotation": "none", "activation": ("robust-midtread", None)},
    ],
)
@torch.no_grad()
def test_every_dtype_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = (nn.Linear(48, 36), nn.GELU(), nn.Linear(36, 48, bias=False), nn.LayerNorm(48))
        return nn.Sequential(*layers).to(dtype)

    model, x = quantized(make(), **changes), torch.randn(5, 48, dtype=dtype)
    expected = model(x)
    assert expected.dtype == dtype
    packed, path = pack_(model), tmp_path / "m.safetensors"
    export_packed(packed, path, plan=PLAN)
    loaded, _ = load_packed(path, into=make())
    for found in (packed(x), loaded(x), prepare(loaded, "reference")(x)):
        assert found.dtype == dtype
        assert torch.equal(found, expected)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    for name, value in packed.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype, name
        assert torch.equal(loaded.state_dict()[name], value), name
    # Another input dtype gives what the quantized layer gives.
    layer = quantized(make(), **changes)[0]
    for other in DTYPES:
        tokens = x.to(other)
        result = packed[0](tokens)
        assert result.dtype == layer(tokens).dtype
        assert torch.equal(result, layer(tokens))


def test_parameters_say_dtype_and_device() -> None:
    for dtype in DTYPES:
        packed = pack_(quantized(nn.Linear(16, 16, bias=False).to(dtype), rank=0))
        assert next(packed.parameters()).dtype == dtype
        assert not any(parameter.requires_grad for parameter in packed.parameters())
        cast = copy.deepcopy(packed).to(torch.bfloat16)
        assert next(cast.parameters()).dtype == torch.bfloat16
        assert cast.scale.dtype == packed.scale.dtype
        assert next(packed.to("meta").parameters()).device.type == "meta"
        assert packed.to_empty(device="cpu").scale.dtype == cast.scale.dtype


def test_the_state_dict_holds_what_it_held() -> None:
    packed = pack_(quantized(nn.Linear(16, 24)))
    names = {"planes", "scale", "weight_sums", "bias", "branch.up", "branch.down"}
    assert packed.state_dict().keys() == names | {"rotation.signs", "activation_bits"}
    packed.activation_bits = 3
    other = pack_(quantized(nn.Linear(16, 24)))
    other.load_state_dict(packed.state_dict())
    x = torch.randn(2, 16)
    assert torch.equal(other(x), packed(x))
    # And under the names of before slots.
    old_names = {"branch.up": "low_rank_up", "branch.down": "low_rank_down"}
    old_names["rotation.signs"] = "signs"
    state = {name: 2 * value for name, value in packed.state_dict().items()}
    other.load_state_dict({old_names.get(name, name): value for name, value in state.items()})
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name
    with pytest.raises(RuntimeError, match=r"Missing.*scale"):
        other.load_state_dict({k: v for k, v in packed.state_dict().items() if k != "scale"})


def test_whole_numbers_and_odd_names_of_a_model_are_kept(tmp_path: Path) -> None:
    """int8 buffers, and buffers called what the parts of packed layers are called."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(16, 16)
            self.odd = nn.Module()
            for name in ("codes", "scale", "signs", "int8_scale", "bias"):
                self.odd.register_buffer(name, torch.randn(2, 3))
            self.odd.register_buffer("table", torch.randint(-9, 9, (4, 5), dtype=torch.int8))
            self.odd.register_buffer("vector", torch.arange(3, dtype=torch.int8))
            self.odd.register_buffer("count", torch.tensor(7))
            self.odd.register_buffer("flags", torch.tensor([True, False]))
            self.odd.register_buffer("float8", torch.ones(3).to(torch.float8_e4m3fn))
            self.odd.register_buffer("nothing", torch.zeros(0, 4))

    model, path = pack_(quantized(Odd())), tmp_path / "m.safetensors"
    for storage in ("base3/fp32/fp32", "2bit/int8/int8"):
        export_packed(model, path, plan=PLAN, storage=storage)
        loaded, _ = load_packed(path, into=Odd())
        for name, value in model.odd.state_dict().items():
            found = loaded.odd.get_buffer(name)
            assert found.dtype == value.dtype
            if "int8" not in storage or not value.is_floating_point():
                assert torch.equal(found, value), name
    model.odd.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(UsageError, match=r"odd\.phase is torch\.complex64"):
        export_packed(model, path, plan=PLAN)


def test_extra_state_is_refused_by_name(tmp_path: Path) -> None:
    class Extra(nn.Sequential):
        def get_extra_state(self) -> dict[str, int]:
            return {"epoch": 3}

    model = pack_(quantized(Extra(nn.Linear(16, 16))))
    with pytest.raises(UsageError, match="_extra_state is a dict, a packed file holds tensors"):
        export_packed(model, tmp_path / "m.safetensors", plan=PLAN)


@pytest.mark.parametrize("stage", ["teacher", "quantized", "packed", "integer"])
@torch.no_grad()
def test_models_pickle_and_copy(
    stage: str, teacher: DiT, student: Student, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    attention = PLAN.attention.model_copy(update={"matmul_bits": 8})
    model: nn.Module = teacher
    if stage != "teacher":
        model, _ = student(PLAN.model_copy(update={"attention": attention}))
    if stage in ("packed", "integer"):
        model = prepare(model, "integer" if stage == "integer" else "reference")
    expected = model(*inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(twin(*inputs), expected)


@torch.no_grad()
def test_a_layer_that_cannot_run_leaves_the_model_quantized() -> None:
    layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model = quantized(layers, activation="lloyd-max")
    with pytest.raises(UsageError, match="'lloyd-max' has levels"):
        prepare(model, "integer")
    assert all(isinstance(layer, QuantizedLinear) for layer in model)


@torch.no_grad()
def test_wan_reads_the_dtype_of_a_packed_embedder(tmp_path: Path) -> None:
    from robuq_bench._compat import import_torchvision

    import_torchvision()
    from diffusers import WanTransformer3DModel

    def make() -> nn.Module:
        torch.manual_seed(0)
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4,
            out_channels=4, text_dim=24, freq_dim=64, ffn_dim=64, num_layers=1,
            rope_max_seq_len=32,
        ).eval()  # fmt: skip

    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "timestep": torch.tensor([3]),
    }
    # Every linear, those of the embedders among them, whatever a plan would skip.
    model = quantized(make())
    expected = model(**inputs).sample
    path = tmp_path / "m.safetensors"
    export_packed(pack_(model), path, plan=PLAN)
    assert torch.equal(model(**inputs).sample, expected)
    assert torch.equal(load_packed(path, into=make())[0](**inputs).sample, expected)


def test_reading_a_packed_weight_tells_its_kind_and_refuses_arithmetic() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0, batch_first=True)
    quantize_(layer, load_plan("a4")).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        quantized = layer(x)
        pack_(layer)
        assert torch.equal(layer(x), quantized)  # PyTorch's fast path would read the weights
    weight = layer.linear1.weight
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == (
        (64, 32),
        torch.float32,
        "cpu",
    )
    with pytest.raises(UsageError, match="layer 'linear1' is quantized"):
        weight @ weight.T


@pytest.mark.parametrize("bits", [True, 0, 99, 2.5])
def test_bits_of_a_packed_layer_are_checked(bits: Any) -> None:
    packed = pack_(quantized(nn.Sequential(nn.Linear(16, 24))))
    with pytest.raises(ConfigError, match="layer '0'"):
        packed[0].activation_bits = bits


def test_a_packed_layer_compiles_once_for_all_bits() -> None:
    packed = pack_(quantized(nn.Sequential(nn.Linear(16, 24)))).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed, fullgraph=True, backend=counter)
    x = torch.randn(5, 16)
    with torch.no_grad():
        for bits in range(1, 9):
            packed[0].activation_bits = bits
            torch.testing.assert_close(compiled(x), packed(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


class Offset(nn.Module):
    """A linear layer and a buffer that no state holds, such as a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)
        self.register_buffer("table", torch.randn(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x + self.table)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_outside_the_state_take_the_dtype_of_the_file(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path, model = tmp_path / "m.safetensors", pack_(quantized(Offset().to(dtype)))
    export_packed(model, path, plan=PLAN)
    loaded, _ = load_packed(path, into=Offset())
    x = torch.randn(3, 16).to(dtype)
    assert torch.equal(loaded(x), model(x))


def test_a_file_of_a_wrapped_model_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    wrapped = nn.ModuleDict({"module": nn.Sequential(nn.Linear(16, 16))})
    export_packed(pack_(quantized(wrapped)), path, plan=PLAN)
    with pytest.raises(CheckpointError, match=r"'module\.0'; a wrapper calls it '0' there"):
        load_packed(path, into=nn.Sequential(nn.Linear(16, 16)))


def test_the_plan_of_a_file_is_that_of_its_layers(tmp_path: Path) -> None:
    model = pack_(quantized(nn.Sequential(nn.Linear(16, 16))))
    with pytest.raises(UsageError, match="layer '0' quantizes activations by 'robust-midtread'"):
        export_packed(model, tmp_path / "m.safetensors", plan=load_plan("bitnetv2-a4"))
