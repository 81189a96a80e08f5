"""Random streams that depend on names alone, never on how work was spread."""

import hashlib


def derive_seed(root: int, *keys: str | int) -> int:
    """Returns a 63-bit seed that is a pure function of `root` and `keys`.

    The same trial, fold, episode or step gets the same stream on any number of workers and after any resume:
    ``derive_seed(seed, "epoch", 3)``.
    """
    text = "\x1f".join([str(root), *(f"{type(key).__name__}:{key}" for key in keys)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
