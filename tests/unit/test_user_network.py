"""`descriptor.module`: a network of the user's environment that describes photos; what it may be and do."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairvpr.config.schema import DescribeConfig, DescriptorConfig, ModelConfig
from pairvpr.errors import UserError
from pairvpr.retrieval.first_stage import FirstStage, UserNetwork
from pairvpr.retrieval.user_network import UserDescriber, find_user_network, fingerprint

Write = Callable[[str], str]
LINEAR = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=5):
        super().__init__()
        self.layer = nn.Linear(3, width)
        self.drop = nn.Dropout(0.9)

    def forward(self, photos):
        return self.drop(self.layer(photos.mean(dim=(2, 3))))

def seeded():
    torch.manual_seed(4)
    return Net()
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a Python module that can be imported, and returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = list[str]()

    def writer(code: str) -> str:
        name = f"users_{tmp_path.name.replace('-', '_')}_{len(made)}"
        made.append(name)
        (tmp_path / f"{name}.py").write_text(dedent(code))
        return name

    yield writer
    for name in made:
        sys.modules.pop(name, None)


def found(module: str, size_px: int = 8, model: ModelConfig | None = None) -> UserNetwork:
    return find_user_network(DescriptorConfig(module=module, image_size_px=size_px), model or ModelConfig())


def test_rows_are_those_of_the_network_on_normalised_photos_and_of_unit_length(write: Write) -> None:
    """Pixels are scaled, less the mean, divided by the deviation; dropout is off."""
    module = f"{write(LINEAR)}:seeded"
    config = DescriptorConfig(module=module, image_size_px=6, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 2.0])
    about = find_user_network(config, ModelConfig())
    assert (about.width, about.module) == (5, module)
    pixels = np.random.default_rng(1).integers(256, size=(3, 6, 6, 3), dtype=np.uint8)
    rows = UserDescriber.built(about, torch.device("cpu"), 1).descriptors(pixels)

    torch.manual_seed(4)
    layer = torch.nn.Linear(3, 5)
    photos = (pixels / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 2.0])
    plain = photos.mean(axis=(1, 2)) @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    np.testing.assert_allclose(rows, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-5)
    assert rows.dtype == np.float32


def test_a_network_is_known_by_its_state_dict_and_settings(write: Write) -> None:
    """The fingerprint is that of names, formats, shapes and bytes; function, photos and width are settings."""
    module = f"{write(LINEAR)}:seeded"
    about = found(module)
    torch.manual_seed(4)
    layer, digest = torch.nn.Linear(3, 5), hashlib.sha256()
    for name, value in (("layer.bias", layer.bias), ("layer.weight", layer.weight)):
        digest.update(f"{name} torch.float32 {tuple(value.shape)}\n".encode() + value.detach().numpy().tobytes())
    assert about.weights_sha256 == digest.hexdigest()

    first = FirstStage.of_user_network(about, DescribeConfig())
    assert first.settings["descriptor"] == {
        "module": module,
        "image_size_px": 8,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "width": 5,
        "weights_sha256": about.weights_sha256,
    }
    scaled = found(module, model=ModelConfig(scaled_decoding=True, max_megapixels=12))
    assert scaled.settings() == about.settings() | {"scaled_decoding": True, "max_megapixels": 12}


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]
)
def test_one_changed_value_of_any_format_is_another_network(dtype: torch.dtype) -> None:
    network = torch.nn.Module()
    network.register_buffer("scalar", torch.zeros((), dtype=dtype))
    network.register_buffer("turned", torch.zeros(2, 3, dtype=dtype).T)
    network.register_buffer("empty", torch.zeros(0, dtype=dtype))
    before = fingerprint("a:b", network)
    assert before == fingerprint("a:b", network)
    network.get_buffer("turned")[2, 1] = 1
    between = fingerprint("a:b", network)
    network.get_buffer("scalar").fill_(1)
    assert len({before, between, fingerprint("a:b", network)}) == 3


@pytest.mark.parametrize("module", ["nets", "nets:", ":net", "nets:a b", "a/b:net", "nets:net()", "a:b:c"])
def test_what_names_no_function(module: str) -> None:
    with pytest.raises(UserError, match=r"expected package\.module:function, such as my_descriptors:megaloc"):
        found(module)


def fails(module: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        found(module)
    text = str(caught.value)
    assert re.search(what, text), text
    assert text.startswith(f"descriptor.module={module}: ")
    assert "\n" not in text


def test_what_can_not_be_imported_or_is_not_there(write: Write) -> None:
    fails("no_such_place_here:net", "no_such_place_here can't be imported: ModuleNotFoundError: No module named")
    for code, what in (
        ("import no_such_dependency", "can't be imported: ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("def net(:", "can't be imported: SyntaxError"),
        ("raise SystemExit(3)", "can't be imported: SystemExit: 3"),
        ("1 / 0", "can't be imported: ZeroDivisionError"),
    ):
        fails(f"{write(code)}:net", what)
    name = write("def one(): pass\ndef two(): pass\nfrom torch import nn\nwidths = {}")
    fails(f"{name}:three", f"{name} has no three; expected a function, it has one, two$")
    fails(f"{name}:widths", f"{name} has a value of type dict as widths; expected a function")
    fails(f"{name}:widths.net", "has no widths.net")
    fails(f"{write('')}:net", "has no net; expected a function, it has none")


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("raise ValueError('no checkpoint')", "it failed: ValueError: no checkpoint"),
        ("raise RuntimeError('two\\nlines')", "it failed: RuntimeError: two$"),
        ("import sys; sys.exit('usage')", "it failed: SystemExit: usage"),
        ("return open('/no/such/file')", "it failed: /no/such/file: No such file or directory"),
        ("return 'weights.pth'", r"it returned a value of type str; expected a torch\.nn\.Module"),
        ("return None", "it returned a value of type NoneType"),
        ("return nn.Linear", "it returned a value of type type"),
        ("return Net(), 1", "it returned a tuple of 2"),
        ("return Net(5, 6)", "it failed: TypeError"),
        ("return nn.LazyLinear(4)", "its network can't be used for inference: ValueError: Attempted to use an uninit"),
        ("return nn.Linear(3, 4, device='meta')", "its state dict can't be read: "),
        ("return Extra()", "its state dict can't be read: TypeError: _extra_state is of type dict; expected tensors"),
        ("return Net()", r"its weights differ from one call to the next \(\w{12}, then \w{12}\); expected the same"),
        ("return Noise()", "describes the same photo differently from one call to the next"),
        ("return Net(20_000)", r"gave \(2, 20000\) of torch.float32; expected \(2, G\) of floats, G from 1 to 16,384"),
    ],
)
def test_what_a_function_may_not_do(write: Write, body: str, what: str) -> None:
    code = f"""{LINEAR}
class Extra(Net):
    def get_extra_state(self): return {{}}
    def set_extra_state(self, state): pass

class Noise(nn.Module):
    def forward(self, photos): return torch.rand(len(photos), 4)

def net():
    {body.replace("return Net(20_000)", "torch.manual_seed(1); return Net(20_000)")}
"""
    fails(f"{write(code)}:net", what)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("expression", "what"),
    [
        ("x.mean((1, 2, 3))", r"for photos \(2, 3, 8, 8\) its network gave \(2,\) of torch.float32; expected \(2, G\)"),
        ("x", r"gave \(2, 3, 8, 8\) of torch.float32; expected \(2, G\)"),
        ("x.flatten(1)[:1]", r"gave \(1, 192\) of torch.float32; expected \(2, G\)"),
        ("x.flatten(1).T", r"gave \(192, 2\) of torch.float32; expected \(2, G\)"),
        (
            "x.flatten(1).squeeze(0)",
            r"photos \(1, 3, 8, 8\) .* gave \(192,\) of torch.float32; expected \(1, 192\)",
        ),
        ("x.flatten(1)[:, : 5 + len(x)]", r"gave \(1, 6\) of torch.float32; expected \(1, 7\), as for other photos"),
        ("(x.flatten(1), x)", r"gave a tuple of 2; expected"),
        ("{'global': x}", "gave a value of type dict"),
        ("x.flatten(1).numpy()", "gave a value of type ndarray"),
        ("None", "gave a value of type NoneType"),
        ("x.flatten(1).int()", r"gave \(2, 192\) of torch.int32; expected \(2, G\) of floats"),
        ("x.flatten(1) / 0", "its descriptors are NaN or infinite"),
        ("x.flatten(1).log()", "its descriptors are NaN or infinite"),
        ("x.flatten(1) * 1e30", "its descriptors are NaN or infinite"),
        ("x.flatten(1).half() * 60000", "its descriptors are NaN or infinite"),
        ("x[:, 0].flatten(1) / x[:, 0].std((1, 2))[:, None]", "its descriptors are NaN"),  # of the black photo
        (
            "x.flatten(1) * 0",
            r"a descriptor is zero \(shorter than 1e-12\), so it can't be divided by its length; expected",
        ),
        ("x.flatten(1) * 1e-15", "a descriptor is zero"),
        ("(x - x[:, :, :1, :1]).flatten(1)", "a descriptor is zero"),  # of the black photo
        (
            "(x - 0.1 * x.mean(0)).flatten(1)",
            "it describes a photo differently alone and in a batch; expected a descriptor that depends on its photo",
        ),
        ("x @ x[0, 0, :3]", r"its network fails on photos \(2, 3, 8, 8\): RuntimeError"),
        ("1 / 0", r"its network fails on photos \(2, 3, 8, 8\): ZeroDivisionError: division by zero"),
        ("exit(1)", "its network fails on photos .*: SystemExit: 1"),
        ("x.flatten(1).to_sparse()", "its network fails on photos"),
        ("x.flatten(1).to('meta')", "its network fails on photos"),
        ("torch.nested.nested_tensor([x[0, 0], x[1, 1]])", "its network fails on photos"),
    ],
)
def test_what_a_network_may_not_give(write: Write, expression: str, what: str) -> None:
    code = f"""
import torch

class Net(torch.nn.Module):
    def forward(self, x): return {expression}
"""
    fails(f"{write(code)}:Net", what)  # a class is as good as a function


@pytest.mark.slow
@given(st.recursive(st.none() | st.integers() | st.text() | st.floats(), st.lists, max_leaves=4))
def test_whatever_a_function_returns_instead_of_a_network_is_one_line(value: object) -> None:
    module = type(sys)("users_values")
    module.net = lambda: value
    sys.modules["users_values"] = module
    fails("users_values:net", "it returned .*; expected a torch")


@given(st.lists(st.integers(0, 9), max_size=4), st.sampled_from([torch.float32, torch.float16, torch.int64]))
def test_whatever_shape_a_network_gives_is_named_with_the_expected_one(shape: list[int], dtype: torch.dtype) -> None:
    class Net(torch.nn.Module):
        def forward(self, photos: torch.Tensor) -> torch.Tensor:
            return torch.ones(shape if len(shape) != 2 else [len(photos) * shape[0], shape[1]], dtype=dtype)

    module = type(sys)("users_shapes")
    module.Net = Net
    sys.modules["users_shapes"] = module
    if len(shape) == 2 and shape[0] == 1 and shape[1] and dtype.is_floating_point:
        assert found("users_shapes:Net").width == shape[1]
        return
    given_shape = shape if len(shape) != 2 else [2 * shape[0], shape[1]]
    fails("users_shapes:Net", re.escape(f"gave {tuple(given_shape)} of {dtype}; expected (2, G)"))


def test_other_weights_where_photos_are_described(write: Write) -> None:
    """Such as where a worker has another file, or draws without a seed."""
    about = found(f"{write(LINEAR)}:seeded")
    with pytest.raises(UserError, match=r"its weights differ from one call to the next \(abababababab, then "):
        UserDescriber.built(replace(about, weights_sha256="ab" * 32), torch.device("cpu"))


def test_a_module_in_the_working_directory_is_found_behind_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for `python -m`, but nothing there takes the place of an installed package."""
    (tmp_path / "users_here.py").write_text(LINEAR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert found("users_here:seeded").width == 5
    assert sys.path[-1] == str(tmp_path)
    sys.modules.pop("users_here")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"image_size_px": 0}, r"descriptor\.image_size_px=0: expected a number above 0"),
        ({"image_size_px": -3}, r"descriptor\.image_size_px=-3: expected a number above 0"),
        (
            {"mean": [0.5, 0.5]},
            r"mean=\[0\.5, 0\.5\]: expected three finite numbers, of red, green and blue",
        ),
        ({"mean": [0.5, 0.5, float("nan")]}, r"descriptor\.mean=.*: expected three finite numbers"),
        ({"mean": [0.5, 0.5, float("inf")]}, r"descriptor\.mean=.*: expected three finite numbers"),
        ({"std": [1.0, 1.0, 0.0]}, r"descriptor\.std=.*: expected three finite numbers above 0"),
        ({"std": [1.0, 1.0, -1.0]}, r"descriptor\.std=.*: expected three finite numbers above 0"),
        ({"std": []}, r"descriptor\.std=\[\]: expected three"),
        ({"module": " "}, r"descriptor\.module is empty"),
        ({"module": None, "image_size_px": 224}, r"descriptor\.image_size_px=224: expected descriptor\.module, too"),
        ({"module": None, "std": [1.0, 1.0, 1.0]}, r"descriptor\.std=.*: expected descriptor\.module, too"),
    ],
)
def test_settings_of_photos_that_can_not_be(settings: dict[str, object], what: str) -> None:
    with pytest.raises(UserError, match=what):
        DescriptorConfig(**({"module": "a:b"} | settings))  # type: ignore[arg-type]
