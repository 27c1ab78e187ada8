"""Texts for the model, after a call without a result or an invalid answer.

The texts after a failed call are in the words of the model's makers: the model may call again. What
is said of a function that ran, or may have run, is never an invitation to call it again.
`prompts.write_error` puts the texts in a tag. In the source some of these tags are not closed:
https://github.com/NousResearch/Hermes-Function-Calling
"""

_AGAIN = "Please call this function again with correct arguments"
_IN_TAGS = " within XML tags <tool_call></tool_call>"
_TWICE = "The same call has failed twice in a row: do not repeat it. Answer without it"


def not_readable(problem: str, repeated: bool = False) -> str:
    """The model wrote a call that cannot be parsed.

    repeated  for the second time in a row
    """
    return (
        f"There was an error parsing function calls\nHere's the error stack trace: {problem}\n"
        f"{_TWICE if repeated else 'Please call the function again with correct syntax'}"
    )


def not_valid(name: str, problem: str, tags: bool = True, repeated: bool = False) -> str:
    """The function does not exist, or its schema does not allow the arguments.

    tags      whether the format has calls in tags
    repeated  the same call of the previous answer failed
    """
    return (
        f"There was an error validating function call against function signature: {name}\n"
        f"Here's the error traceback: {problem}\n{_advice(tags, repeated)}"
    )


def not_executed(name: str, problem: str, tags: bool = True, repeated: bool = False) -> str:
    """The function raised an exception; the arguments are those of `not_valid`."""
    return (
        f"There was an error when executing the function: {name}\n"
        f"Here's the error traceback: {problem}\n{_advice(tags, repeated)}"
    )


def not_started(name: str) -> str:
    """The answer ended before this call was run."""
    return f"The function {name} was not called: the answer ended before. Nothing has happened"


def unfinished(name: str, problem: str) -> str:
    """The function was started, and whether it has done its work is not known."""
    return (
        f"The function {name} was started, and its outcome is not known: {problem}\n"
        "It may have done its work, or may still do it. Do not repeat this call; "
        "say that its outcome is not known"
    )


def as_text(problem: str, text: str) -> str:
    """The function ran, and its result is described because JSON cannot hold it."""
    return f"The function ran. JSON cannot hold its result ({problem}), which is, as text: {text}"


def shortened(begin: str, end: str, size: int) -> str:
    """The function ran, and of its result of `size` characters only a part is shown."""
    return (
        f"{begin} ... [the function ran; its result of {size:,} characters is too long, and "
        f"{size - len(begin) - len(end):,} in its middle are left out] ... {end}"
    )


def not_json(attempt: int, problem: str) -> str:
    """An answer in JSON mode is not valid.

    In the source the model sees the error alone; here it sees its answer, too.
    """
    return (
        f"Agent iteration {attempt} to assist with user query\nJson schema validation failed\n"
        f"Here's the error stacktrace: {problem}\nPlease return correct json object"
    )


def _advice(tags: bool, repeated: bool) -> str:
    return _TWICE if repeated else _AGAIN + _IN_TAGS * tags
