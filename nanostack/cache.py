"""What attention keeps of the tokens behind it, while a text is written."""

from torch import Tensor


class KVCache:
    """Keys and values of one layer so far, rotated to their positions: `length` tokens of each row."""

    def __init__(self, capacity: int):
        """`capacity`: tokens of a row at most; memory is taken with the first."""
        self.capacity, self.length = capacity, 0

    def append(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, these included. ValueError for what attention's causal mask, which is square, cannot serve."""
        B, T, G, K = k_BTGK.shape
        if self.length and T != 1:
            raise ValueError(f"a cache that holds {self.length} tokens takes one more at a time, not {T}")
        if not self.length:
            self.k, self.v = (x.new_empty(B, self.capacity, G, K) for x in (k_BTGK, v_BTGK))
        new = slice(self.length, self.length + T)
        self.k[:, new], self.v[:, new] = k_BTGK, v_BTGK
        self.length += T
        return self.k[:, : self.length], self.v[:, : self.length]
