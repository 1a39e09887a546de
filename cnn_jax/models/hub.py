"""Downloads pretrained weights from the Hugging Face hub.

The package huggingface_hub keeps the files in its cache, by default in
`~/.cache/huggingface/hub`. Files in the cache are used without a network.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from cnn_jax.inference.bundle_files import file_sha256
from cnn_jax.models import NETWORKS
from cnn_jax.system.errors import ConfigError, UserError, WeightsError, closest, did_you_mean

# A model id, OWNER/NAME, with an optional revision, OWNER/NAME@REVISION.
_MODEL_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_KEY = "config.model.pretrained"
_WEIGHTS, _CONFIG, _CARD = "model.safetensors", "config.json", "README.md"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class HubModel:
    """The downloaded files and the metadata of a model on the hub.

    Attributes:
      name: The model id with its revision, OWNER/NAME@REVISION. The revision is the hash of a
        commit, so that the name always means the same files.
      weights: The path of the safetensors file in the cache.
      sha256: The sha256 of the safetensors file.
      config: The content of config.json; empty if the model has no such file.
      license: The licence in the model card, such as "apache-2.0"; empty if there is none.
    """

    name: str
    weights: pathlib.Path
    sha256: str
    config: dict[str, Any]
    license: str


def is_model_id(name: str) -> bool:
    """Returns whether a value of `model.pretrained` names a model on the hub, and not a path."""
    is_path = name.startswith((".", "~")) or name.endswith(".safetensors")
    return bool(_MODEL_ID.fullmatch(name)) and not is_path and not pathlib.Path(name).exists()


def absolute(name: str) -> str:
    """Makes a path in `model.pretrained` absolute; returns all other values unchanged."""
    return (
        name
        if name == "auto" or is_model_id(name)
        else str(pathlib.Path(name).expanduser().resolve())
    )


def download(name: str) -> HubModel:
    """Downloads the files of a model that are not in the cache yet.

    Args:
      name: OWNER/NAME or OWNER/NAME@REVISION, where the revision is a branch, a tag or a commit.
        The default is the latest revision.

    Raises:
      ConfigError: There is no such model or revision, it has no safetensors file, it needs a
        login, or huggingface_hub is not installed.
      WeightsError: The hub cannot be reached, or a file is damaged.
    """
    match = _MODEL_ID.fullmatch(name)
    assert match is not None
    model_id, revision = match.groups()
    config = _file(model_id, revision, _CONFIG)
    # The cache stores the files of a revision in a folder that is named after the commit.
    revision = config.parent.name if config is not None else revision
    weights = _file(model_id, revision, _WEIGHTS)
    if weights is None:
        raise ConfigError(
            f"{_KEY}: {name} has no {_WEIGHTS}; choose a model with this file, such as those of "
            "timm at https://huggingface.co/timm"
        )
    revision = weights.parent.name
    card = _file(model_id, revision, _CARD, is_required=False)
    return HubModel(
        name=f"{model_id}@{revision}",
        weights=weights,
        sha256=_checked_sha256(weights, name),
        config=_read_config(config, name) if config is not None else {},
        license=_read_license(card) if card is not None else "",
    )


def _file(
    model_id: str, revision: str | None, filename: str, is_required: bool = True
) -> pathlib.Path | None:
    """Downloads a file of a model if necessary; returns the path of the file in the cache.

    Args:
      model_id: OWNER/NAME.
      revision: A branch, a tag or a commit; None for the latest revision.
      filename: The name of the file.
      is_required: Whether an error is raised if the file cannot be downloaded.

    Returns:
      The path, or None if the model has no such file.

    Raises:
      ConfigError: See `download`.
      WeightsError: See `download`.
    """
    try:
        # The import sets the log level of huggingface_hub, so it must precede `_without_warnings`.
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise ConfigError(
            f"{_KEY}: {model_id} is a model of the Hugging Face hub, which needs "
            "pip install 'cnn_jax[hub]'; or set the path of a safetensors file"
        ) from error
    try:
        with _without_warnings():
            path = hf_hub_download(model_id, filename, revision=revision)
        return pathlib.Path(path)
    except errors.EntryNotFoundError as error:
        # LocalEntryNotFoundError means that the file is not in the cache and the hub did not
        # answer. It is a subclass of EntryNotFoundError.
        if not is_required or not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refused(model_id, revision, error.__cause__) from error
        raise _unreachable(model_id, error) from error
    except errors.HfHubHTTPError as error:
        if not is_required:
            return None
        raise _refused(model_id, revision, error) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{_KEY}: {model_id} is not a model id, OWNER/NAME") from error
    except Exception as error:
        # The HTTP library and its errors differ between the versions of huggingface_hub.
        if isinstance(error, OSError) and error.errno is not None:
            raise  # For example, the disk is full.
        if not is_required:
            return None
        raise WeightsError(
            f"{_KEY}: the download of {filename} of {model_id} was cut off "
            f"({_first_line(error)}); start the same command again"
        ) from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides the warnings of huggingface_hub, such as a warning for each failed download attempt."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _unreachable(model_id: str, error: Exception) -> UserError:
    """Returns the error for a model that is not in the cache if the hub cannot be reached."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return WeightsError(
            f"{_KEY}: {model_id} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; "
            "unset it once to download the model, or set the path of a safetensors file"
        )
    return WeightsError(
        f"{_KEY}: {model_id} is not in {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} does "
        f"not answer ({_first_line(error.__cause__ or error)}); check the connection, or set the "
        "path of a safetensors file"
    )


def _refused(model_id: str, revision: str | None, error: Exception) -> UserError:
    """Returns the error for a request that the hub refused."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return ConfigError(
            f"{_KEY}: {model_id} has terms of use; accept them at {constants.ENDPOINT}/{model_id}, "
            "then run: hf auth login"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ConfigError(
            f"{_KEY}: there is no path {model_id}, and {constants.ENDPOINT} has no such model"
            f"{_suggestion(model_id) or '; for a private model, run: hf auth login'}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(
            f"{_KEY}: {model_id} has no revision {revision}; see "
            f"{constants.ENDPOINT}/{model_id}/commits"
        )
    return WeightsError(
        f"{_KEY}: {constants.ENDPOINT} refused {model_id} ({_first_line(error)}); try again later, "
        "or set the path of a safetensors file"
    )


def _suggestion(model_id: str) -> str:
    """Returns a hint for an error message: similar model ids, or "" if no id is similar."""
    owner, _, name = model_id.partition("/")
    network = re.split(r"[.-]", name)[0]
    found: list[str] = []
    for search in dict.fromkeys([network, closest(network, NETWORKS)]):
        if search and not found:
            found = list(_search(owner, search))
    if longer := [other for other in found if other.startswith(model_id)][:3]:
        return f"; did you mean {' or '.join(longer)}?"
    return did_you_mean(model_id, found, count=3)


def _search(owner: str, text: str) -> Iterator[str]:
    """Yields the ids of an owner's models that contain `text`; yields none if the hub fails."""
    import huggingface_hub

    try:
        for model in huggingface_hub.HfApi().list_models(author=owner, search=text, limit=100):
            yield model.id
    except Exception:
        return


def _checked_sha256(path: pathlib.Path, name: str) -> str:
    """Returns the sha256 of a file in the Hugging Face cache, compared with the sha256 on the hub.

    Raises:
      WeightsError: The file differs from the file on the hub.
    """
    digest = file_sha256(path)
    # In the cache, the name of a large file is the sha256 of the file on the hub.
    blob = path.resolve()
    if _SHA256.fullmatch(blob.name) and blob.name != digest:
        raise WeightsError(
            f"{_KEY}: the download of {name} is damaged: its sha256 differs from the hub's; "
            f"delete {blob}, then start the same command again"
        )
    return digest


def _read_config(path: pathlib.Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{_KEY}: {_CONFIG} of {name} cannot be read ({error}); delete {path.resolve()}, then "
            "start the same command again"
        ) from error
    return config


def _read_license(card: pathlib.Path) -> str:
    """Returns the licence in the metadata of a model card; empty if there is none."""
    import huggingface_hub

    try:
        metadata = huggingface_hub.metadata_load(card) or {}
    except Exception:  # People write the YAML metadata by hand, so it may be invalid.
        return ""
    text = metadata.get("license_name") if metadata.get("license") == "other" else None
    return str(text or metadata.get("license") or "")


def _first_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
