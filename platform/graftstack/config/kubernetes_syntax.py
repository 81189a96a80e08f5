"""The small grammars of Kubernetes: names, labels, quantities and versions.

Sources: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/,
https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/.
"""

import re
from decimal import Decimal

_DNS_1123 = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
_SUFFIXES = {
    **{
        suffix: Decimal(10) ** power
        for suffix, power in zip("numkMGTPE", (-9, -6, -3, 3, 6, 9, 12, 15, 18), strict=True)
    },
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", start=1)},
    "": Decimal(1),
}


def is_dns_1035_label(name: str) -> bool:
    """Whether `name` is lower-case letters, digits and dashes, begins with a letter, and has at most 63 of them."""
    return len(name) <= 63 and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) is not None


def is_dns_1123_label(name: str) -> bool:
    """Whether `name` is lower-case letters, digits and dashes, and has at most 63 of them."""
    return len(name) <= 63 and re.fullmatch(_DNS_1123, name) is not None


def is_dns_1123_subdomain(name: str) -> bool:
    """Whether `name` is such labels with dots between them, of at most 253 characters: the name of most objects."""
    return len(name) <= 253 and re.fullmatch(rf"{_DNS_1123}(\.{_DNS_1123})*", name) is not None


def is_label_key(key: str) -> bool:
    """Whether `key` may be the key of a label: a word of at most 63 characters, and perhaps ``PREFIX/`` before it."""
    prefix, slash, word = key.rpartition("/")
    is_word = len(word) <= 63 and re.fullmatch(_WORD, word) is not None
    return is_word and (not slash or is_dns_1123_subdomain(prefix))


def is_label_value(value: str) -> bool:
    """Whether `value` may be the value of a label: empty, or a word of at most 63 characters."""
    return len(value) <= 63 and re.fullmatch(rf"({_WORD})?", value) is not None


def quantity(text: str | float) -> Decimal:
    """Returns an amount of a resource: ``quantity("1.5Gi") == 1.5 * 1024**3``, ``quantity("500m") == 0.5``.

    Raises:
        ValueError: it isn't one.
    """
    found = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([eE][+-]?\d+)|([numkMGTPE]|[KMGTPE]i)?)", str(text))
    if found is None:
        raise ValueError(f"{text!r} is no quantity")
    number, exponent, suffix = found.groups()
    return Decimal(number + (exponent or "")) * _SUFFIXES[suffix or ""]


def times(text: str, factor: int) -> str:
    """Returns a multiple of a quantity in its own unit: ``times("1.5Gi", 4) == "6Gi"``."""
    found = re.fullmatch(r"([\d.]+)(.*)", text)
    assert found is not None, text
    product = Decimal(found[1]) * factor
    return f"{product.normalize():f}{found[2]}"


def version(text: str) -> tuple[int, ...]:
    """Returns the numbers of a version, for comparison: ``version("2.52.0rc1") == (2, 52, 0)``.

    Raises:
        ValueError: it has no two numbers.
    """
    found = re.match(r"v?(\d+(?:\.\d+)+)", text)
    if found is None:
        raise ValueError(f"{text!r} is no version")
    return tuple(map(int, found[1].split(".")))
