"""Stages on a card, from CPU tensors to CPU tensors: what csrc/ops does with torch, done with plain memory."""

import ctypes
from typing import Any

import torch
from params import ENUMS, STRUCTS, Params
from torch import Tensor

POISON = 0x7B  # 1e36, 6e4 in float16, and a large integer


class Card:
    """Memory of the card by the tensors it came from, and the stages; everything is freed at the end of a `with`."""

    def __init__(self, stages: ctypes.CDLL):
        self.stages = stages
        self.outputs: list[tuple[Tensor, int]] = []
        self.memory: list[ctypes.c_void_p] = []

    def __enter__(self) -> "Card":
        return self

    def __exit__(self, *_: object) -> None:
        for memory in self.memory:
            self._call("release", memory)
        self.memory.clear()
        self.outputs.clear()

    def run(self, stage: str, struct: str, **values: Any) -> None:
        params = STRUCTS[struct](**values)
        self._call(stage, ctypes.byref(params), ctypes.c_int64(ctypes.sizeof(params)))

    def put(self, tensor: Tensor | None) -> int | None:
        """The address of a copy with the strides of the tensor; memory ends where its storage ends."""
        if tensor is None:
            return None
        storage = tensor.untyped_storage()
        address = self._allocate(storage.nbytes())
        self._copy(address, storage.data_ptr(), storage.nbytes())
        return address + tensor.storage_offset() * tensor.element_size()

    def new(self, *shape: int, dtype: torch.dtype, values: Tensor | None = None) -> Tensor:
        """An output, which `fetch` brings back: poisoned, or with values to add to."""
        out = torch.empty(shape, dtype=dtype)
        out.untyped_storage().fill_(POISON)
        if values is not None:
            out.copy_(values)
        self.outputs.append((out, self.put(out)))
        return out

    def fetch(self) -> None:
        """Brings the outputs back."""
        for out, address in self.outputs:
            self._copy(out.data_ptr(), address, out.nbytes)

    def address(self, tensor: Tensor | None) -> int | None:
        """Where an output lies, or a copy of any other tensor."""
        for out, address in self.outputs:
            if out is tensor:
                return address
        return self.put(tensor)

    def dtype(self, dtype: torch.dtype) -> int:
        return ENUMS["Dtype"].index(str(dtype).removeprefix("torch."))

    def matrix(self, tensor: Tensor | None) -> Params:
        if tensor is None:
            return STRUCTS["Matrix"]()
        return STRUCTS["Matrix"](data=self.address(tensor), dtype=self.dtype(tensor.dtype), stride=tensor.stride(0))

    def vector(self, tensor: Tensor | None) -> Params:
        if tensor is None:
            return STRUCTS["Vector"]()
        return STRUCTS["Vector"](data=self.address(tensor), dtype=self.dtype(tensor.dtype))

    def rows(self, tensor: Tensor, plan: Any = None, scale: Tensor | None = None) -> Params:
        """GatheredRows: the tensor's own rows, or those that the rows of a plan read."""
        gather = {} if plan is None else {"row_slot": self.address(plan.row_slot), "width": plan.slot_row.shape[1]}
        return STRUCTS["GatheredRows"](
            rows=self.matrix(tensor), num_rows=len(tensor), scale=self.vector(scale), **gather
        )

    def weights(self, w: Tensor) -> Params:
        strides = {"expert_stride": w.stride(0), "n_stride": w.stride(1), "k_stride": w.stride(2)}
        return STRUCTS["ExpertWeights"](data=self.address(w), dtype=self.dtype(w.dtype), **strides)

    def _allocate(self, nbytes: int) -> int:
        memory = ctypes.c_void_p()
        self._call("allocate", ctypes.c_int64(max(nbytes, 1)), ctypes.byref(memory))
        self.memory.append(memory)
        return memory.value

    def _copy(self, to: int, source: int, nbytes: int) -> None:
        if nbytes:
            self._call("copy", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_int64(nbytes))

    def _call(self, name: str, *args: Any) -> None:
        function = getattr(self.stages, name)
        function.restype = ctypes.c_char_p
        failure = function(*args)
        if failure is not None:
            raise RuntimeError(f"{name}: {failure.decode()}")
