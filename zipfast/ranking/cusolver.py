# SPDX-License-Identifier: Apache-2.0
"""Reduction of a symmetric matrix to tridiagonal form on a GPU: G = Q T Qᵀ by cuSOLVER's ``sytrd``, products with Q by its
``ormtr``.

torch has neither, but the library that its own eigensolvers call is there at run time. It is looked for when it is first
asked for, never at import. Everything is float64, on torch's current stream, with workspace from torch's allocator; no
call waits for the GPU. Row-major symmetric matrices are column-major ones, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import re
import threading
from collections.abc import Iterator
from ctypes import c_int, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LOWER, LEFT, PLAIN, TRANSPOSED = 0, 0, 0, 1  # cublasFillMode_t, cublasSideMode_t, cublasOperation_t
SUFFIX = {"12": "11", "13": "12"}  # CUDA's major version -> that of its libcusolver.so
PACKAGES = ("cu13/lib", "cusolver/lib")  # below nvidia/, as pip installs CUDA 13 and 12
STATUS = {
    1: "not initialized",
    2: "allocation failed",
    3: "invalid value",
    4: "no code for this GPU",
    6: "execution failed",
    7: "internal error",
}
SIGNATURES: dict[str, list[type]] = {
    "cusolverDnCreate": [c_void_p],
    "cusolverDnSetStream": [c_void_p, c_void_p],
    # handle, uplo, n, A, lda, d, e, tau, then lwork or work, lwork, info
    "cusolverDnDsytrd_bufferSize": [c_void_p, c_int, c_int, c_void_p, c_int, *[c_void_p] * 4],
    "cusolverDnDsytrd": [c_void_p, c_int, c_int, c_void_p, c_int, *[c_void_p] * 4, c_int, c_void_p],
    # handle, side, uplo, trans, m, n, A, lda, tau, C, ldc, then lwork or work, lwork, info
    "cusolverDnDormtr_bufferSize": [c_void_p, *[c_int] * 5, c_void_p, c_int, c_void_p, c_void_p, c_int, c_void_p],
    "cusolverDnDormtr": [c_void_p, *[c_int] * 5, c_void_p, c_int, c_void_p, c_void_p, c_int, c_void_p, c_int, c_void_p],
}


class CusolverError(RuntimeError):
    """A call that cuSOLVER refused, or could not begin."""


@dataclass(frozen=True)
class Reduced:
    """T, and Q as ``rotate`` reads it."""

    diagonal: Tensor  # [n]
    offdiagonal: Tensor  # [n - 1]
    reflectors: Tensor  # [n, n], below the subdiagonal of the column-major matrix
    tau: Tensor  # [n]
    info: Tensor  # int32 [1]: 0 where all went well; on the device


class Solver:
    """cuSOLVER, by the path of its library. Handles belong to a thread and a device, and live as long as the process."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        for name, arguments in SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c_int
        self._local = threading.local()

    def reduce(self, matrix: Tensor) -> Reduced:
        """T and Q of a symmetric float64 matrix [n, n], which stays as it is.

        Raises:
            CusolverError: the call did not begin; what goes wrong later is in ``info``.
        """
        n, new = matrix.shape[0], matrix.new_empty
        packed, diagonal, off, tau = matrix.clone(memory_format=torch.contiguous_format), new(n), new(n), new(n)
        info = torch.zeros(1, dtype=torch.int32, device=matrix.device)
        with self._handle(matrix.device) as handle:
            shared = (handle, LOWER, n, _at(packed), n, _at(diagonal), _at(off), _at(tau))
            work = self._workspace("cusolverDnDsytrd", matrix, *shared)
            self._call("cusolverDnDsytrd", *shared, _at(work), len(work), _at(info))
        return Reduced(diagonal, off[: max(n - 1, 0)], packed, tau, info)

    def rotate(self, reduced: Reduced, x: Tensor, transposed: bool) -> Tensor:
        """Qᵀx or Qx, float64 [n, K]; NaN where the GPU could not do it."""
        (n, columns), matrix = x.shape, reduced.reflectors
        if columns == 0:
            return x.clone()
        turned = x.T.contiguous()  # column-major
        turned = turned.clone() if turned.data_ptr() == x.data_ptr() else turned
        info = torch.zeros(1, dtype=torch.int32, device=x.device)
        with self._handle(x.device) as handle:
            side = (LEFT, LOWER, TRANSPOSED if transposed else PLAIN)
            shared = (handle, *side, n, columns, _at(matrix), n, _at(reduced.tau), _at(turned), n)
            work = self._workspace("cusolverDnDormtr", x, *shared)
            self._call("cusolverDnDormtr", *shared, _at(work), len(work), _at(info))
        return torch.where(info == 0, turned, torch.nan).T

    @contextlib.contextmanager
    def _handle(self, device: torch.device) -> Iterator[c_void_p]:
        """On torch's current stream of this device, which is the current one inside."""
        cuda = device.type == "cuda"
        with torch.cuda.device(device) if cuda else contextlib.nullcontext():
            handles: dict[torch.device, c_void_p] = self._local.__dict__.setdefault("handles", {})
            if device not in handles:
                created = c_void_p()
                self._call("cusolverDnCreate", ctypes.addressof(created))
                handles[device] = created
            stream = torch.cuda.current_stream(device).cuda_stream if cuda else None
            self._call("cusolverDnSetStream", handles[device], stream)
            yield handles[device]

    def _workspace(self, name: str, like: Tensor, *shared: object) -> Tensor:
        size = c_int()
        self._call(f"{name}_bufferSize", *shared, ctypes.addressof(size))
        return torch.empty(max(size.value, 1), dtype=torch.float64, device=like.device)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise CusolverError(f"{name} failed with status {status} ({STATUS.get(status, 'unknown')})")


def _at(t: Tensor) -> int:
    return t.data_ptr()


def why_not_cusolver(device: torch.device) -> list[str]:
    """Reasons for which cuSOLVER's reduction cannot be called for tensors on a device; empty: it can."""
    reasons = []
    if device.type != "cuda":
        reasons.append(f"cuSOLVER does not run on {device.type}")
    if torch.version.cuda is None:
        reasons.append("torch is built without CUDA")
    elif solver() is None:
        reasons.append(f"none of these is cuSOLVER: {', '.join(candidates(torch.version.cuda)) or '(no file)'}")
    return reasons


@functools.cache
def solver() -> Solver | None:
    """The cuSOLVER of torch's CUDA version; None where there is none."""
    if torch.version.cuda is None:
        return None
    for path in candidates(torch.version.cuda):
        with contextlib.suppress(OSError, AttributeError):  # not loadable, another library
            return Solver(path)
    return None


def candidates(version: str) -> list[str]:
    """Where libcusolver of a CUDA version may be, best first: what the process has loaded, NVIDIA's packages, the toolkit,
    the loader's own search."""
    suffix = SUFFIX.get(version.split(".")[0])
    if suffix is None:
        return []
    name = f"libcusolver.so.{suffix}"
    found = [path for path in loaded() if Path(path).name.startswith(name)]
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    folders = [Path(root) / part for root in roots for part in PACKAGES]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders += [Path(home) / "lib64" for home in homes if home]
    found += [str(folder / name) for folder in folders if (folder / name).is_file()]
    return list(dict.fromkeys([*found, name]))


def loaded() -> list[str]:
    """Paths of the libcusolver that this process has loaded already: two copies of one library would be one too many."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return list(dict.fromkeys(re.findall(r"(/\S*/libcusolver\.so\S*)", maps)))
