"""Language modelling over memory-mapped files of token ids, as tokenisers of large corpora write them.

Axis letters: B windows of a batch, N tokens of a window, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Unpack

import numpy as np
from torch import Tensor

from ...errors import ConfigError, OptionError
from ...schema import AtLeast, Between, Count, Size
from .text import Splits, WindowOptions, Windows


class TokenFiles(Windows, name="token_bin"):
    """Token ids of `.bin` files: one array of little-endian integers without a header, mapped, not read into memory.

    `loss`, nats per token, is the primary metric; its positions are those of `Windows`.

    Args:
        train: file of the training tokens.
        val: file of the validation tokens; None takes the last `val_fraction` of `train`.
        test: file of the test tokens; None for no test split.
        dtype: of the files.
        vocab_size: number of ids; a larger id in the data is an error.
        val_fraction: see `val`.
        eval_tokens: most tokens of validation and of test, from their beginning; None for all.
        separator: id that ends a document, needed for `packed`.
        sequence_length, windows: see `Windows`.

    Raises:
        ConfigError: a file that is missing, empty or not a whole number of tokens; an id out of range; `packed` without
            a separator.
    """

    metric: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False

    @classmethod
    def tried_with(cls, folder: Path) -> dict[str, Any] | None:
        (np.arange(2000, dtype=np.uint16) % 50).tofile(folder / "train.bin")
        return {"train": str(folder / "train.bin"), "vocab_size": 50, "val_fraction": 0.2, "sequence_length": 32}

    def __init__(
        self,
        *,
        train: str,
        vocab_size: Annotated[int, AtLeast(2)],
        val: str | None = None,
        test: str | None = None,
        dtype: Literal["uint16", "uint32"] = "uint16",
        val_fraction: Annotated[float, Between(0, 1, above=True, below=True)] = 0.01,
        eval_tokens: Annotated[int, AtLeast(2)] | None = None,
        separator: Count | None = None,
        sequence_length: Size = 1024,
        **windows: Unpack[WindowOptions],
    ) -> None:
        super().__init__(sequence_length=sequence_length, **windows)
        self.files = {"train": train, "val": val, "test": test}
        self.tokens_in_data = vocab_size
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.val_fraction = val_fraction
        self.eval_tokens = eval_tokens
        if self.packed and separator is None:
            raise OptionError("separator", "`packed` needs the id that ends a document.")
        if separator is not None and separator >= vocab_size:
            raise OptionError("separator", f"{separator} is not an id of the vocabulary, [0, {vocab_size}).")
        self.separator = separator

    def _map(self, split: str, name: str) -> np.ndarray:
        path = Path(name).expanduser()
        if not path.is_file():
            raise ConfigError(f"task.{split}: there is no file {path}.")
        size = path.stat().st_size
        if size == 0 or size % self.dtype.itemsize:
            raise ConfigError(
                f"task.{split}: {path} has {size:,} bytes, not a whole number of {self.dtype.name} tokens (task.dtype)."
            )
        return np.memmap(path, self.dtype, mode="r")

    def load(self) -> Splits:
        streams = {split: self._map(split, name) for split, name in self.files.items() if name is not None}
        if "val" not in streams:
            whole = streams["train"]
            cut = len(whole) - max(1, round(len(whole) * self.val_fraction))
            streams = {**streams, "train": whole[:cut], "val": whole[cut:]}
        return {s: stream if s == "train" else stream[: self.eval_tokens] for s, stream in streams.items()}

    def check(self, tokens: Tensor, begin: Tensor) -> None:
        if int(tokens.max()) < self.tokens_in_data:
            return
        row, column = divmod(int(tokens.argmax()), tokens.shape[1])
        raise ConfigError(
            f"task.vocab_size: the token {int(tokens.max())} at place {int(begin[row]) + column} of the data is not "
            f"below {self.tokens_in_data}. Is task.dtype={self.dtype.name} right?"
        )
