"""Formats of texts, as grammars have them: one expression each, and what no expression can say."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable

from llamactor import _core

Check = Callable[[str], bool]

_DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_ZONE = "([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_TIME = rf"([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?{_ZONE}"
_HEX = "[0-9a-fA-F]"
_LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL})*"
_ATOM = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]+"
_CLOCK = "T([0-9]+H([0-9]+M)?([0-9]+S)?|[0-9]+M([0-9]+S)?|[0-9]+S)"
_DAYS = "([0-9]+Y([0-9]+M)?([0-9]+D)?|[0-9]+M([0-9]+D)?|[0-9]+D)"
_URI = r"[a-zA-Z][a-zA-Z0-9+.-]*:([a-zA-Z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9a-fA-F]{2})*"


def _matches(pattern: str) -> Check:
    compiled: list[_core.Pattern] = []

    def check(text: str) -> bool:
        if not compiled:
            compiled.append(_core.Pattern(f"^({pattern})$"))
        return compiled[0].search(text)

    return check


def _parses(parse: Callable[[str], object]) -> Check:
    def check(text: str) -> bool:
        try:
            parse(text)
        except ValueError:
            return False
        return True

    return check


def _both(first: Check, second: Check) -> Check:
    return lambda text: first(text) and second(text)


def _is_date(text: str) -> bool:
    return _parses(lambda day: datetime.date.fromisoformat(day[:10]))(text)


FORMATS: dict[str, Check] = {
    "date": _both(_matches(_DATE), _is_date),
    "time": _matches(_TIME),
    "date-time": _both(_matches(f"{_DATE}[Tt]{_TIME}"), _is_date),
    "duration": _matches(f"P({_DAYS}({_CLOCK})?|{_CLOCK}|[0-9]+W)"),
    "uuid": _matches(f"{_HEX}{{8}}-({_HEX}{{4}}-){{3}}{_HEX}{{12}}"),
    "email": _matches(rf"{_ATOM}(\.{_ATOM})*@{_HOST}"),
    "hostname": _both(_matches(_HOST), lambda text: len(text) <= 253),
    "ipv4": _parses(ipaddress.IPv4Address),
    "ipv6": _both(lambda text: "%" not in text, _parses(ipaddress.IPv6Address)),
    "uri": _matches(_URI),
}
"""Whether a text is in a format, by the format's name."""
