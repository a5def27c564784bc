"""The Hugging Face hub: upload an exported prompt, and look up a base model's licence.

The library's own client does the work; its address, token and offline mode are the usual ones
(HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import BadInput, JobFailed, OrchestratorError, Unreachable
from orchestrator.job.spec import BUILTIN, looks_like_path
from orchestrator.utils.text import first_line, mask_secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard

ANSWER_SECONDS = 10.0
"""Longest wait for the hub before anything is written."""
LICENCE_SECONDS = 3.0
SMOLLM2_LICENCE = "apache-2.0"
README = "README.md"


def check_repository(repository: str) -> None:
    """Raise an error unless a new repository of this name can probably be created on the hub.

    Raises BadInput for a bad name, a missing or wrong token and a repository that exists, and
    Unreachable if the hub does not answer or must not be asked.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    _check_name(repository)
    if constants.is_offline_mode():
        raise Unreachable(
            f"HF_HUB_OFFLINE is set, so {repository} can't be uploaded",
            "unset HF_HUB_OFFLINE, or export without --push and upload the folder later",
        )
    if not get_token():
        raise BadInput(
            "there is no token for the hub, which --push needs",
            f"set HF_TOKEN to a token that may write, from {_endpoint()}/settings/tokens, or log "
            "in with: hf auth login",
        )
    try:
        HfApi().repo_info(repository, timeout=ANSWER_SECONDS)
    except RepositoryNotFoundError as error:
        if not isinstance(error, GatedRepoError):
            return
    except Exception as error:  # of the hub's client and of the HTTP client below it
        raise _explained(error, repository) from None
    raise _exists(
        repository,
        f"name a new repository, or export without --push, then: hf upload {repository} DIR .",
    )


def push_folder(folder: Path, repository: str, card: ModelCard, private: bool) -> str:
    """Create a repository on the hub, upload the folder and return the repository's address.

    The hub checks the card's metadata first. The folder is only read. Raises BadInput for what the
    hub refuses and Unreachable if it does not answer.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        _validate(card)
        address = str(api.create_repo(repository, private=private or None))
        _upload(api, folder, repository)
    except Exception as error:  # of the hub's client, of the libraries below it, or our own
        failure = _explained(error, repository)
        later = f"hf upload {repository} {shlex.quote(str(folder))} ."
        raise type(failure)(
            f"{failure.message}; {folder} is complete and was not uploaded",
            f"{failure.hint}, then: {later}",
        ) from None
    return mask_secrets(address)


def _validate(card: ModelCard) -> None:
    """Have the hub check the card. Raises JobFailed with what the hub finds wrong."""
    try:
        card.validate()
    except ValueError as error:
        raise JobFailed(
            f"the hub refuses the card's metadata: {_faults(str(error))}",
            f"correct the metadata in the folder's {README}",
        ) from None


def _faults(answer: str) -> str:
    """Return the messages in the hub's answer about a card, or the answer itself."""
    with suppress(ValueError, KeyError, TypeError):
        return "; ".join(fault["message"] for fault in json.loads(answer)["errors"])
    return first_line(answer)


def _upload(api: HfApi, folder: Path, repository: str) -> None:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shows_bars = not are_progress_bars_disabled()
    disable_progress_bars()  # for a few kilobytes
    try:
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload a soft prompt with prompt-orchestrator",
        )
    finally:
        if shows_bars:
            enable_progress_bars()


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    reason = "it needs an owner"
    if "/" in repository:
        try:
            validate_repo_id(repository)
            return
        except HFValidationError as error:
            reason = first_line(error)
    raise BadInput(
        f"--push {repository!r} names no repository of the hub: {reason}",
        "write OWNER/NAME, for instance ann/sms-spam-prompt",
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return mask_secrets(str(constants.ENDPOINT))


def _exists(repository: str, hint: str) -> BadInput:
    return BadInput(
        f"{repository} exists already on {_endpoint()}, and nothing is written over it", hint
    )


def _explained(error: Exception, repository: str) -> OrchestratorError:
    """Make the error for whatever the hub's client raised."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, OrchestratorError):
        return error
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repository)
    if isinstance(error, ValueError):
        return JobFailed(
            f"the hub's client refuses the folder: {first_line(error)}", "correct the folder"
        )
    return Unreachable(
        f"the hub at {_endpoint()} does not answer: {first_line(error, with_type=True)}",
        "connect to the network, or set HF_ENDPOINT to the hub's address",
    )


def _refused(error: Any, repository: str) -> OrchestratorError:
    """Make the error for the hub's answer."""
    status = int(error.response.status_code)
    owner = repository.partition("/")[0]
    tokens = f"{_endpoint()}/settings/tokens"
    if status == 401:
        return BadInput(
            "the hub does not accept the token: it is wrong or has expired",
            f"set HF_TOKEN to a token that may write, from {tokens}",
        )
    if status in (403, 404):
        return BadInput(
            f"the token may not write to {repository} on the hub",
            f"use a token that may write to repositories of {owner}, from {tokens}, or your own "
            "name as the owner",
        )
    if status == 409:
        return _exists(repository, "make sure that its files may be replaced")
    if status == 429 or status >= 500:
        return Unreachable(f"the hub answers {status}", "wait a little")
    reason = error.server_message or error
    return BadInput(f"the hub refuses {repository}: {first_line(reason)}", "correct that")


# Licences


def base_licence(base_model: str, revision: str) -> str:
    """Return the licence of a base model as its own card names it; empty if it is not known.

    Cards are looked for in the model's folder, in the hub's cache and on the hub.
    """
    if base_model.startswith(BUILTIN):
        return SMOLLM2_LICENCE if "smollm2" in base_model else ""
    with suppress(Exception):  # a licence is worth a look, and no failure
        return _licence_of_card(base_model, revision)
    return ""


def _licence_of_card(base_model: str, revision: str) -> str:
    from huggingface_hub import HfApi, ModelCard, constants, try_to_load_from_cache

    folder = Path(base_model).expanduser()
    if folder.is_dir() or looks_like_path(base_model):
        return _named(ModelCard.load(folder / README).data)
    cached = try_to_load_from_cache(base_model, README, revision=revision)
    if isinstance(cached, str):
        return _named(ModelCard.load(cached).data)
    if constants.is_offline_mode():
        return ""
    info = HfApi().model_info(base_model, revision=revision, timeout=LICENCE_SECONDS)
    return _named(info.card_data)


def _named(data: Any) -> str:
    """Return the licence that a card's metadata name, with its own name if it has one."""
    licence = data.get("license")
    names = licence if isinstance(licence, list) else [licence]
    own = [data.get("license_name"), data.get("license_link")] if "other" in names else []
    return " ".join(str(name) for name in (*names, *own) if name)
