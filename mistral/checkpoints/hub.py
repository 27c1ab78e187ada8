"""Checkpoints by name from a hub: "owner/repo", or "owner/repo:Q4_K_M" for one quantisation of a
GGUF repository.

huggingface_hub does the downloading, with its cache, its offline mode (HF_HUB_OFFLINE=1) and its
settings (HF_HOME, HF_ENDPOINT, HF_TOKEN). Only the files that are needed are asked for: most
repositories hold the weights twice.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mistral.checkpoints.safetensors_files import INDEX, WEIGHTS, is_file_name
from mistral.errors import CheckpointError
from mistral.files import read_json

BESIDE_SAFETENSORS = (
    "generation_config.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "tokenizer.model",
)
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
QUANTISATION = re.compile(r"(IQ|TQ|Q|F|BF|MXFP|NVFP)\d", re.IGNORECASE)
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")


def download(source: str, revision: str | None) -> Path:
    """The local path of what `source` names: a folder in Hugging Face's or Mistral's layout, or a
    GGUF file.

    CheckpointError, with what there is, for a repository, revision or quantisation that cannot be
    had.
    """
    repo, _, quantisation = source.partition(":")
    try:
        files = _files(repo, revision)
        wanted = choose_files(
            source, files, quantisation or None, lambda name: _fetch(repo, name, revision)
        )
        paths = [_fetch(repo, name, revision) for name in wanted]
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} asks you to accept its terms on its page, and to set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder and no repository {repo}, or HF_TOKEN gives no access"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{source} is not in the cache, and the hub cannot be reached"
        ) from error
    except CheckpointError:
        raise
    except (
        Exception
    ) as error:  # the HTTP client's own errors, when a connection breaks: they differ by version
        reason = str(error).strip().splitlines()
        message = (
            f"{source} could not be downloaded "
            f"({reason[0] if reason else type(error).__name__}); run it again"
        )
        raise CheckpointError(f"{message}: what is complete is kept") from error
    return paths[0] if wanted[0].endswith(".gguf") else paths[0].parent


def is_name(source: str) -> bool:
    """Whether a text has the form of a name on the hub."""
    return NAME.fullmatch(source) is not None


def choose_files(
    source: str, files: Iterable[str], quantisation: str | None, fetch: Callable[[str], Path]
) -> list[str]:
    """The files of a repository that are needed, the one to open first.

    fetch(name) gives the local path of a file: the index of sharded weights must be read to know
    the shards. CheckpointError, with what there is, where no complete checkpoint or not just one
    quantisation fits.
    """
    files = set(files)
    if quantisation is not None:
        return _choose_gguf(source, files, quantisation)
    if "config.json" in files and (WEIGHTS in files or INDEX in files):
        if "tokenizer.model" not in files:
            raise CheckpointError(
                f"{source} has no tokenizer.model; name a folder to which you have added it"
            )
        weights = [WEIGHTS] if WEIGHTS in files else [INDEX, *_shards(fetch(INDEX))]
        return ["config.json", *weights, *(name for name in BESIDE_SAFETENSORS if name in files)]
    if "params.json" in files:
        weights = [
            name for name in ("consolidated.safetensors", "consolidated.00.pth") if name in files
        ][:1]
        tokenizers = sorted(name for name in files if name.startswith("tokenizer.model"))
        if not weights or not tokenizers:
            raise CheckpointError(
                f"{source} has params.json, but no {'tokenizer' if weights else 'weights'} beside "
                f"it"
            )
        return ["params.json", *weights, *tokenizers]
    if any(name.endswith(".gguf") for name in files):
        return _choose_gguf(source, files, None)
    raise CheckpointError(
        f"{source} has no config.json with safetensors, no params.json and no GGUF file"
    )


def _choose_gguf(source: str, files: set[str], quantisation: str | None) -> list[str]:
    """One GGUF file, or all files of a split set, by the end of its name or by its folder.

    model.Q4_K_M.gguf, model-q4_k_m-00001-of-00002.gguf, Q4_K_M/model.gguf
    """
    sets: dict[tuple[str, int], list[str]] = {}
    for name in sorted(name for name in files if name.endswith(".gguf")):
        stem = name.removesuffix(".gguf")
        part = SPLIT.search(stem)
        sets.setdefault((SPLIT.sub("", stem), int(part[2]) if part else 1), []).append(name)
    whole = {stem: names for (stem, total), names in sets.items() if len(names) == total}
    chosen = list(whole)
    if quantisation is not None:
        # "_" parts a name only before a whole quantisation: Q4_K_M has some of its own.
        before = "[./_-]" if QUANTISATION.match(quantisation) else "[./-]"
        ending = re.compile(rf"(^|{before}){re.escape(quantisation)}($|/)", re.IGNORECASE)
        chosen = [stem for stem in whole if ending.search(stem)]
    if not whole:
        raise CheckpointError(f"{source} has {'no whole' if sets else 'no'} GGUF file")
    if len(chosen) != 1:
        there = ", ".join(whole)
        what = (
            "is ambiguous"
            if len(chosen) > 1 and quantisation
            else "is not there"
            if quantisation
            else "has several"
        )
        raise CheckpointError(
            f"{source} {what}; name one as {source.partition(':')[0]}:Q4_K_M. There is: {there}"
        )
    return whole[chosen[0]]


def _shards(index: Path) -> list[str]:
    places = read_json(index).get("weight_map")
    names = (
        set(places.values())
        if isinstance(places, dict) and all(map(is_file_name, places.values()))
        else None
    )
    if not names:
        raise CheckpointError(f"{index} has no weight_map of file names")
    return sorted(names)


def _files(repo: str, revision: str | None) -> list[str]:
    """Names of the repository's files; where the hub does not answer, of those that the cache
    has.
    """
    try:
        return [
            file.rfilename
            for file in huggingface_hub.HfApi().model_info(repo, revision=revision).siblings
        ]
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):  # it did answer
        raise
    except Exception:  # which one depends on the HTTP client of the installed version
        folder = Path(
            huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
        )
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _fetch(repo: str, name: str, revision: str | None) -> Path:
    return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
