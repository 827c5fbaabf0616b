"""What a loop trains on: datums, token ids, tensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from gradwire._wire.arguments import check_array
from gradwire._wire.token_ids import token_ids_of
from gradwire.errors import invalid_field

if TYPE_CHECKING:
    import torch

TensorDtype = Literal["float32", "int64"]


def to_array(values: Any) -> npt.NDArray[Any]:
    """A contiguous numpy array over `values`: a list, a numpy array, a torch tensor on any device, or a TensorData
    (ours or tinker's). Shares memory where it can; bfloat16 becomes float32.

    Raises:
        ValueError: A mapping, such as a tokenizer's result: it holds several arrays.
    """
    if isinstance(values, Mapping):
        keys = ", ".join(sorted(map(str, values))[:8]) or "nothing"
        raise ValueError(f"a {type(values).__name__} of {keys} is not an array; pass one of them.")
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values)
    if hasattr(values, "to_numpy"):
        return np.ascontiguousarray(values.to_numpy())
    if hasattr(values, "detach"):
        tensor = values.detach().cpu()
        if tensor.is_floating_point() and tensor.element_size() < 4:
            tensor = tensor.float()
        return np.ascontiguousarray(tensor.numpy())
    if hasattr(values, "data") and hasattr(values, "dtype") and hasattr(values, "shape"):
        array = np.asarray(values.data, dtype=values.dtype)
        return array.reshape(values.shape) if values.shape is not None else array
    return np.asarray(values)


class TensorData:
    """A dense tensor of float32 or int64.

    Args:
        data: Elements, in any form `to_array` takes.
        dtype: "float32" or "int64"; None takes float32 for floating point and int64 for integers.
        shape: Sizes of the dims; None keeps the shape of `data`.

    Raises:
        InvalidArgumentError: `data` is not numeric, ragged, not what the dtype holds, or does not fill the shape.
    """

    __slots__ = ("_array",)

    def __init__(self, data: Any, dtype: TensorDtype | None = None, shape: Sequence[int] | None = None) -> None:
        self._array = self._read(data, dtype, shape, "data")

    @staticmethod
    def _read(data: Any, dtype: Any, shape: Any, where: str) -> npt.NDArray[Any]:
        if dtype not in (None, "float32", "int64"):
            raise invalid_field("dtype", f'is {dtype!r}; it must be "float32" or "int64".')
        try:
            array = to_array(data)
        except (TypeError, ValueError) as exc:
            raise invalid_field(where, f"cannot be read: {exc}") from exc
        array = check_array(where, array, dtype or ("float32" if array.dtype.kind == "f" else "int64"))
        if shape is None:
            return array
        try:
            return array.reshape(tuple(shape))
        except (TypeError, ValueError):
            raise invalid_field("shape", f"is {shape!r}, which {array.size} elements do not fill.") from None

    @classmethod
    def of(cls, data: Any, where: str) -> "TensorData":
        """As TensorData(data), which an error calls `where`; a TensorData as it is."""
        if isinstance(data, TensorData):
            return data
        made = cls.__new__(cls)
        made._array = cls._read(data, None, None, where)
        return made

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any]) -> "TensorData":
        """Wraps a numpy array; float32 and int64 share its memory."""
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: "torch.Tensor") -> "TensorData":
        """Wraps a torch tensor; float32 and int64 on the CPU share its memory."""
        return cls(tensor)

    @property
    def dtype(self) -> TensorDtype:
        """ "float32" or "int64"."""
        return "float32" if self._array.dtype == np.float32 else "int64"

    @property
    def shape(self) -> list[int]:
        """Sizes of the dims."""
        return list(self._array.shape)

    @property
    def data(self) -> list[Any]:
        """Elements as a flat Python list, row-major."""
        return self._array.ravel().tolist()

    def to_numpy(self) -> npt.NDArray[Any]:
        """The tensor as numpy, sharing memory; may be read-only."""
        return self._array

    def to_torch(self) -> "torch.Tensor":
        """The tensor as torch on the CPU, float32 or int64; shares memory when that is writable."""
        import torch

        return torch.from_numpy(self._array if self._array.flags.writeable else self._array.copy())

    def tolist(self) -> list[Any]:
        """Elements as nested Python lists."""
        return self._array.tolist()

    def __len__(self) -> int:
        return len(self._array)

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape}, data={np.array2string(self._array, threshold=8)})"


@dataclass(frozen=True)
class EncodedTextChunk:
    """A piece of a ModelInput: token ids."""

    tokens: Sequence[int]
    """Token ids, [N]."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(token_ids_of(self.tokens, "tokens"))


class ModelInput:
    """The tokens the model reads.

    Args:
        chunks: Pieces with a `.tokens` sequence each; joined in order.
    """

    __slots__ = ("_tokens",)

    def __init__(self, chunks: Iterable[Any] = ()) -> None:
        self._tokens = model_input_tokens(list(chunks), "chunks")

    @classmethod
    def from_ints(cls, tokens: Any) -> "ModelInput":
        """A ModelInput of token ids.

        Args:
            tokens: Integers [N], or [1, N]: a list, numpy array or torch tensor; or what a tokenizer or chat template
                returned (BatchEncoding, a dict with "input_ids").

        Raises:
            ValueError: Text, several sequences, padding, or ids that are not integers.
        """
        made = cls()
        made._tokens = _token_array(tokens, "tokens")
        return made

    @classmethod
    def empty(cls) -> "ModelInput":
        """A ModelInput without tokens, to append to."""
        return cls()

    def append(self, chunk: Any) -> "ModelInput":
        """A new ModelInput with a chunk's tokens after its own; this one is unchanged.

        Args:
            chunk: EncodedTextChunk, or anything with `.tokens`.

        Raises:
            ValueError: The chunk has no tokens (an image, for example), or ids that are not integers.
        """
        made = ModelInput()
        made._tokens = np.concatenate([self._tokens, model_input_tokens([chunk], "chunk")])
        return made

    def append_int(self, token: int) -> "ModelInput":
        """A new ModelInput with a token after its own."""
        return self.append(EncodedTextChunk([token]))

    @property
    def chunks(self) -> list[EncodedTextChunk]:
        """The tokens as one chunk."""
        return [EncodedTextChunk(self.to_ints())]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def to_ints(self) -> list[int]:
        """Token ids as a Python list."""
        return self._tokens.tolist()

    def to_numpy(self) -> npt.NDArray[np.int64]:
        """Token ids, int64 [length], sharing memory."""
        return self._tokens

    def __repr__(self) -> str:
        return f"ModelInput(length={self.length})"


def _token_array(tokens: Any, where: str) -> npt.NDArray[np.int64]:
    array = to_array(token_ids_of(tokens, where))
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(
            f"{where} must be a one-dim sequence of integers, got dtype {array.dtype} and shape {list(array.shape)}."
        )
    return array.astype(np.int64, copy=False)


def model_input_tokens(model_input: Any, where: str) -> npt.NDArray[np.int64]:
    """Token ids of anything that stands for a model input: ours, tinker's (by `.chunks`), chunks, plain token ids, or
    what a tokenizer returned.

    Returns:
        int64 [N].

    Raises:
        ValueError: A chunk has no tokens (an image, for example), or ids are not integers.
    """
    if isinstance(model_input, ModelInput):
        return model_input.to_numpy()
    chunks = getattr(model_input, "chunks", model_input)
    first = chunks[0] if isinstance(chunks, list) and chunks else None
    if first is not None and not isinstance(first, int | float | Sequence | Mapping) and not hasattr(first, "shape"):
        for number, chunk in enumerate(chunks):
            if not hasattr(chunk, "tokens"):
                raise ValueError(
                    f"{where}.chunks[{number}] is a {type(chunk).__name__} without tokens; Gradwire takes text only."
                )
        return np.concatenate([_token_array(chunk.tokens, where) for chunk in chunks])
    return _token_array(chunks, where)


@dataclass
class Datum:
    """One training sequence.

    Attributes:
        model_input: The N tokens the model reads.
        loss_fn_inputs: Per-token inputs of the loss by name, each [N] or [N, K]; "target_tokens" (int64) always.
            Lists, numpy arrays and torch tensors become TensorData.

    Raises:
        InvalidArgumentError: loss_fn_inputs is not a mapping, or a value is not a tensor; names it.
    """

    model_input: Any
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loss_fn_inputs = {
            name: TensorData.of(value, f'loss_fn_inputs["{name}"]')
            for name, value in check_loss_fn_inputs("loss_fn_inputs", self.loss_fn_inputs).items()
        }


def check_loss_fn_inputs(where: str, inputs: Any) -> Mapping[str, Any]:
    """Loss inputs by name.

    Raises:
        InvalidArgumentError: INVALID_FIELD: they are not a mapping, or a name is not a string.
    """
    if not isinstance(inputs, Mapping):
        raise invalid_field(where, f"is a {type(inputs).__name__}; it must be a dict of per-token inputs by name.")
    for name in inputs:
        if not isinstance(name, str):
            raise invalid_field(where, f"has the key {name!r}; names of inputs are text.")
    return inputs
