"""Checkpoints by name from a hub: "owner/repo", or "owner/repo:Q4_K_M" for one of its GGUFs.

huggingface_hub downloads, with its cache, its offline mode (HF_HUB_OFFLINE=1) and its settings
(HF_HOME, HF_ENDPOINT, HF_TOKEN). Only the files that are needed are requested: most repositories
hold the weights twice.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from mistral.checkpoints.consolidated import TOKENIZERS
from mistral.checkpoints.hugging_face_weights import choose_weights, is_file_name, shards
from mistral.checkpoints.other_kinds import other_kind
from mistral.checkpoints.reader import blaming
from mistral.errors import CheckpointError, one_line
from mistral.unreadable import is_there

_BESIDE_WEIGHTS = (
    "generation_config.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer.json",
    "chat_template.jinja",
    "chat_template.json",
)
_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(:(?P<quantisation>[\w.-]+))?")
_ADDRESS = re.compile(
    rf"(https?://)?(www\.)?(huggingface\.co|hf\.co)/|hf://|{re.escape(constants.ENDPOINT)}/"
)
_PLACE = re.compile(
    _NAME.pattern + r"(/(tree|blob|resolve|raw)/(?P<revision>[^/]+))?(/(?P<file>\w.*))?"
)
_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_QUANTISATION = re.compile(r"(IQ|TQ|Q|F|BF|MXFP|NVFP)\d", re.IGNORECASE)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)  # GGUF files of other kinds, by name

# Why the hub did not answer: (a pattern of the error, its meaning and the remedy)
_REASONS = [
    (r"OfflineModeIsEnabled", "offline: HF_HUB_OFFLINE is set"),
    (r"HTTP 401", "the hub refuses HF_TOKEN (401): set a valid one, or none"),
    (r"HTTP 403", "the hub forbids it (403): ask for access on the page, and set HF_TOKEN"),
    (r"HTTP 404", "the server does not know this address (404): check HF_ENDPOINT"),
    (r"HTTP 407|ProxyError", "the proxy refuses the request: check HTTPS_PROXY"),
    (r"HTTP 429", "too many requests (429): wait, or set HF_TOKEN"),
    (r"HTTP 5(?P<code>\d\d)", "the hub failed (5{code}): try again later"),
    (r"HTTP (?P<code>\d+)", "the hub answered with the status {code}"),
    (
        r"(?i)certificate",
        "the server's certificate is not trusted: {text}; set SSL_CERT_FILE to your network's",
    ),
    (
        r"JSONDecodeError|FileMetadataError",
        "the answer is not the hub's JSON but another page: a proxy or a login page, or a wrong "
        "HF_ENDPOINT",
    ),
    (r"No space left|Disk quota", "the disk is full: free space, or set HF_HOME to another"),
    (
        r"PermissionError|Read-only file system",
        "permission denied: the cache cannot be written ({text}); set HF_HOME to another folder",
    ),
    (
        r"(?i)name or service not known|name resolution|nodename|getaddrinfo",
        "no such host: no network, or a wrong HF_ENDPOINT",
    ),
    (r"(?i)time(d)? ?out", "no answer in time: check the network, or try again later"),
    (r"(?i)ssl|tls", "the encrypted connection was cut off ({text}): a proxy, or try again later"),
    (r"(?i)connect", "no connection: {text}"),
]


@dataclass(frozen=True)
class Name:
    """What a name on the hub says."""

    repo: str
    quantisation: str | None = None  # of one of its GGUF files
    revision: str | None = None
    file: str | None = None


def is_name(source: str) -> bool:
    """Whether a text has the form of a name on the hub: owner/repo or owner/repo:Q4_K_M."""
    return _NAME.fullmatch(source) is not None


def parse(source: str) -> Name | None:
    """What a name says, an address of a repository, its file, or owner/repo/name.gguf.

    None for another text. Raises CheckpointError for the address of a dataset or space.
    """
    place = source.strip().split("?")[0].split("#")[0].rstrip("/")
    address = _ADDRESS.match(place)
    if address:
        place = place[address.end() :]
        if place.startswith(("datasets/", "spaces/")):
            raise CheckpointError(f"{source} is not a model; name one as owner/repo")
    found = _PLACE.fullmatch(place)
    if found is None or (found["file"] and not address and not place.endswith(".gguf")):
        return None
    parts = found.groupdict()
    return Name(**parts)


def download(source: str, revision: str | None) -> Path:
    """The local path of the folder or GGUF file that `source` names, after the download.

    If the hub does not answer, the copy in the cache is used, with a warning. Raises
    CheckpointError, with what the repository has, for a repository, revision or quantisation that
    is not available.
    """
    from huggingface_hub import errors  # takes 0.2 s: it imports an HTTP client

    name = parse(source)
    repo = name.repo
    if revision and name.revision and revision != name.revision:
        raise ValueError(f"{source} names the revision {name.revision}, not {revision!r}")
    revision = revision or name.revision
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        files = [file.rfilename for file in info.siblings if _is_plain(file.rfilename)]
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"there is no file or folder {source} here, and no repository {repo} on the hub "
            "(or HF_TOKEN gives no access to it)"
        ) from error
    except errors.GatedRepoError as error:
        raise _gated(repo) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}") from error
    except Exception as error:  # the HTTP client's; they differ by version
        return _cached(source, name, revision, _reason(error))

    def fetch(file: str) -> Path:
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))

    try:
        wanted = _wanted(source, name, files, fetch)
        paths = [fetch(file) for file in wanted]
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise _gated(repo) from error
    except Exception as error:
        raise CheckpointError(
            f"{source} could not be downloaded ({_reason(error)}); run it again: complete files "
            "are kept"
        ) from error
    return paths[0] if wanted[0].endswith(".gguf") else paths[0].parent


def snapshot(repository: Path, revision: str = "main") -> Path:
    """The folder of a revision in a folder of the hub's cache, models--owner--repo.

    revision  a branch or tag that was downloaded by name, or a commit. If "main" does not exist,
              it is the only snapshot.

    Raises CheckpointError if the snapshot does not exist.
    """
    folder = repository / "snapshots"
    ref = repository / "refs" / revision
    with blaming(repository):
        commit = ref.read_text("utf-8", "replace").strip() if is_there(ref) else revision
        present = sorted(path.name for path in folder.iterdir()) if is_there(folder) else []
    if commit in present:
        return folder / commit
    if len(present) == 1 and revision == "main":
        return folder / present[0]
    if not present:
        raise CheckpointError(f"{repository} has no snapshot: download it again")
    raise CheckpointError(
        f"{repository} has no snapshot of {revision!r}; name one of {folder}: "
        f"{one_line(', '.join(present))}"
    )


def gguf_sets(names: Iterable[str]) -> dict[str, list[str]]:
    """The GGUF models among files: the name without its ending -> the file, or all of a split set.

    Incomplete sets are left out. Projectors of images (mmproj) and importance matrices are left out
    unless there is no other file.
    """
    sets: dict[tuple[str, int], list[str]] = {}
    for name in sorted(name for name in names if name.endswith(".gguf")):
        stem = name.removesuffix(".gguf")
        part = _SPLIT.search(stem)
        sets.setdefault((_SPLIT.sub("", stem), int(part[2]) if part else 1), []).append(name)
    whole = {stem: files for (stem, total), files in sets.items() if len(files) == total}
    models = {stem: files for stem, files in whole.items() if not _NO_MODEL.search(stem)}
    return models or whole


def choose_files(
    source: str, files: Iterable[str], quantisation: str | None, fetch: Callable[[str], Path]
) -> list[str]:
    """The needed files of a repository, the one to open first.

    fetch  downloads a file by name and returns its local path: the index of sharded weights names
           the shards

    Raises CheckpointError, with the files in the repository, if no checkpoint in it is complete, or
    if not exactly one quantisation fits.
    """
    files = set(files)
    if quantisation is not None:
        return _choose_gguf(source, files, quantisation)
    chosen = choose_weights(files)
    if "config.json" in files and chosen is not None:
        if files.isdisjoint(("tokenizer.model", "tokenizer.json")):
            raise CheckpointError(
                f"{source} has no tokenizer.model and no tokenizer.json; "
                "name a folder to which you have added them"
            )
        parts = sorted(shards(fetch(chosen))) if chosen.endswith(".json") else []
        others = [name for name in _BESIDE_WEIGHTS if name in files]
        templates = sorted(name for name in files if _TEMPLATE.fullmatch(name))
        return ["config.json", chosen, *parts, *others, *templates]
    if "params.json" in files:
        both = ("consolidated.safetensors", "consolidated.00.pth")
        weights = [name for name in both if name in files][:1]
        tokenizers = sorted(files.intersection(TOKENIZERS))
        if not weights or not tokenizers:
            missing = "tokenizer" if weights else "weights"
            raise CheckpointError(f"{source} has params.json, but no {missing} in the same folder")
        return ["params.json", *weights, *tokenizers]
    if any(name.endswith(".gguf") for name in files):
        return _choose_gguf(source, files, None)
    reason = "has no config.json with weights, no params.json and no GGUF file"
    if "config.json" in files:
        reason = "has config.json, but neither model.safetensors nor pytorch_model.bin"
    reason = other_kind(files, fetch) or reason
    raise CheckpointError(f"{source} {reason}")


def _is_plain(name: str) -> bool:
    """Whether a name in a repository's listing is that of a file below its folder."""
    return all(is_file_name(part) for part in name.split("/"))


def _choose_gguf(source: str, files: set[str], quantisation: str | None) -> list[str]:
    """One GGUF file, or all files of a split set, by the end of its name or by its folder.

    model.Q4_K_M.gguf, model-q4_k_m-00001-of-00002.gguf, Q4_K_M/model.gguf
    """
    whole = gguf_sets(files)
    chosen = list(whole)
    if quantisation is not None:
        # "_" separates only a whole quantisation from the name: Q4_K_M contains "_" itself.
        before = "[./_-]" if _QUANTISATION.match(quantisation) else "[./-]"
        ending = re.compile(rf"(^|{before}){re.escape(quantisation)}($|/)", re.IGNORECASE)
        chosen = [stem for stem in whole if ending.search(stem)]
    if not whole:
        some = any(name.endswith(".gguf") for name in files)
        raise CheckpointError(f"{source} has {'no whole' if some else 'no'} GGUF file")
    if len(chosen) != 1:
        problem = "has several"
        if quantisation is not None:
            problem = "is ambiguous" if chosen else "is not there"
        raise CheckpointError(
            f"{source} {problem}; name one as {source.partition(':')[0]}:Q4_K_M. "
            f"There is: {', '.join(whole)}"
        )
    return whole[chosen[0]]


def _wanted(source: str, name: Name, files: list[str], fetch: Callable[[str], Path]) -> list[str]:
    """`choose_files`, or the GGUF that the name spells: all files of its set."""
    if name.file is None:
        plain = f"{name.repo}:{name.quantisation}" if name.quantisation else name.repo
        return choose_files(plain, files, name.quantisation, fetch)
    for names in gguf_sets([file for file in files if file.endswith(".gguf")]).values():
        if name.file in names:
            return names
    if name.file in files:
        raise CheckpointError(f"{source} is one file of a checkpoint: name {name.repo}")
    ggufs = ", ".join(file for file in files if file.endswith(".gguf"))
    raise CheckpointError(
        f"there is no file {source} here, and {name.repo} on the hub has no {name.file}; "
        f"its GGUF files: {ggufs or 'none'}"
    )


def _cached(source: str, name: Name, revision: str | None, reason: str) -> Path:
    """The folder or file in the cache, if it is complete; `reason`: why the hub is not asked."""
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.repo.replace('/', '--')}"
    if not is_there(repository / "snapshots"):
        raise CheckpointError(
            f"there is no file or folder {source} here, {name.repo} is not in the cache, and the "
            f"hub cannot be reached ({reason})"
        )
    try:
        folder = snapshot(repository, revision or "main")
        paths = [path for path in folder.rglob("*") if is_there(path) and path.is_file()]
        files = [path.relative_to(folder).as_posix() for path in paths]
        wanted = _wanted(source, name, files, folder.joinpath)
        if missing := sorted(set(wanted) - set(files)):
            raise CheckpointError(f"{missing[0]} is missing")
    except CheckpointError as error:
        raise CheckpointError(
            f"the copy of {name.repo} in the cache is not complete, and the hub cannot be reached "
            f"({reason}): {error}"
        ) from error
    if not constants.HF_HUB_OFFLINE:
        warnings.warn(f"{source}: the copy in the cache is used; {reason}", stacklevel=4)
    return folder / wanted[0] if wanted[0].endswith(".gguf") else folder


def _gated(repo: str) -> CheckpointError:
    return CheckpointError(f"{repo} asks you to accept its terms on its page, and to set HF_TOKEN")


def _reason(error: BaseException | None) -> str:
    """Why something was not downloaded: the first of the chained errors that is known."""
    from huggingface_hub import errors  # as above

    texts = []
    while error is not None:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, errors.HfHubHTTPError):
            text = f"HTTP {error.response.status_code}"
        texts.append(one_line(text))
        error = error.__cause__ or error.__context__
    for pattern, sentence in _REASONS:
        for text in texts:
            if found := re.search(pattern, text):
                return sentence.format(text=text, **found.groupdict())
    return texts[0]
