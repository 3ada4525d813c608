"""Copies of a state of tensors in one piece of memory that another process maps.

The memory has no name (memfd_create(2)), so nothing of it outlives its processes. It is laid out once, and filled
again at each save; what the other process needs to find the tensors in it (`layout`) changes only with the state's
shapes, or with values in it that are no tensors.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

ALIGNED = 64
"""Bytes that each tensor begins at a multiple of."""


class SharedCopies:
    """The copies, as the process has them that makes them."""

    def __init__(self, device: str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self.fd = -1
        self._base = self._end = 0
        self._there: list[torch.Tensor] = []
        self._layout = b""

    def fill(self, state: Mapping[str, Any]) -> bytes | None:
        """Copy all tensors of the state, of which this rank has its shards; the layout where it is a new one. Complete when
        this returns."""
        leaves, tree = tree_flatten(dict(state))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        here = [local(tensor).detach() for tensor in tensors]
        if [(t.shape, t.dtype) for t in here] != [(t.shape, t.dtype) for t in self._there]:
            self._allocate(here)
        torch._foreach_copy_(self._there, here, non_blocking=self._on_gpu)
        if len(tensors) < len(leaves) or not self._layout:
            copies = iter([_like(old, new) for old, new in zip(tensors, self._there, strict=True)])
            mirror = [next(copies) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            before, self._layout = self._layout, self._dump(tree_unflatten(mirror, tree))
        else:
            before = self._layout
        if self._on_gpu:
            torch.cuda.synchronize()
        return self._layout if self._layout != before else None

    def close(self) -> None:
        """Give the memory back, once nobody copies from it any more."""
        if self.fd >= 0:
            if self._on_gpu:
                _check(_cuda().cudaHostUnregister(self._base))
            os.close(self.fd)
        self.fd, self._there, self._layout = -1, [], b""

    def _allocate(self, like: list[torch.Tensor]) -> None:
        self.close()
        starts, size = [], 0
        for tensor in like:
            starts.append(size)
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        self.fd = os.memfd_create("raylaunch-save", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, max(size, ALIGNED))
        memory = _mapped(self.fd)
        self._base = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._end = self._base + len(memory)
        if self._on_gpu:  # pinned, so that copies from the GPU are quick
            _check(_cuda().cudaHostRegister(self._base, len(memory), 0))
        self._there = [_piece(memory, start, t.dtype, t.shape) for start, t in zip(starts, like, strict=True)]

    def _dump(self, mirror: Any) -> bytes:
        found = io.BytesIO()
        pickler = pickle.Pickler(found)
        pickler.persistent_id = self._place  # type: ignore[method-assign]
        pickler.dump(mirror)
        return found.getvalue()

    def _place(self, value: Any) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        """Of a tensor that lies in the memory: where."""
        plain = isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.nbytes
        if not plain or not self._base <= value.data_ptr() < self._end:
            return None
        return value.data_ptr() - self._base, value.dtype, tuple(value.shape)


def read(fd: int, layout: bytes) -> Any:
    """The state whose copies lie in that memory, as the other process sees it: filled again from save to save."""
    memory = _mapped(fd)
    unpickler = pickle.Unpickler(io.BytesIO(layout))
    unpickler.persistent_load = lambda place: _piece(memory, *place)  # type: ignore[method-assign]
    return unpickler.load()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, or the tensor itself where it is none."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _mapped(fd: int) -> mmap.mmap:
    return mmap.mmap(fd, os.fstat(fd).st_size)


def _piece(memory: mmap.mmap, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """With a storage of its own: torch pickles a DTensor as one only if its local tensor begins its storage."""
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)


def _like(tensor: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    """The copy as the same part of the same whole. (`from_local` would move it to the mesh's device.)"""
    if not isinstance(tensor, DTensor):
        return copy
    return DTensor(copy, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(code: Any) -> None:
    if int(code) != 0:
        raise RuntimeError(f"CUDA does not take memory as pinned: error {int(code)}")
