"""Checkpoints by name from a hub: "owner/repo", or "owner/repo:Q4_K_M" for one of its GGUFs.

huggingface_hub downloads, with its cache, its offline mode (HF_HUB_OFFLINE=1) and its settings
(HF_HOME, HF_ENDPOINT, HF_TOKEN). Only the files that are needed are requested: most repositories
hold the weights twice.
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

from mistral.checkpoints.safetensors_files import INDEX, WEIGHTS, shards
from mistral.errors import CheckpointError

_BESIDE_SAFETENSORS = (
    "generation_config.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "tokenizer.model",
)
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
_QUANTISATION = re.compile(r"(IQ|TQ|Q|F|BF|MXFP|NVFP)\d", re.IGNORECASE)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")


def download(source: str, revision: str | None) -> Path:
    """The local path of the folder or GGUF file that `source` names, after the download.

    Raises CheckpointError, with what the repository has, for a repository, revision or quantisation
    that is not available.
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
    except Exception as error:  # the HTTP client's, if a connection breaks; they differ by version
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise CheckpointError(
            f"{source} could not be downloaded ({reason}); run it again: complete files are kept"
        ) from error
    return paths[0] if wanted[0].endswith(".gguf") else paths[0].parent


def is_name(source: str) -> bool:
    """Whether a text has the form of a name on the hub."""
    return _NAME.fullmatch(source) is not None


def choose_files(
    source: str, files: Iterable[str], quantisation: str | None, fetch: Callable[[str], Path]
) -> list[str]:
    """The files of a repository that are needed; the first one is the one to open.

    fetch  downloads a file by name and returns its local path: the index of sharded weights names
           the shards

    Raises CheckpointError, with what there is, if there is no complete checkpoint, or not exactly
    one quantisation that fits.
    """
    files = set(files)
    if quantisation is not None:
        return _choose_gguf(source, files, quantisation)
    if "config.json" in files and (WEIGHTS in files or INDEX in files):
        if "tokenizer.model" not in files:
            raise CheckpointError(
                f"{source} has no tokenizer.model; name a folder to which you have added it"
            )
        weights = [WEIGHTS] if WEIGHTS in files else [INDEX, *sorted(shards(fetch(INDEX)))]
        return ["config.json", *weights, *(name for name in _BESIDE_SAFETENSORS if name in files)]
    if "params.json" in files:
        both = ("consolidated.safetensors", "consolidated.00.pth")
        weights = [name for name in both if name in files][:1]
        tokenizers = sorted(name for name in files if name.startswith("tokenizer.model"))
        if not weights or not tokenizers:
            missing = "tokenizer" if weights else "weights"
            raise CheckpointError(f"{source} has params.json, but no {missing} in the same folder")
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
        part = _SPLIT.search(stem)
        sets.setdefault((_SPLIT.sub("", stem), int(part[2]) if part else 1), []).append(name)
    whole = {}
    for (stem, total), names in sets.items():
        if len(names) == total:
            whole[stem] = names
    chosen = list(whole)
    if quantisation is not None:
        # "_" separates only a whole quantisation from the name: Q4_K_M contains "_" itself.
        before = "[./_-]" if _QUANTISATION.match(quantisation) else "[./-]"
        ending = re.compile(rf"(^|{before}){re.escape(quantisation)}($|/)", re.IGNORECASE)
        chosen = [stem for stem in whole if ending.search(stem)]
    if not whole:
        raise CheckpointError(f"{source} has {'no whole' if sets else 'no'} GGUF file")
    if len(chosen) != 1:
        problem = "has several"
        if quantisation is not None:
            problem = "is ambiguous" if chosen else "is not there"
        raise CheckpointError(
            f"{source} {problem}; name one as {source.partition(':')[0]}:Q4_K_M. "
            f"There is: {', '.join(whole)}"
        )
    return whole[chosen[0]]


def _files(repo: str, revision: str | None) -> list[str]:
    """Names of the repository's files; if the hub does not answer, of those in the cache."""
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        return [file.rfilename for file in info.siblings]
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):  # it did answer
        raise
    except Exception:  # which one depends on the HTTP client of the installed version
        cached = huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
        folder = Path(cached)
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _fetch(repo: str, name: str, revision: str | None) -> Path:
    return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))
