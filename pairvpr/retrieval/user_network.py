"""A network of the user's own environment as a first stage: found by its name, tried, and run.

Its function is the user's code, which runs because the user says so. B photos in a batch, S image side in pixels, G
descriptor width.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pairvpr.config.schema import DescribePassConfig, DescriptorConfig, ModelConfig
from pairvpr.data.descriptor_file import WIDEST
from pairvpr.errors import UserError, UserNetworkError
from pairvpr.machine import in_a_line
from pairvpr.models.pair_vpr import normalise, sent
from pairvpr.retrieval.first_stage import FirstStage, UserNetwork
from pairvpr.terminal import say

FARTHEST = 0.01
"""How far apart two descriptors of one photo may be, each of unit length."""
SHORTEST = 1e-12
"""A shorter descriptor has no direction."""
NUM_NAMED = 5


class UserDescriber:
    """The user's network on its device, with `num_threads` CPU threads (None = as the process has).

    Threads may share it. They wait for one another, because a network may keep something of a call in itself.
    """

    def __init__(
        self, photos: UserNetwork, network: nn.Module, device: torch.device, num_threads: int | None = None
    ) -> None:
        self.photos = photos
        self._network = network
        self._device = device
        self._num_threads = num_threads
        self._lock = Lock()

    @classmethod
    def built(cls, about: UserNetwork, device: torch.device, num_threads: int | None = None) -> UserDescriber:
        """Calls the user's function. Raises `UserError` as it does in `find_user_network`, and for other weights."""
        network = _network(about.module)
        _check_same_weights(about.module, about.weights_sha256, fingerprint(about.module, network))
        with _in_a_line(about.module, f"its network can't be moved to {device}"):
            network.to(device)
        return cls(about, network, device, num_threads)

    @property
    def width(self) -> int:
        """G."""
        return self.photos.width

    @torch.inference_mode()
    def descriptors(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, S, S, 3) uint8 -> (B, G) float32, unit length.

        Raises `UserNetworkError` for what the network raises, and for other output than a finite row for each photo,
        whose length is above 0.
        """
        about = self.photos
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        photos = normalise(sent(torch.from_numpy(pixels), self._device), about.mean, about.std)
        with self._lock, _in_a_line(about.module, f"its network fails on photos {tuple(photos.shape)}"):
            given = self._network(photos)
            _check_rows(about, len(photos), given)
            rows = given.float()
            lengths = torch.linalg.vector_norm(rows, dim=-1).cpu()
            found = F.normalize(rows, dim=-1, eps=SHORTEST).cpu().numpy()
        if not lengths.isfinite().all():
            raise UserNetworkError(
                f"{_named(about.module)}: its descriptors are NaN or infinite; expected finite numbers"
            )
        if (lengths < SHORTEST).any():
            raise UserNetworkError(
                f"{_named(about.module)}: a descriptor is zero (shorter than {SHORTEST:g}), so it can't be divided by "
                "its length; expected a length above 0 for every photo"
            )
        return found


def find_user_network(config: DescriptorConfig, model: ModelConfig) -> UserNetwork:
    """What is known of the network that `config` names; `model` says how photos are decoded.

    Its function is called twice, and each network describes a photo of noise and a black one on the CPU, together and
    each alone. Raises `UserError` for a function that can't be imported or called, for what is no network, for other
    output than a descriptor of each photo, where a descriptor depends on the other photos of its batch, and where the
    two networks differ.
    """
    (found, rows, alone), (again, other_rows, _) = _tried(config, model), _tried(config, model)
    _check_same_weights(found.module, found.weights_sha256, again.weights_sha256)
    if rows.shape != other_rows.shape or _distance(rows, other_rows) > FARTHEST:
        raise UserError(
            f"{_named(found.module)}: it describes the same photo differently from one call to the next; expected the "
            "same each time, without random numbers"
        )
    if _distance(rows, alone) > FARTHEST:
        raise UserError(
            f"{_named(found.module)}: it describes a photo differently alone and in a batch; expected a descriptor "
            "that depends on its photo only"
        )
    say(
        f"first stage {found.module}: {found.width:,} values a photo, weights {found.weights_sha256[:12]}; code and "
        "weights carry their owners' terms"
    )
    return found


def first_stage_of(
    model: ModelConfig, weights_sha256: str, describe: DescribePassConfig, descriptor: DescriptorConfig
) -> FirstStage:
    """The first stage that describes photos: the user's network, if `descriptor` names one, else `model`.

    Raises `UserError` as `find_user_network`.
    """
    if descriptor.module is not None:
        return FirstStage.of_user_network(find_user_network(descriptor, model), describe)
    return FirstStage.own(model, weights_sha256, describe)


def fingerprint(module: str, network: nn.Module) -> str:
    """The sha256 of a network's state dict: names, number formats, shapes and values."""
    digest = hashlib.sha256()
    with _in_a_line(module, "its state dict can't be read"):
        for name, value in sorted(network.state_dict().items()):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} is of type {type(value).__name__}; expected tensors alone")
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tried(
    config: DescriptorConfig, model: ModelConfig
) -> tuple[UserNetwork, NDArray[np.float32], NDArray[np.float32]]:
    """What is known of a network that the user's function makes now, and its rows of noise and of black.

    Rows (2, G) are those of both photos together, and of each alone.
    """
    assert config.module is not None
    network = _network(config.module)
    about = UserNetwork(
        module=config.module,
        image_size_px=config.image_size_px,
        mean=tuple(config.mean),
        std=tuple(config.std),
        scaled_decoding=model.scaled_decoding,
        max_megapixels=model.max_megapixels,
        width=0,
        weights_sha256=fingerprint(config.module, network),
    )
    pixels = np.zeros((2, about.image_size_px, about.image_size_px, 3), np.uint8)
    pixels[0] = np.random.default_rng(0).integers(256, size=pixels[0].shape)
    rows = UserDescriber(about, network, torch.device("cpu")).descriptors(pixels)
    about = replace(about, width=rows.shape[1])
    describer = UserDescriber(about, network, torch.device("cpu"))
    alone = np.concatenate([describer.descriptors(photo[None]) for photo in pixels])
    return about, rows, alone


def _distance(rows: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """The largest between a photo's two descriptors."""
    return float(np.linalg.norm(rows - others, axis=1).max())


def _network(module: str) -> nn.Module:
    """What the user's function returns, for inference."""
    function = _function(module)
    with _in_a_line(module, "it failed"):
        found = function()
    if not isinstance(found, nn.Module):
        raise UserError(
            f"{_named(module)}: it returned {_about(found)}; expected a torch.nn.Module (B, 3, S, S) -> (B, G)"
        )
    with _in_a_line(module, "its network can't be used for inference"):
        found.eval()
        found.requires_grad_(False)
    return found


def _function(module: str) -> Callable[[], object]:
    """The user's function. The working directory is where Python looks last, if it does not look there anyway."""
    place, _, name = module.partition(":")
    if not all(part.isidentifier() for part in (*place.split("."), *name.split("."))):
        raise UserError(f"{_named(module)}: expected package.module:function, such as my_descriptors:megaloc")
    with suppress(OSError):
        if not {"", os.getcwd()} & set(sys.path):
            sys.path.append(os.getcwd())
    with _in_a_line(module, f"{place} can't be imported"):
        found: Any = import_module(place)
        functions = [
            key for key, value in vars(found).items() if callable(value) and getattr(value, "__module__", "") == place
        ]
        for part in name.split("."):
            found = getattr(found, part, None)
    if not callable(found):
        has = f"it has {', '.join(functions[:NUM_NAMED])}" if functions else "it has none"
        what = "has no" if found is None else f"has {_about(found)} as"
        raise UserError(f"{_named(module)}: {place} {what} {name}; expected a function, {has}")
    return found


def _check_same_weights(module: str, there: str, here: str) -> None:
    if there != here:
        raise UserError(
            f"{_named(module)}: its weights differ from one call to the next ({there[:12]}, then {here[:12]}); "
            "expected the same each time, from a file, or drawn from a seed (torch.manual_seed) in the function"
        )


def _check_rows(about: UserNetwork, num_photos: int, given: object) -> None:
    """Raise `UserNetworkError` unless a network gave a row for each photo, of the known width (0 = not known yet)."""
    widths, expected = range(1, WIDEST + 1), f"({num_photos}, G) of floats, G from 1 to {WIDEST:,}"
    if about.width:
        widths, expected = range(about.width, about.width + 1), f"({num_photos}, {about.width}), as for other photos"
    shape = tuple(given.shape) if isinstance(given, Tensor) and given.is_floating_point() else ()
    if len(shape) != 2 or shape[0] != num_photos or shape[1] not in widths:
        side_px = about.image_size_px
        raise UserNetworkError(
            f"{_named(about.module)}: for photos {(num_photos, 3, side_px, side_px)} its network gave {_about(given)}; "
            f"expected {expected}"
        )


def _about(value: object) -> str:
    """What a value is, in messages."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a value of type {type(value).__name__}"


def _named(module: str) -> str:
    return f"descriptor.module={module}"


@contextmanager
def _in_a_line(module: str, what: str) -> Iterator[None]:
    """Whatever the user's code raises becomes one line that names it."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserNetworkError(f"{_named(module)}: {what}: {in_a_line(error)}") from error
