"""An adapter's folder to a repository on the hub: the files that the adapter is used with, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from lowrank.errors import InputError
from lowrank.weights.cards import FILE as CARD
from lowrank.weights.cards import is_made
from lowrank.weights.files.adapter_file import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from lowrank.weights.files.notes import note_files

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write."
_REFUSED = {
    401: ("the hub does not accept the token", _LOG_IN),
    403: ("the token may not write to {name}", "Give a name of your own (user/name), or log in with a token that may."),
}


def files_for_hub(folder: str | Path) -> list[Path]:
    """What of an adapter's folder belongs on the hub: weights, config, tokenizer and templates, system prompt, card.

    Checkpoints, logs, metrics, the report and the run's config stay: they hold rows of the data and names of folders.

    Raises:
        InputError: it holds no adapter in peft's form.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", fix="Give the folder of a run, or of an adapter.")
    open_adapter(folder)
    parts = [folder / CONFIG_NAME, folder / WEIGHTS_NAME]
    if not all(file.is_file() for file in parts):
        raise InputError(
            f"{folder} holds an adapter in another form than peft's, which the hub knows",
            fix=f"Write it in peft's form first (lowrank export {folder} OUT --to peft), and upload that.",
        )
    card = [folder / CARD] if (folder / CARD).is_file() else []
    return [*card, *parts, *note_files(folder)]


def base_elsewhere(folder: str | Path) -> str | None:
    """The base that the adapter names, where that is a folder and no name on the hub."""
    base = open_adapter(folder).base
    return base if base is not None and not is_hub_name(base) else None


def is_hub_name(name: str) -> bool:
    """Whether a base's name is one on the hub: it could be, and no folder here has it."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def refuse_no_name(name: str) -> None:
    """Raises InputError where no repository can have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"{name!r} cannot be the name of a repository", fix="Write user/name: letters, digits, -, _ and dots."
        ) from error


def upload(
    folder: str | Path,
    name: str,
    *,
    files: Sequence[Path] | None = None,
    private: bool = False,
    token: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Adapter",
) -> tuple[str, list[str]]:
    """Uploads an adapter in one commit; the repository is made where it is missing.

    Args:
        folder: Of the adapter.
        name: Of the repository, user/name; without a user it is the token's.
        files: What of the folder goes; by default `files_for_hub`.
        private: Whether a repository that is made is private.
        token: What to write with; by default the one that this machine is logged in with.
        create_pr: Whether the commit is proposed as a pull request.
        commit_message: Its summary.

    Returns:
        The repository's address, and what there is to say about the upload.

    Raises:
        InputError: there is no adapter, no token or no network, or the hub refuses.
    """
    folder, going = Path(folder), list(files_for_hub(folder) if files is None else files)
    refuse_no_name(name)
    if (token or get_token()) is None:
        raise InputError("no token for the hub is known here", fix=_LOG_IN)
    api = HfApi(token=token)
    with _told_what_to_do(name, api.endpoint):
        repo = api.create_repo(name, private=private or None, exist_ok=True)
        notes = []
        if folder / CARD in going and _card_is_kept(api, repo.repo_id, folder / CARD):
            going.remove(folder / CARD)
            notes.append(f"the repository's {CARD} was changed there: it stays as it is")
        operations = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in going]
        api.create_commit(repo.repo_id, operations, commit_message=commit_message, create_pr=create_pr)
    return str(repo), notes


def _card_is_kept(api: HfApi, repo: str, card: Path) -> bool:
    """Whether the repository's card is a person's, and ours is not."""
    if not is_made(card.read_text(encoding="utf-8")):
        return False
    with TemporaryDirectory() as place:
        try:
            there = Path(api.hf_hub_download(repo, CARD, local_dir=place))
        except RemoteEntryNotFoundError:
            return False
        return not is_made(there.read_text(encoding="utf-8", errors="replace"))


@contextmanager
def _told_what_to_do(name: str, endpoint: str) -> Iterator[None]:
    """Makes of the hub's errors, and of those on the way to it, what a person can act on."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise InputError("HF_HUB_OFFLINE is set: nothing goes to the hub", fix="Unset it to upload.") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no repository {name}, or the token does not see it", fix=f"Check the name. {_LOG_IN}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        what, fix = _REFUSED.get(status, ("the hub answers {status}: {error}", "Try again later."))
        told = error.server_message or str(error).splitlines()[0]
        raise InputError(what.format(name=name, status=status, error=told), where=endpoint, fix=fix) from error
    except (HTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise InputError(
            f"the hub cannot be reached ({type(error).__name__})",
            where=endpoint,
            fix="Check the network, a proxy (HTTPS_PROXY) and HF_ENDPOINT; --dry-run needs none of them.",
        ) from error
