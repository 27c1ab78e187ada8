"""Run Python's clients against a server, and print a line of JSON for each run.

    python runs.py ADDRESS MODEL NAMES JOBS

NAMES are those of files, with_NAME.py, with commas. JOBS is a list of [client, form, number of
runs, runs at a time] in JSON, or the word "list". client_matrix.py starts this with the Python of
a venv.
"""

import importlib
import json
import logging
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from case import CASES


def run(client: str, form: str, n: int) -> dict[str, Any]:
    """One run as a line."""
    start = time.monotonic()
    line: dict[str, Any] = {"client": client, "form": form, "n": n}
    arguments = (form, n) if form.startswith("json") else (form,)
    try:
        line |= CASES[client, form](*arguments)
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {error}"[:600]
    return line | {"seconds": round(time.monotonic() - start, 2)}


def main() -> None:
    names, jobs = sys.argv[3:5]
    os.environ |= {"OPENAI_AGENTS_DISABLE_TRACING": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    for name in names.split(","):
        importlib.import_module(f"with_{name}")
    if jobs == "list":
        print(json.dumps(list(CASES)))
        return
    for client, form, count, at_once in json.loads(jobs):
        with ThreadPoolExecutor(at_once) as pool:
            runs = [pool.submit(run, client, form, n) for n in range(count)]
            for one in runs:
                print(json.dumps(one.result(), default=str), flush=True)


if __name__ == "__main__":
    main()
