"""A GPU made of CPU memory: values are real, tensors of different devices can't meet, waits and kernels are counted.

Python sees `x.device == cuda:0`; the C++ below sees a CPU, so autograd and all operators work in a build without CUDA.
Autocast for "cuda" is autocast for "cpu" with the same dtype. What stays unseen: real kernels, streams, memory, and
CUDA's own list of operators that autocast keeps in fp32 (`test_fake_gpu.py` checks that one).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import pairvpr

CUDA = torch.device("cuda", 0)
PACKAGE = f"{Path(pairvpr.__file__).parent}/"
"""The folder of the checkout may have the same name."""
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
    *("equal", "is_nonzero", "bincount", "repeat_interleave"),
}
"""Operators whose result, or its size, the host must know before it goes on."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
MAKES_ROOM = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
"""Operators without a kernel that are no views by their schema."""
WHOLE = {"linear", "scaled_dot_product_attention"}
"""Inference mode hands on composite operators as they are; all but these are taken apart into what runs."""


@dataclass
class Record:
    """What the device was asked for: waits by (reason, file and line of the project), kernels by operator."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    attended: list[tuple[Tensor, ...]] = field(default_factory=list, repr=False)
    """The inputs of each attention."""

    def waits_in(self, *files: str) -> int:
        """Number of waits in these files of the project, or in all."""
        return sum(count for (_, line), count in self.waits.items() if not files or line.startswith(files))

    def forget(self) -> None:
        """Count from zero."""
        self.waits.clear()
        self.kernels.clear()
        self.attended.clear()


class OnGpu(Tensor):
    """A tensor of the device; `held` has its values on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=torch.device("cpu"),
            )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    device = property(lambda self: CUDA)  # pyright: ignore[reportAssignmentType]
    is_cuda = property(lambda self: True)  # pyright: ignore[reportAssignmentType]

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        _Dispatch.wait("copy to the host")
        return self.detach().held.clone()  # pyright: ignore[reportAttributeAccessIssue]

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def pin_memory(self, *_: Any, **__: Any) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor', only dense CPU tensors can be pinned")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("copy", None)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        if device is not None and device.type == "cpu":
            return self.cpu() if dtype is None else self.cpu().to(dtype)
        return self if dtype is None else super().to(dtype)

    def __tensor_flatten__(self) -> Any:
        """Makes `Module.to` swap parameters: else it would change the C++ part alone."""
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> OnGpu:
        return OnGpu(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _Dispatch.run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """Sees every operator inside `simulated_gpu()`."""

    record = Record()
    pinned: ClassVar[dict[int, Tensor]] = {}

    @classmethod
    def wait(cls, why: str) -> None:
        cls.record.waits[why, _line_of_the_project()] += 1

    @classmethod
    def is_pinned(cls, tensor: Tensor) -> bool:
        return not isinstance(tensor, OnGpu) and tensor.untyped_storage().data_ptr() in cls.pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        concerns_gpu = (
            _in_backward()
            or _is_cuda(kwargs.get("device"))
            or kwargs.get("pin_memory")
            or "pin" in _name(func)
            or any(isinstance(leaf, OnGpu) for leaf in tree_leaves((args, kwargs)))
        )
        if not concerns_gpu:
            return func(*args, **kwargs)
        if _is_composite(func) and _name(func) not in WHOLE:
            with self:
                return func.decompose(*args, **kwargs)
        return self.run(func, args, kwargs)

    @classmethod
    def run(cls, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name, kwargs = _name(func), dict(kwargs)
        if name == "is_pinned":
            return cls.is_pinned(args[0])
        if kwargs.pop("pin_memory", None) or name in ("pin_memory", "_pin_memory"):
            made = args[0].clone() if "pin" in name else func(*args, **kwargs)
            cls.pinned[made.untyped_storage().data_ptr()] = made
            return made
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
        to_gpu = cls._destination(name, args, kwargs, ours)
        cls._note(func, name, tensors, args, kwargs)
        kwargs |= {"device": "cpu"} if kwargs.get("device") is not None else {}
        out = func(*_plain(args), **_plain(kwargs))
        known = {id(tensor.held): tensor for tensor in ours}  # what an operator changes in place keeps its wrapper
        return tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else OnGpu(t), out) if to_gpu else out

    @staticmethod
    def _destination(name: str, args: Any, kwargs: dict[str, Any], ours: list[OnGpu]) -> bool:
        """Whether the result lies on the device."""
        if kwargs.get("device") is not None:
            return _is_cuda(kwargs["device"]) or _in_backward() or (bool(ours) and name == "_to_copy")
        return isinstance(args[0], OnGpu) if name == "copy_" else bool(ours)

    @classmethod
    def _note(cls, func: Any, name: str, tensors: list[Tensor], args: Any, kwargs: dict[str, Any]) -> None:
        """Count the call. Raises `RuntimeError`, as torch does, where tensors of different devices meet."""
        hosts = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
        has_ours = len(hosts) < len(tensors)
        if name in ("_to_copy", "copy_"):
            is_async = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            crosses = bool(hosts) and (has_ours or _is_cuda(kwargs.get("device")))
            if crosses and not (is_async and all(cls.is_pinned(host) for host in hosts)):
                cls.wait("copy between host and device that is not both pinned and asynchronous")
        elif has_ours and any(host.dim() for host in hosts):
            if name in INDEXING and isinstance(args[0], OnGpu):
                cls.wait("indices on the host")
            elif not name.startswith(("_foreach", "_fused")):
                raise RuntimeError(f"{func}: Expected all tensors to be on the same device, found cuda:0 and cpu")
        if has_ours and name in WAITING:
            cls.wait(name)
        if has_ours and not _is_view(func) and name not in MAKES_ROOM:
            cls.record.kernels[name] += 1
        if "scaled_dot_product" in name and "backward" not in name:
            cls.record.attended.append(tuple(_plain(tensors)))


def _plain(tree: Any) -> Any:
    return tree_map_only(OnGpu, lambda tensor: tensor.held, tree)


def _name(func: Any) -> str:
    return func._schema.name.split("::")[1]


def _is_composite(func: Any) -> bool:
    """Whether the operator is made of others on every device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _is_view(func: Any) -> bool:
    """Whether the result shares memory with an argument, by the operator's schema."""
    return any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _in_backward() -> bool:
    """Autograd's own factories ask for what C++ believes in, a CPU."""
    return torch._C._current_graph_task_id() != -1


def _line_of_the_project() -> str:
    frame: FrameType | None = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return "?" if frame is None else f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _grouped(tensor_lists: Any, with_indices: bool = False) -> Any:
    """Optimizers ask C++, which believes in a CPU, where their tensors lie."""
    groups = _foreach_utils._group_tensors_by_device_and_dtype(tensor_lists, with_indices)
    is_on_gpu = any(isinstance(tensor, OnGpu) for tensor in tensor_lists[0])
    return {(CUDA if is_on_gpu else device, dtype): group for (device, dtype), group in groups.items()}


def _of_the_cpu(ask: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda device_type: ask("cpu" if device_type == "cuda" else device_type)


@contextmanager
def simulated_gpu() -> Iterator[Record]:
    """`torch.device("cuda")` works inside; what it was asked for is in the record."""
    with ExitStack() as stack:
        for name, replacement in (
            ("torch.autocast", _Autocast),
            ("torch.amp.autocast", _Autocast),
            ("torch.is_autocast_enabled", _of_the_cpu(torch.is_autocast_enabled)),
            ("torch.get_autocast_dtype", _of_the_cpu(torch.get_autocast_dtype)),
            ("torch.optim.optimizer._group_tensors_by_device_and_dtype", _grouped),
            ("torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype", _grouped),
            ("torch.cuda._lazy_init", lambda: None),
            ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            ("torch.utils.weakref.getweakrefs", lambda _: []),  # else `Module.to` can't swap parameters
        ):
            stack.enter_context(mock.patch(name, replacement))
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is then a copy that is seen
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        _Dispatch.record = Record()
        _Dispatch.pinned = {}
        stack.enter_context(_Dispatch())
        yield _Dispatch.record
