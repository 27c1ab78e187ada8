"""The chat templates that come with a checkpoint: name -> Jinja template; "default" is the one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral.checkpoints.reader import blaming
from mistral.errors import shown
from mistral.files import optional_json, read_file
from mistral.unreadable import is_there

_KEY = "tokenizer.chat_template"
_LONGEST = 1 << 20  # bytes of a template; those in use have some thousands


def folder_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Those of a folder in Hugging Face's layout. CheckpointError for a file that is not text.

    Files of their own replace what tokenizer_config.json has, as in transformers. A template there
    that is empty is not one; an empty file is a download that did not finish.
    """
    templates = _listed(tokenizer_config.get("chat_template"))
    old = folder / "chat_template.json"
    templates |= _listed(optional_json(old).get("chat_template"))
    default = folder / "chat_template.jinja"
    if is_there(default):
        templates["default"] = _text(default)
    with blaming(folder):
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[path.stem] = _text(path)
        _require_unicode(templates)
    return templates


def gguf_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Those of a GGUF file."""
    templates = {}
    for key, value in metadata.items():
        if isinstance(value, str) and value:
            if key == _KEY:
                templates["default"] = value
            elif key.startswith(f"{_KEY}."):
                templates[key.removeprefix(f"{_KEY}.")] = value
    return templates


def saved_templates(templates: Mapping[str, str]) -> str | list[dict[str, str]] | None:
    """What tokenizer_config.json has as chat_template; None without templates."""
    if set(templates) == {"default"}:
        return templates["default"]
    return [{"name": name, "template": text} for name, text in templates.items()] or None


def _listed(value: Any) -> dict[str, str]:
    """A template alone, or a list of {"name", "template"}, or an object of both."""
    if isinstance(value, str) and value:
        return {"default": value}
    if isinstance(value, dict):
        return {name: text for name, text in value.items() if isinstance(text, str) and text}
    templates = {}
    for entry in value if isinstance(value, list) else []:
        if isinstance(entry, dict):
            name = entry.get("name")
            text = entry.get("template")
            if isinstance(name, str) and isinstance(text, str) and text:
                templates[name] = text
    return templates


def _text(path: Path) -> str:
    with blaming(path):
        text = read_file(path, _LONGEST).decode("utf-8")
        if not text:
            raise ValueError("it is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as transformers reads it


def _require_unicode(templates: Mapping[str, str]) -> None:
    """ValueError for half a character in a template or its name, which could not be written."""
    for name, text in templates.items():
        try:
            (name + text).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the chat template {shown(name)} is not valid Unicode") from error
