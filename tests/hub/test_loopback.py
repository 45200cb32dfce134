"""The loopback Hub itself, driven by the real client."""

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError


def upload(api, name, **files):
    operations = [CommitOperationAdd(path.replace("__", "."), content) for path, content in files.items()]
    return api.create_commit(name, operations, commit_message="files")


def test_files_come_back_by_every_transport(api, transport, hub, tmp_path):
    api.create_repo("alice/files")
    content = {"weights__safetensors": bytes(range(256)) * 300, "notes__json": b"{}"}
    upload(api, "alice/files", **content)
    for path, data in content.items():
        name = path.replace("__", ".")
        assert Path(hf_hub_download("alice/files", name, cache_dir=tmp_path)).read_bytes() == data
    assert bool(hub.calls("PUT /lfs")) == (transport == "lfs")
    assert bool(hub.calls("POST /xet/v1/shards")) == (transport == "xet")


def test_refs_lead_to_their_commits(api, tmp_path):
    api.create_repo("alice/files")
    first = upload(api, "alice/files", a__json=b"1")
    api.create_tag("alice/files", tag="v1")
    api.create_branch("alice/files", branch="side/way")
    upload(api, "alice/files", a__json=b"2")
    assert api.model_info("alice/files", revision="v1").sha == first.oid
    assert api.model_info("alice/files", revision="side/way").sha == first.oid
    assert [commit.title for commit in api.list_repo_commits("alice/files")] == ["files", "files", "initial commit"]


def test_errors_are_the_hubs(api):
    api.create_repo("alice/files")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("alice/files", revision="nowhere")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("alice/files", "missing.json")
    with pytest.raises(HfHubHTTPError, match="under 'bob'"):
        api.create_repo("bob/files")
    with pytest.raises(ValueError, match="license"):
        upload(api, "alice/files", README__md=b"---\nlicense: none of these\n---\n")


def test_a_broken_upload_leaves_nothing(api, hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    api.create_repo("alice/files")
    hub.fault("PUT /lfs", times=100, drop_after=10_000)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        upload(api, "alice/files", weights__safetensors=b"0" * 50_000)
    assert not hub.calls("POST .*/commit/")
