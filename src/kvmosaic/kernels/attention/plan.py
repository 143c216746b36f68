"""How one store is read on an NVIDIA GPU."""

from dataclasses import dataclass

QUERIES, TOKENS = 4, 32
"""Of a block of threads and of a warp, where codes lie token by token (streams.cuh)."""


def pitch(size: int) -> int:
    """As in streams.cuh: bytes from one token's codes to the next in shared memory."""
    return size + 16 if size % 32 == 0 else size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is compiled for a store, and in how many parts its tokens are read."""

    file: str
    macros: dict[str, str]
    chunks: int  # of tokens, as a warp takes them
    units: tuple[int, ...] = (1,)  # how many in a row a warp may take
    overhead: float  # of beginning and ending a part, in chunks
    queries: int  # of a KV head, that a block of threads takes
    warps: int
    shared: int = 0  # bytes of a block, beside those that the source declares
    rotation: int | None = None  # of what the codes see, its seed
    apart: bool = False  # exact tokens have a part of their own
