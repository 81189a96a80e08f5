"""Numbers of bytes and seconds in the unit that a person would choose."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(num_bytes: int) -> str:
    """Returns a number of bytes, e.g. ``12.3 MiB``."""
    amount, unit = float(num_bytes), 0
    while amount >= 1024 and unit + 1 < len(_UNITS):
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.1f} {_UNITS[unit]}" if unit else f"{num_bytes} B"


def duration(seconds: float) -> str:
    """Returns a time, e.g. ``41 s`` or ``0.3 ms``."""
    amount, unit = seconds, "s"
    if seconds < 0.1:
        amount, unit = (1e3 * seconds, "ms") if seconds >= 1e-4 else (1e6 * seconds, "µs")
    return f"{amount:,.0f} {unit}" if amount >= 9.95 or amount == 0 else f"{amount:.1f} {unit}"
