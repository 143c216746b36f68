"""How one store is read on an NVIDIA GPU."""

from dataclasses import dataclass


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
