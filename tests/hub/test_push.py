"""Publishing a checkpoint directory, by the real client over HTTP."""

import json
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_r2.evaluation import LabelledData
from hf_r2.hub import push
from hf_r2.report.results import record_figures

NAME = "alice/digits-2bit"
FILES = {"README.md", "config.json", "manifest.json", "model.safetensors", "preprocessor_config.json"}


def load(source, **options):
    return AutoModelForImageClassification.from_pretrained(source, **options).eval()


def commits(api, name=NAME, revision="main"):
    return [commit.title for commit in api.list_repo_commits(name, revision=revision)]


@torch.no_grad()
def test_a_published_checkpoint_comes_back_bit_by_bit(api, transport, hub, checkpoint, pixels, tmp_path):
    commit = push(checkpoint, NAME)
    assert commits(api) == ["Upload model", "initial commit"]
    assert api.model_info(NAME).sha == commit.oid
    assert {file.rfilename for file in api.model_info(NAME).siblings} == {*FILES, ".gitattributes"}
    assert len(hub.calls("POST .*/commit/")) == 1
    reloaded = load(NAME, cache_dir=tmp_path / "cache")
    assert torch.equal(reloaded(pixels).logits, load(checkpoint)(pixels).logits)
    AutoImageProcessor.from_pretrained(NAME, cache_dir=tmp_path / "cache")


def test_the_card_says_where_the_model_is_published(api, checkpoint):
    push(checkpoint, NAME)
    card = ModelCard.load(NAME)
    assert f'from_pretrained("{NAME}")' in card.text
    assert f"`hf-r2 verify {NAME}`" in card.text
    assert card.data.base_model_relation == "quantized"
    assert (checkpoint / "README.md").read_text(encoding="utf-8") == str(card)


def test_a_card_that_was_edited_is_pushed_as_it_is(hub, checkpoint):
    path = checkpoint / "README.md"
    path.write_text(path.read_text(encoding="utf-8") + "\nA line of my own.\n", encoding="utf-8")
    push(checkpoint, NAME)
    assert ModelCard.load(NAME).text.endswith("A line of my own.\n")


def test_a_second_push_sends_what_changed(api, hub, checkpoint):
    push(checkpoint, NAME)
    first = {file.rfilename: file.blob_id for file in api.model_info(NAME, files_metadata=True).siblings}
    head, uploads = api.model_info(NAME).sha, len(hub.calls("PUT /lfs"))
    assert push(checkpoint, NAME).oid == head, "nothing changed, nothing is committed"
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    (checkpoint / "preprocessor_config.json").write_text(json.dumps({**settings, "do_rescale": False}))
    push(checkpoint, NAME)
    second = {file.rfilename: file.blob_id for file in api.model_info(NAME, files_metadata=True).siblings}
    assert [name for name in first if first[name] != second[name]] == ["preprocessor_config.json"]
    assert len(hub.calls("PUT /lfs")) == uploads
    assert len(commits(api)) == 3


def test_nothing_that_may_hold_a_pickle_leaves_home(api, checkpoint):
    for name in ("training_args.bin", "optimizer.pt", "r2_state.safetensors", "notes.pkl", "events.out", ".a.json"):
        (checkpoint / name).write_bytes(b"private")
    (checkpoint / "checkpoint-5").mkdir()
    (checkpoint / "checkpoint-5" / "scheduler.pt").write_bytes(b"private")
    push(checkpoint, NAME)
    assert {file.rfilename for file in api.model_info(NAME).siblings} == {*FILES, ".gitattributes"}


@torch.no_grad()
def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(api, checkpoint, pixels, tmp_path):
    push(checkpoint, NAME)
    model = load(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="2KB")
    push(checkpoint, NAME)
    weights = {file.rfilename for file in api.model_info(NAME).siblings if "safetensors" in file.rfilename}
    assert "model.safetensors" not in weights
    assert "model.safetensors.index.json" in weights
    assert torch.equal(load(NAME, cache_dir=tmp_path / "cache")(pixels).logits, model(pixels).logits)


def test_results_of_an_earlier_push_do_not_stay(api, checkpoint):
    figures = {"accuracy": 0.5, "loss": 1.0, "examples": 10, "collapsed": False}
    for data, there in (("org/shapes", {".eval_results/org--shapes.yaml"}), ("digits", set())):
        record_figures(checkpoint, LabelledData(data), figures, seconds=1.0)
        push(checkpoint, NAME)
        names = {file.rfilename for file in api.model_info(NAME).siblings}
        assert names == {*FILES, ".gitattributes", *there}


# --- revisions ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_tags_commits_and_pull_requests_lead_to_their_weights(api, checkpoint, pixels):
    first = push(checkpoint, NAME)
    api.create_tag(NAME, tag="v1")
    expected = load(checkpoint)(pixels).logits
    model = load(checkpoint)
    model.resnet.embedder.embedder.normalization.bias.data.add_(1.0)
    model.save_pretrained(checkpoint)
    request = push(checkpoint, NAME, create_pr=True)
    assert request.pr_url.endswith("/discussions/1")
    for revision in ("v1", first.oid, "main"):
        assert torch.equal(load(NAME, revision=revision)(pixels).logits, expected)
    for revision in ("refs/pr/1", request.oid):
        assert torch.equal(load(NAME, revision=revision)(pixels).logits, model(pixels).logits)


@torch.no_grad()
def test_the_float_revision_loads_without_hf_r2(api, fresh_process, checkpoint, pixels, tmp_path):
    push(checkpoint, NAME)
    push(checkpoint, NAME, float_revision="float")
    names = {file.rfilename for file in api.model_info(NAME, revision="float").siblings}
    assert names == {*FILES, ".gitattributes"} - {"manifest.json"}
    assert f'from_pretrained("{NAME}", revision="float")' in ModelCard.load(NAME).text
    program = (
        "import sys, torch; from transformers import AutoModelForImageClassification as Auto; "
        f"model = Auto.from_pretrained({NAME!r}, revision='float').eval(); "
        "assert 'hf_r2' not in sys.modules; "
        "torch.save(model(torch.load(sys.argv[1], weights_only=True)).logits, sys.argv[2])"
    )
    torch.save(pixels, tmp_path / "pixels.pt")
    fresh_process(sys.executable, "-c", program, tmp_path / "pixels.pt", tmp_path / "logits.pt")
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(logits, load(checkpoint)(pixels).logits)


def test_a_float_revision_is_of_a_compressed_checkpoint(hub, compressed):
    with pytest.raises(ValueError, match="float already"):
        push(compressed.with_name("digits-float"), NAME, float_revision="float")
    with pytest.raises(ValueError, match="one branch"):
        push(compressed, NAME, float_revision="float", create_pr=True)
    assert not hub.requests


# --- who may ---------------------------------------------------------------------------------------------------------


def test_a_private_repository_is_private_before_anything_is_uploaded(api, hub, checkpoint, monkeypatch, tmp_path):
    push(checkpoint, NAME, private=True)
    assert api.model_info(NAME).private
    order = hub.calls("POST /api/repos/create|GET /api/models/[^/]+/[^/]+$|preupload|PUT")
    assert "POST /api/repos/create" in order[0]
    assert order[1] == f"GET /api/models/{NAME}"
    assert "preupload" not in order[1]
    for token, error in ((None, RepositoryNotFoundError), ("hf_bob", RepositoryNotFoundError), ("no", HfHubHTTPError)):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(error):
            api.model_info(NAME)
        with pytest.raises(OSError):
            load(NAME, cache_dir=tmp_path / f"cache-{token}")


def test_a_public_repository_gets_nothing_that_must_be_private(api, hub, checkpoint):
    api.create_repo(NAME)
    with pytest.raises(ValueError, match="is public, nothing was uploaded"):
        push(checkpoint, NAME, private=True)
    assert not hub.calls("preupload|PUT|commit/")


@pytest.mark.parametrize("token", ["hf_bob", "hf_reader", "wrong"])
def test_who_may_not_write_gets_the_hubs_own_error(hub, checkpoint, token):
    push(checkpoint, NAME)
    with pytest.raises(HfHubHTTPError):
        push(checkpoint, NAME, token=token)


def test_tokens_are_written_nowhere(hub, checkpoint):
    push(checkpoint, NAME, token="hf_alice")
    for path in checkpoint.iterdir():
        assert b"hf_alice" not in path.read_bytes()


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_lost_reply_to_the_commit_is_recognised(api, hub, checkpoint):
    hub.fault("POST .*/commit/", lose_reply=True)
    commit = push(checkpoint, NAME)
    assert commit.oid == api.model_info(NAME).sha
    assert commits(api) == ["Upload model", "initial commit"]


def test_a_lost_reply_to_a_pull_request_is_recognised(api, hub, checkpoint):
    api.create_repo(NAME)
    hub.fault("POST .*/commit/", lose_reply=True)
    commit = push(checkpoint, NAME, create_pr=True)
    assert commit.pr_url.endswith("/discussions/1")
    assert commit.oid == api.model_info(NAME, revision="refs/pr/1").sha
    assert len(hub.calls("POST .*/commit/")) == 1


def test_a_commit_that_never_arrived_is_reported(api, hub, checkpoint):
    hub.fault("POST .*/commit/", status=500)
    with pytest.raises(HfHubHTTPError):
        push(checkpoint, NAME)
    assert commits(api) == ["initial commit"]


def test_somebody_elses_commit_in_between_is_reported_and_stands(api, hub, checkpoint):
    first = push(checkpoint, NAME)
    (checkpoint / "chat_template.jinja").write_text("{{ text }}")

    def commit_of_somebody_else():
        repo = hub.store.find("models", NAME)
        files = {**repo.files("main"), "other.txt": hub.store.regular_entry(b"of somebody else")}
        repo.add_commit("refs/heads/main", first.oid, files, "somebody else", "bob")

    hub.fault("POST .*/commit/", action=commit_of_somebody_else)
    with pytest.raises(ValueError, match="somebody committed to main of alice/digits-2bit"):
        push(checkpoint, NAME)
    assert commits(api)[0] == "somebody else"
    push(checkpoint, NAME)
    names = {file.rfilename for file in api.model_info(NAME).siblings}
    assert {"other.txt", "chat_template.jinja"} <= names


def test_an_upload_cut_in_the_middle_is_completed_by_the_next(api, hub, checkpoint, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault("PUT /lfs", times=100, drop_after=1000)
    with pytest.raises(ConnectionError, match="push again"):
        push(checkpoint, NAME)
    assert commits(api) == ["initial commit"]
    hub.faults.clear()
    push(checkpoint, NAME)
    assert commits(api) == ["Upload model", "initial commit"]
    load(NAME)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "README.md").unlink(), "hf-r2 card"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json with safetensors weights"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no config.json with safetensors weights"),
    ],
)
def test_what_is_no_checkpoint_is_refused_before_a_repository_is_made(hub, checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        push(checkpoint, NAME)
    assert not hub.requests
