"""Errors for the model, after a failed call or an invalid answer, in the words of its makers.

`prompts.write_error` puts them in a tag. In the source some of these tags are not closed:
https://github.com/NousResearch/Hermes-Function-Calling
"""

_AGAIN = "Please call this function again with correct arguments"
_IN_TAGS = " within XML tags <tool_call></tool_call>"


def not_readable(problem: str) -> str:
    """The model wrote a call that cannot be parsed."""
    return (
        f"There was an error parsing function calls\nHere's the error stack trace: {problem}\n"
        "Please call the function again with correct syntax"
    )


def not_valid(name: str, problem: str, tags: bool = True) -> str:
    """The function does not exist, or its schema does not allow the arguments.

    tags  whether the format has calls in tags
    """
    return (
        f"There was an error validating function call against function signature: {name}\n"
        f"Here's the error traceback: {problem}\n{_AGAIN}{_IN_TAGS * tags}"
    )


def not_executed(name: str, problem: str, tags: bool = True) -> str:
    """The function failed, returned a value that JSON cannot hold, or took too long."""
    return (
        f"There was an error when executing the function: {name}\n"
        f"Here's the error traceback: {problem}\n{_AGAIN}{_IN_TAGS * tags}"
    )


def not_json(attempt: int, problem: str) -> str:
    """An answer in JSON mode is not valid.

    In the source the model sees the error alone; here it sees its answer, too.
    """
    return (
        f"Agent iteration {attempt} to assist with user query\nJson schema validation failed\n"
        f"Here's the error stacktrace: {problem}\nPlease return correct json object"
    )
