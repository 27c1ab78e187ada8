"""Tools that people try first, those of the scripts among them, with requests in many wordings."""

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from demo.words import CITIES, COMPANIES, NAMES, is_held_out, split


class Round(NamedTuple):
    """One request, the call that answers it, its result, and what to say then."""

    request: str
    arguments: dict[str, Any]
    result: Any
    answer: str


_ZONES = {
    "Paris": "Europe/Paris", "London": "Europe/London", "Berlin": "Europe/Berlin", "Madrid": "Europe/Madrid",
    "Rome": "Europe/Rome", "Tokyo": "Asia/Tokyo", "Seoul": "Asia/Seoul", "Shanghai": "Asia/Shanghai",
    "Singapore": "Asia/Singapore", "Dubai": "Asia/Dubai", "Sydney": "Australia/Sydney", "Cairo": "Africa/Cairo",
    "Chicago": "America/Chicago", "Denver": "America/Denver", "New York": "America/New_York",
    "Los Angeles": "America/Los_Angeles", "Toronto": "America/Toronto", "Lima": "America/Lima",
}  # fmt: skip
_FACTORS = {
    ("kilometers", "miles"): 0.621371, ("miles", "kilometers"): 1.609344, ("meters", "feet"): 3.28084,
    ("feet", "meters"): 0.3048, ("inches", "centimeters"): 2.54, ("centimeters", "inches"): 0.393701,
    ("kilograms", "pounds"): 2.204623, ("pounds", "kilograms"): 0.453592, ("liters", "gallons"): 0.264172,
    ("gallons", "liters"): 3.785412, ("grams", "ounces"): 0.035274, ("ounces", "grams"): 28.349523,
}  # fmt: skip


def calculate(random: Random) -> Round:
    """Sums, spelled with signs or with words."""
    a = random.randint(2, 999)
    b = random.randint(2, 99)
    sign, word, value = random.choice(
        (
            ("+", "plus", a + b),
            ("-", "minus", a - b),
            ("*", "times", a * b),
            ("/", "divided by", round(a / b, 4)),
        )
    )
    expression = f"{a} {sign} {b}"
    in_words = f"{a} {word} {b}"
    if random.random() < 0.25:
        c = random.randint(2, 99)
        expression, value = random.choice(
            ((f"({a} + {b}) * {c}", (a + b) * c), (f"{a} + {b} * {c}", a + b * c))
        )
        in_words = expression
    said = random.choice((expression, in_words))
    forms = (
        "What is {}?",
        "Calculate {}.",
        "How much is {}?",
        "Compute {}",
        "Work out {} please.",
        "{} = ?",
        "{}",
    )
    answer = random.choice(
        (f"{expression} = {value}", f"The result is {value}.", f"{expression} is {value}.")
    )
    return Round(random.choice(forms).format(said), {"expression": expression}, value, answer)


def current_time(random: Random) -> Round:
    """The clock somewhere: the one tool whose argument is not in the request."""
    city, zone = random.choice([pair for pair in _ZONES.items() if not is_held_out(pair[0])])
    time = f"{random.randint(0, 23):02}:{random.randint(0, 59):02}"
    forms = (
        "What time is it in {}?",
        "Tell me the time in {}.",
        "Current time in {}?",
        "How late is it in {} now?",
    )
    result = f"2026-{random.randint(1, 12):02}-{random.randint(1, 28):02} {time}"
    return Round(
        random.choice(forms).format(city), {"timezone": zone}, result, f"It is {time} in {city}."
    )


def convert_units(random: Random) -> Round:
    """Lengths, weights and volumes."""
    (source, target), factor = random.choice(list(_FACTORS.items()))
    value = random.choice((random.randint(1, 500), round(random.uniform(0.5, 99), 1)))
    result = round(value * factor, 3)
    forms = (
        "Convert {v} {s} to {t}.",
        "How many {t} are {v} {s}?",
        "What is {v} {s} in {t}?",
        "{v} {s} in {t}?",
    )
    request = random.choice(forms).format(v=value, s=source, t=target)
    arguments = {"value": value, "from_unit": source, "to_unit": target}
    return Round(request, arguments, result, f"{value} {source} are {result} {target}.")


def count_words(random: Random) -> Round:
    """The words of a file, by its path."""
    stem = random.choice(
        ("README", "notes", "report", "main", "draft", "letter", "data", "poem", "chapter1", "todo")
    )
    folder = random.choice(("", "", "docs/", "src/", "/tmp/", "texts/"))
    path = folder + stem + random.choice((".md", ".txt", ".py"))
    forms = (
        "How many words are in {}?",
        "Count the words in {}.",
        "Word count of {}",
        "How long is {} in words?",
    )
    count = random.randint(10, 5000)
    answer = random.choice((f"{path} has {count} words.", f"There are {count} words in {path}."))
    return Round(random.choice(forms).format(path), {"path": path}, count, answer)


def get_stock_fundamentals(random: Random) -> Round:
    """The model card's example."""
    company, symbol = random.choice(split(COMPANIES, held_out=False)).split("=")
    pe = round(random.uniform(5, 90), 2)
    eps = round(random.uniform(0.5, 20), 2)
    forms = (
        "Fetch the stock fundamentals data for {c} ({s})",
        "Get the fundamentals of {s}.",
        "Show me the stock fundamentals for {c} ({s}).",
        "What are the fundamentals of {s}?",
    )
    result = {"symbol": symbol, "company_name": company, "pe_ratio": pe, "eps": eps}
    answer = f"The stock fundamentals data for {company} ({symbol}): P/E ratio {pe}, EPS {eps}."
    return Round(
        random.choice(forms).format(c=company, s=symbol), {"symbol": symbol}, result, answer
    )


def get_current_temperature(random: Random) -> Round:
    """The example of Hugging Face's documentation."""
    city = random.choice(split(CITIES, held_out=False))
    unit = random.choice(("celsius", "fahrenheit"))
    forms = (
        "What is the temperature in {c} in {u}?",
        "How warm is it in {c} in {u}?",
        "Temperature in {c}, in {u}.",
    )
    degrees = round(random.uniform(-10, 40), 1)
    request = random.choice(forms).format(c=city, u=unit)
    return Round(
        request,
        {"location": city, "unit": unit},
        degrees,
        f"It is {degrees} degrees {unit} in {city}.",
    )


def get_weather(random: Random) -> Round:
    """The tool that every tutorial begins with."""
    city = random.choice(split(CITIES, held_out=False))
    forms = (
        "What is the weather in {}?",
        "How is the weather in {}?",
        "What's the weather like in {} today?",
    )
    sky = random.choice(("sunny", "cloudy", "rainy", "windy", "foggy"))
    degrees = random.randint(-9, 39)
    result = {"condition": sky, "temperature": degrees}
    request = random.choice((*forms, "Weather in {}", "Give me the weather for {}.")).format(city)
    return Round(request, {"city": city}, result, f"It is {sky} in {city}, {degrees} degrees.")


def send_email(random: Random) -> Round:
    """Two texts in one request."""
    name = random.choice(split(NAMES, held_out=False))
    address = f"{name.lower()}@example.com"
    subject = random.choice(
        ("hello", "meeting tomorrow", "lunch", "the report", "happy birthday", "your invoice")
    )
    forms = (
        "Send an email to {a} about {s}.",
        "Write to {a} with the subject {s}.",
        "Email {a}: {s}",
    )
    arguments = {"to": address, "subject": subject}
    return Round(
        random.choice(forms).format(a=address, s=subject),
        arguments,
        "sent",
        f"The email to {address} was sent.",
    )


def _schema(
    name: str, description: str, returns: str = "string", **parameters: Any
) -> dict[str, Any]:
    """A function whose parameters are all required.

    Each is a text, the description of a string, or a schema.
    """
    properties = {
        key: {"type": "string", "description": given} if isinstance(given, str) else given
        for key, given in parameters.items()
    }
    inner = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "name": name,
        "description": description,
        "parameters": inner,
        "return": {"type": returns},
    }


# Each tool's schema, and what makes up requests for it
EVERYDAY: tuple[tuple[dict[str, Any], Callable[[Random], Round]], ...] = (
    (_schema("calculate", "Calculate an arithmetic expression.", "number",
             expression="The expression, such as 2 * (3 + 4)."), calculate),
    (_schema("current_time", "Tell the current date and time in a time zone.",
             timezone="The name of the time zone, such as Europe/Paris."), current_time),
    (_schema("convert_units", "Convert a length, a weight or a volume to another unit.", "number",
             value={"type": "number", "description": "How much of the first unit."},
             from_unit="The unit to convert from, such as kilometers.",
             to_unit="The unit to convert to, such as miles."), convert_units),
    (_schema("count_words", "Count the words of a text file.", "integer", path="The path of the file."), count_words),
    (_schema("get_stock_fundamentals", "Get fundamental data for a given stock symbol.", "object",
             symbol="The stock symbol."), get_stock_fundamentals),
    (_schema("get_current_temperature", "Get the current temperature at a location.", "number",
             location="The location to get the temperature for.",
             unit={"type": "string", "enum": ["celsius", "fahrenheit"],
                   "description": "The unit to return the temperature in."}), get_current_temperature),
    (_schema("get_weather", "Get the current weather in a city.", "object", city="The name of the city."), get_weather),
    (_schema("send_email", "Send an email.", to="The address of the recipient.", subject="What the email is about."),
     send_email),
)  # fmt: skip
