"""Checkpoints by name from a hub: "owner/repo", or "owner/repo:Q4_K_M" for one quantisation of a GGUF repository.

huggingface_hub does the downloading, with its cache, its offline mode (HF_HUB_OFFLINE=1) and its settings (HF_HOME,
HF_ENDPOINT, HF_TOKEN). Only the files that are needed are asked for: most repositories hold the weights twice.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mistral.checkpoints.safetensors_files import INDEX, WEIGHTS
from mistral.errors import CheckpointError

BESIDE_SAFETENSORS = ("generation_config.json", "tokenizer_config.json", "added_tokens.json", "tokenizer.model")
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")


def download(source: str, revision: str | None) -> Path:
    """The local path of what `source` names: a folder in Hugging Face's or Mistral's layout, or a GGUF file.

    CheckpointError, with what there is, for a repository, revision or quantisation that cannot be had.
    """
    repo, _, quantisation = source.partition(":")
    try:
        files = _files(repo, revision)
        wanted = choose_files(source, files, quantisation or None, lambda name: _fetch(repo, name, revision))
        paths = [_fetch(repo, name, revision) for name in wanted]
    except GatedRepoError as error:
        raise CheckpointError(f"{repo} asks you to accept its terms on its page, and to set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"there is no folder and no repository {repo}, or HF_TOKEN gives no access") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(f"{source} is not in the cache, and the hub cannot be reached") from error
    except (EntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{source} cannot be downloaded: {str(error).splitlines()[0]}") from error
    return paths[0] if wanted[0].endswith(".gguf") else paths[0].parent


def is_name(source: str) -> bool:
    """Whether a text has the form of a name on the hub."""
    return NAME.fullmatch(source) is not None


def choose_files(
    source: str, files: Iterable[str], quantisation: str | None, fetch: Callable[[str], Path]
) -> list[str]:
    """The files of a repository that are needed, the one to open first.

    fetch(name) gives the local path of a file: the index of sharded weights must be read to know the shards.
    """
    files = set(files)
    if quantisation is not None:
        return _choose_gguf(source, files, quantisation)
    if "config.json" in files and (WEIGHTS in files or INDEX in files):
        weights = [WEIGHTS] if WEIGHTS in files else [INDEX, *_shards(fetch(INDEX))]
        return ["config.json", *weights, *(name for name in BESIDE_SAFETENSORS if name in files)]
    if "params.json" in files:
        weights = [name for name in ("consolidated.safetensors", "consolidated.00.pth") if name in files][:1]
        tokenizers = sorted(name for name in files if name.startswith("tokenizer.model"))
        return ["params.json", *weights, *tokenizers]
    if any(name.endswith(".gguf") for name in files):
        return _choose_gguf(source, files, None)
    raise CheckpointError(f"{source} has no config.json with safetensors, no params.json and no GGUF file")


def _choose_gguf(source: str, files: set[str], quantisation: str | None) -> list[str]:
    """One GGUF file, or all files of a split set, by the end of its name: model.Q4_K_M.gguf, model-q4_k_m.gguf."""
    sets: dict[str, list[str]] = {}
    for name in sorted(name for name in files if name.endswith(".gguf")):
        sets.setdefault(SPLIT.sub("", name.removesuffix(".gguf")), []).append(name)
    if quantisation is not None:
        ending = re.compile(rf"(^|[./-]){re.escape(quantisation)}$", re.IGNORECASE)
        chosen = [stem for stem in sets if ending.search(stem)]
    else:
        chosen = list(sets)
    if len(chosen) != 1:
        there = ", ".join(re.split(r"[./-]", stem)[-1] for stem in sets) or "no GGUF file"
        what = "needs a quantisation" if quantisation is None else "is ambiguous" if chosen else "is not there"
        raise CheckpointError(f"{source} {what}; name one as {source.partition(':')[0]}:NAME. There is: {there}")
    return sets[chosen[0]]


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} has no weight_map: {error}") from error


def _files(repo: str, revision: str | None) -> list[str]:
    """Names of the repository's files; where the hub does not answer, of those that the cache has."""
    try:
        return [file.rfilename for file in huggingface_hub.HfApi().model_info(repo, revision=revision).siblings]
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):  # it did answer
        raise
    except Exception:  # which one depends on the HTTP client of the installed version
        folder = Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _fetch(repo: str, name: str, revision: str | None) -> Path:
    return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
