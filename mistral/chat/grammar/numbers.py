"""Numbers within bounds, as terminals of a grammar, with exact bounds.

An integer is written in digits alone: in JSON 27.0 is an integer, too, but many programs refuse it.
This narrows what a model may write; it never changes what it wrote.

Any other number may have each form of JSON: plain (-12.50), or with an exponent (1.25e1). All plain
ones are here. With bounds, one with an exponent has one digit before its point, and each power of
ten is allowed as a whole if all of its numbers are within the bounds.
"""

import functools
from decimal import Decimal
from fractions import Fraction
from typing import Any

_WHOLE = r"(0|[1-9][0-9]*)"
_POWERS = range(-323, 308)  # of ten that a float can hold
Bound = tuple[Fraction, bool] | None  # and whether it is exclusive
_KEYWORDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf")


def number_terminal(schema: dict[str, Any], integer: bool) -> str | None:
    """The numbers that the keywords of numbers allow; "" if there are none.

    None for a `multipleOf` that is not 1, 0.1, 0.01 and so on: these are not computed here.
    """
    return _terminal(tuple((key, schema[key]) for key in _KEYWORDS if key in schema), integer)


@functools.lru_cache(1000)
def _terminal(keywords: tuple[tuple[str, float], ...], integer: bool) -> str | None:
    schema = dict(keywords)
    places = 0 if integer else None  # digits after the point
    if "multipleOf" in schema:
        step = Decimal(str(schema["multipleOf"])).normalize()
        if step.as_tuple().digits != (1,) or step > 1:
            return None
        step_places = -int(step.as_tuple().exponent)
        places = step_places if places is None else min(places, step_places)
    low, high = _bounds(schema, "minimum", max), _bounds(schema, "maximum", min)
    return _signed(low, high, places, plain=True, exponents=not integer)


def number_exponents(schema: dict[str, Any]) -> str:
    """Numbers with an exponent that are a multiple whatever their digits; "" if there are none."""
    step = Fraction(str(schema["multipleOf"]))
    tens = [power for power in range(-16, 17) if (Fraction(10) ** power / step).denominator == 1]
    if not tens:
        return ""
    low, high = _bounds(schema, "minimum", max), _bounds(schema, "maximum", min)
    return _signed(low, high, -tens[0], plain=False, exponents=True)


def _signed(low: Bound, high: Bound, places: int | None, plain: bool, exponents: bool) -> str:
    mirrored = tuple(None if bound is None else (-bound[0], bound[1]) for bound in (high, low))
    positive = _magnitudes(low, high, places, plain, exponents)
    negative = _magnitudes(*mirrored, places, plain, exponents)
    options = [positive] if positive else []
    options += [f'"-" ({negative})'] if negative else []
    return " | ".join(options)


def _bounds(schema: dict[str, Any], key: str, choose: Any) -> Bound:
    exclusive = f"exclusive{key.capitalize()}"
    found = []
    for name in (key, exclusive):
        if name in schema:
            found.append((Fraction(str(schema[name])), name == exclusive))
    if len(found) == 2 and found[0][0] == found[1][0]:
        return found[1]
    return choose(found) if found else None


def _magnitudes(low: Bound, high: Bound, places: int | None, plain: bool, exponents: bool) -> str:
    """The numbers without a sign within the bounds; "" if there are none.

    plain      whether those without an exponent are among them
    exponents  whether those with one are; without them, a whole number has digits alone
    """
    if high is not None and (high[0] < 0 or (high[0] == 0 and high[1])):
        return ""
    if low is not None and low[0] < 0:
        low = None
    if low is not None and high is not None:
        empty = low[0] > high[0] or (low[0] == high[0] and (low[1] or high[1]))
        if empty or (places is not None and not _has_multiple(low, high, places)):
            return ""
    digits = r"(\.[0-9]+)?"
    if places is not None:
        digits = rf"(\.[0-9]{{1,{places}}}0*)?" if places > 0 else r"(\.0+)?"
    if not exponents:
        digits = ""
    within = [f"/{_WHOLE}{digits}/"]
    if low is not None:
        within.append(f"/{_above(*low)}/")
    if high is not None:
        within.append(f"~/{_above(high[0], not high[1])}/")
    options = [" & ".join(within)] * plain
    if exponents:
        powers = [power for power in _POWERS if _within(power, low, high)]
        bounded = high is not None or (low is not None and low[0] > 0)
        options += _exponents(powers, places, bounded)
    return " | ".join(options)


def _has_multiple(low: tuple, high: tuple, places: int) -> bool:
    scale = Fraction(10) ** places
    first = low[0] * scale
    first = first.__floor__() + 1 if low[1] else first.__ceil__()
    return first < high[0] * scale or (first == high[0] * scale and not high[1])


def _within(power: int, low: Bound, high: Bound) -> bool:
    first = Fraction(10) ** power
    above = low is None or first > low[0] or (first == low[0] and not low[1])
    return above and (high is None or 10 * first <= high[0])


def _exponents(powers: list[int], places: int | None, bounded: bool) -> list[str]:
    """The numbers with an exponent; for `places` as many digits after the point as it may have."""
    found = []
    if places is None:
        found.append((r"(\.[0-9]+)?", powers))
    else:
        fractions = {power: min(power + places, 16) for power in powers if power + places >= 0}
        for most in range(17):  # digits: no float has more
            group = [power for power, digits in fractions.items() if digits == most]
            found.append((rf"(\.[0-9]{{1,{most}}})?" if most else "", group))
    options = []
    for fraction, group in found:
        options += [f"[1-9]{fraction}[eE]({_written(group)})"] * bool(group)
        small = [power for power in group if power < 290]  # a float can hold the number
        if small and not bounded:
            options.append(f"[1-9][0-9]{{1,15}}{fraction}[eE]({_written(small)})")
    if places is None and -323 in powers:
        options.append(r"[5-9](\.[0-9]+)?[eE]-324")  # less is 0
    if places is None and not bounded:
        options.append(r"1(\.[0-6][0-9]*|\.7[0-8]?|\.79[0-6][0-9]*|\.797[0-9]{0,13})?[eE]\+?308")
        options.append(r"0\.[0-9]*[1-9][0-9]*[eE]([+-]?0?[0-9])")
    return [f"/{option}/" for option in options]


def _written(powers: list[int]) -> str:
    above = "|".join(str(power) for power in powers if power >= 0)
    below = "|".join(str(-power) for power in powers if power < 0)
    return "|".join([rf"\+?0?({above})"] * bool(above) + [f"-0?({below})"] * bool(below))


def _above(bound: Fraction, exclusive: bool) -> str:
    """A pattern of the plain numbers without a sign that are at least `bound`, or above it."""
    text = format(Decimal(bound.numerator) / Decimal(bound.denominator), "f")
    whole, _, fraction = text.partition(".")
    fraction = fraction.rstrip("0")
    any_fraction = r"(\.[0-9]+)?"
    # 1. More digits before the point, or a greater one.
    options = [rf"[1-9][0-9]{{{len(whole)},}}{any_fraction}"]
    for i, digit in enumerate(whole):
        if digit != "9":
            rest = f"[0-9]{{{len(whole) - i - 1}}}"
            options.append(f"{whole[:i]}[{int(digit) + 1}-9]{rest}{any_fraction}")
    # 2. The same ones, and a greater digit after the point.
    for i, digit in enumerate(fraction):
        if digit != "9":
            options.append(rf"{whole}\.{fraction[:i]}[{int(digit) + 1}-9][0-9]*")
    # 3. The same ones after the point, too, and more than zeros after them if it must be greater.
    more = "[0-9]*[1-9][0-9]*" if exclusive else "[0-9]*"
    if fraction or exclusive:
        options.append(rf"{whole}\.{fraction}{more}")
    else:
        options.append(f"{whole}{any_fraction}")
    return f"({'|'.join(options)})"
