"""Publishing checkpoints on the Hub, and checking published ones."""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import ModelInfo

from hf_r2.quantization.float_copy import dequantize
from hf_r2.report.card import CARD_NAME, RESULTS_FOLDER, build_card, render_card
from hf_r2.report.manifest import MANIFEST_NAME, Manifest
from hf_r2.report.verification import Check, verify_checkpoint

PUBLISHED = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md", ".png", ".yaml")
"""Suffixes of the files that are published. None of them is a pickle."""

_WEIGHTS = (".safetensors", ".safetensors.index.json")
_CONFLICT = 412
_Operation = CommitOperationAdd | CommitOperationDelete


def push(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str = "main",
    float_revision: str | None = None,
    message: str = "Upload model",
    token: str | None = None,
) -> CommitInfo:
    """Publish a checkpoint directory in one commit: weights, config, preprocessors, card, manifest and pictures.

    The repository is created if it is missing. Weights, results and a manifest that an earlier push left, and that this
    one does not have, are deleted in the same commit. Files that may hold a pickle stay home.

    The manifest notes where a compressed checkpoint is published, and the card is rendered with it, so that its lines
    to load the model can be pasted; a card that was edited by hand is pushed as it is.

    Args:
        directory: checkpoint, compressed or float.
        repo_id: `"user/name"`, or `"name"` for a repository of one's own.
        private: the repository must be private; one that is created is, and a public one is left alone.
        create_pr: open a pull request on an existing repository instead of committing to it.
        revision: branch to commit to, or that the pull request is for; a missing one begins at `main`.
        float_revision: branch that gets the decoded float weights, which transformers loads without hf_r2.
        message: first line of the commit.
        token: access token; that of `hf auth login` without.

    Returns:
        The commit; the head of the branch if nothing had changed.

    Raises:
        ValueError: for a directory that is no checkpoint or has no card, for a public repository that must be private
            (before anything is uploaded), and if somebody else commits to the branch in the meantime.
        HfHubHTTPError: the Hub's own error, for missing permissions and repositories.
    """
    directory = Path(directory)
    published_files(directory)
    compressed = bool(Manifest.load(directory).last("quantize"))
    if compressed and not (directory / CARD_NAME).is_file():
        raise ValueError(f"{directory} has no model card: write it with `hf-r2 card {directory}`")
    if float_revision is not None and not compressed:
        raise ValueError(f"{directory} is not compressed: its weights are float already, leave out the float revision")
    if float_revision is not None and create_pr:
        raise ValueError("a pull request has one branch: push the float revision without one")
    api = HfApi(token=token)
    repo_id = _require_repository(api, repo_id, private, create_pr)
    if float_revision is not None:
        _push_float_copy(api, directory, repo_id, float_revision, message)
    if compressed:
        _note_publication(directory, repo_id, float_revision)
    if not create_pr and revision != "main":
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return _commit(api, repo_id, published_files(directory), revision, create_pr, message)


def verify(
    source: str | os.PathLike[str],
    data: str | None = None,
    float_source: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> list[Check]:
    """Check a compressed checkpoint against its manifest and card, after downloading it if it is on the Hub.

    Args:
        source: `"user/name"`, `"user/name@revision"` (a branch, tag, commit or `refs/pr/1`), or a directory.
        data: see [`verify_checkpoint`], which checks the files.
        float_source: see [`verify_checkpoint`].
        token: access token; that of `hf auth login` without.

    Returns:
        One check a claim.

    Raises:
        ValueError: for a checkpoint without a manifest.
        HfHubHTTPError: the Hub's own error, for missing permissions, repositories and revisions.
    """
    directory = source
    if not os.path.isdir(source):
        name, _, revision = os.fspath(source).partition("@")
        patterns = [f"*{suffix}" for suffix in PUBLISHED]
        # Asked first, because without an answer the download would be content with an older copy in the cache
        commit = HfApi(token=token).model_info(name, revision=revision or None).sha
        directory = snapshot_download(name, revision=commit, allow_patterns=patterns, token=token)
    return verify_checkpoint(directory, data, float_source)


def published_files(directory: Path) -> dict[str, Path]:
    """List the files of a checkpoint directory that are published, by their path in the repository.

    Raises:
        ValueError: if they are no checkpoint of transformers in safetensors files.
    """
    files = [*directory.glob("*"), *directory.glob(f"{RESULTS_FOLDER}/*")]
    found = {path.relative_to(directory).as_posix(): path for path in sorted(files) if _is_published(path)}
    configured = "config.json" in found or "adapter_config.json" in found
    if not configured or not any(name.endswith(".safetensors") for name in found):
        raise ValueError(f"{directory} holds no config.json with safetensors weights: name a saved checkpoint")
    return found


def _is_published(path: Path) -> bool:
    """Tell whether a file is published; of safetensors files, those of a model: training leaves others to resume."""
    of_training = path.suffix == ".safetensors" and "model" not in path.name
    return path.is_file() and path.suffix in PUBLISHED and not path.name.startswith(".") and not of_training


def _require_repository(api: HfApi, repo_id: str, private: bool, create_pr: bool) -> str:
    """Create the repository unless it is there; look at its privacy, which creating again does not change."""
    if not create_pr:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"{repo_id} exists and is public, nothing was uploaded: make it private in its settings, or push without "
            "asking for a private repository"
        )
    return repo_id


def _push_float_copy(api: HfApi, directory: Path, repo_id: str, revision: str, message: str) -> None:
    api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        dequantize(directory, Path(scratch) / "float")
        files = published_files(Path(scratch) / "float")
        shown = {name: path for name, path in published_files(directory).items() if path.suffix in (".md", ".png")}
        _commit(api, repo_id, files | shown, revision, False, f"{message} (decoded float weights)")


def _note_publication(directory: Path, repo_id: str, float_revision: str | None) -> None:
    """Note in manifest and card where the checkpoint is published, once."""
    manifest = Manifest.load(directory)
    edited = (directory / CARD_NAME).read_text(encoding="utf-8") != str(build_card(manifest))
    facts = {"repo_id": repo_id, "float_revision": float_revision}
    known = manifest.last("publish")
    if {key: known.get(key) for key in facts} != facts:
        manifest.add("publish", **facts)
        manifest.save(directory)
    if not edited:
        render_card(directory)


# --- one commit -----------------------------------------------------------------------------------------------------


def _commit(
    api: HfApi, repo_id: str, files: Mapping[str, Path], revision: str, create_pr: bool, message: str
) -> CommitInfo:
    """Commit files on top of a branch's head in one request; find out what happened if its answer does not arrive."""
    head = api.model_info(repo_id, revision=revision)
    stale = [sibling.rfilename for sibling in head.siblings or [] if _is_replaced(sibling.rfilename)]
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations += [CommitOperationDelete(name) for name in stale if name not in files]
    options = {"commit_message": message, "revision": revision, "create_pr": create_pr, "parent_commit": head.sha}
    try:
        return api.create_commit(repo_id, operations, **options)
    except Exception as error:
        # The Hub may have made the commit although its answer was lost; another would then be refused, or be double
        landed = _find_commit(api, repo_id, operations, **options)
        if landed is not None:
            return landed
        if isinstance(error, HfHubHTTPError) and error.response.status_code == _CONFLICT:
            raise ValueError(
                f"somebody committed to {revision} of {repo_id} during this push; that commit stands and nothing of "
                "this push was committed: look at it, then push again"
            ) from error
        if isinstance(error, RuntimeError):  # how the client says that a file did not arrive
            raise ConnectionError(
                f"the upload to {repo_id} broke off and nothing was committed: push again, files that arrived whole "
                f"are not sent twice ({error.__cause__ or error})"
            ) from error
        raise


def _is_replaced(name: str) -> bool:
    """Tell whether a push replaces a file of the repository even if it has none of that name."""
    weights = "/" not in name and name.endswith(_WEIGHTS)
    return weights or name == MANIFEST_NAME or name.startswith(f"{RESULTS_FOLDER}/")


def _find_commit(
    api: HfApi,
    repo_id: str,
    operations: Sequence[_Operation],
    commit_message: str,
    revision: str,
    create_pr: bool,
    parent_commit: str,
) -> CommitInfo | None:
    """Find the commit that a push made: the head of its branch, or of the newest pull request; None if it made none."""
    try:
        ref, request = revision, None
        if create_pr:
            requests = api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or []
            number = max(int(request.ref.split("/")[-1]) for request in requests)
            ref, request = f"refs/pr/{number}", f"{api.endpoint}/{repo_id}/discussions/{number}"
        info = api.model_info(repo_id, revision=ref, files_metadata=True)
    except Exception:
        return None  # the Hub cannot be asked either: the first error is the one to report
    if info.sha == parent_commit or not _holds(info, operations):
        return None
    return CommitInfo(
        commit_url=f"{api.endpoint}/{repo_id}/commit/{info.sha}",
        commit_message=commit_message,
        commit_description="",
        oid=info.sha,
        pr_url=request,
    )


def _holds(info: ModelInfo, operations: Sequence[_Operation]) -> bool:
    """Compare the files of a revision with what a push wrote: by SHA-256 in LFS, else by git's hash."""
    there = {file.rfilename: file for file in info.siblings or []}
    for operation in operations:
        file = there.get(operation.path_in_repo)
        if isinstance(operation, CommitOperationDelete) or file is None:
            same = isinstance(operation, CommitOperationDelete) and file is None
        elif file.lfs:
            same = file.lfs.sha256 == operation.upload_info.sha256.hex()
        else:
            same = file.blob_id == _git_hash(Path(operation.path_or_fileobj))
        if not same:
            return False
    return True


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
