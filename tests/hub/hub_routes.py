"""The loopback Hub's calls that read: account, repositories, listings, refs and downloads."""

import json
import secrets
import time
from urllib.parse import parse_qs

from hub_server import route
from hub_store import HubError, card_errors, card_metadata, lfs_pointer


@route("GET", "/api/whoami-v2")
def whoami(request):
    user = request.require_user(write=False)
    access = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
    request.reply({"type": "user", "id": user.name, "name": user.name, "orgs": [], "auth": access})


@route("GET", "/api/telemetry/.*")
@route("GET", "/api/agent-harnesses")
def nothing(request):
    request.reply({})


@route("POST", "/api/validate-yaml")
def validate_yaml(request):
    errors = [{"message": error} for error in card_errors(request.json()["content"])]
    request.reply({"errors": errors, "warnings": []}, 400 if errors else 200)


@route("POST", "/api/repos/create")
def create_repo(request):
    user, wish = request.require_user(), request.json()
    kind, name = wish.get("type", "model") + "s", f"{wish.get('organization') or user.name}/{wish['name']}"
    if not user.owns(name):
        raise HubError(403, f"You don't have the rights to create a repository under {name.split('/')[0]!r}")
    url = f"{request.hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
    with request.store.lock:
        if request.store.find(kind, name):
            raise HubError(409, "You already created this repo", url=url)
        request.store.create(kind, name, wish.get("visibility") == "private", user.name)
    request.reply({"url": url, "name": name, "id": secrets.token_hex(12)})


@route("GET", "/api/{repo}(/revision/{revision})?")
def repo_info(request, kind, name, revision):
    repo = request.require_repo(kind, name)
    sha = repo.resolve(revision or "main")
    card = card_metadata(request.store.read(repo, sha, "README.md").decode("utf-8", "replace"))
    config = json.loads(request.store.read(repo, sha, "config.json") or b"{}")
    siblings = []
    for path, entry in sorted(repo.commits[sha]["files"].items()):
        item = entry_json(path, entry)
        details = {"size": item["size"], "blobId": item["oid"]}
        if "lfs" in item:
            details["lfs"] = {**item["lfs"], "sha256": item["lfs"]["oid"]}
        siblings.append({"rfilename": path, **(details if "blobs" in request.query else {})})
    info = {
        "_id": "0" * 24, "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": sha,
        "private": repo.state["private"], "gated": False, "disabled": False, "downloads": 0, "likes": 0,
        "createdAt": repo.state["created"], "lastModified": repo.commits[sha]["date"], "tags": card.get("tags", []),
        "cardData": card, "siblings": siblings, "config": config,
    }  # fmt: skip
    info |= {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
    request.reply(info)


# --- listings -------------------------------------------------------------------------------------------------------


def entry_json(path, entry):
    item = {"type": "file", "oid": entry["oid"], "size": entry["size"], "path": path}
    if "lfs" in entry:
        pointer = len(lfs_pointer(entry["lfs"], entry["size"]))
        item["lfs"] = {"oid": entry["lfs"], "size": entry["size"], "pointerSize": pointer}
        if entry.get("xet"):
            item["xetHash"] = entry["xet"]
    return item


def folder_json(path):
    return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}


@route("GET", "/api/{repo}/tree/{revision}(/(?P<path>.+))?")
def tree(request, kind, name, revision, path):
    files = request.require_repo(kind, name).files(revision)
    base = f"{path.strip('/')}/" if path else ""
    inside = {key: entry for key, entry in files.items() if key.startswith(base)}
    if base and not inside:
        raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
    recursive = request.query.get("recursive", [""])[0].lower() in ("true", "1")
    items = {}
    for key, entry in sorted(inside.items()):
        parts = key.removeprefix(base).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = base + "/".join(parts[:depth])
            items.setdefault(folder, folder_json(folder))
        if recursive or len(parts) == 1:
            items[key] = entry_json(key, entry)
    if "expand" in request.query and request.query["expand"][0].lower() in ("true", "1"):
        repo = request.require_repo(kind, name)
        sha = repo.resolve(revision)
        for item in items.values():
            item["lastCommit"] = {"id": sha, "title": repo.commits[sha]["title"], "date": repo.commits[sha]["date"]}
    request.reply(list(items.values()))


@route("POST", "/api/{repo}/paths-info/{revision}")
def paths_info(request, kind, name, revision):
    raw = request.body()
    form = json.loads(raw) if "json" in request.headers.get("Content-Type", "") else parse_qs(raw.decode())
    files = request.require_repo(kind, name).files(revision)
    paths = [path.strip("/") for path in form.get("paths", [])]
    found = [entry_json(path, files[path]) for path in paths if path in files]
    folders = [folder_json(path) for path in paths if any(file.startswith(f"{path}/") for file in files)]
    request.reply([*found, *folders])


@route("GET", "/api/{repo}/commits/{revision}")
def commits(request, kind, name, revision):
    repo = request.require_repo(kind, name)
    sha, items = repo.resolve(revision), []
    while sha:
        commit = repo.commits[sha]
        authors = [{"user": commit["user"]}]
        items.append({"id": sha, "title": commit["title"], "message": "", "date": commit["date"], "authors": authors})
        sha = commit["parent"]
    request.reply(items)


# --- refs -----------------------------------------------------------------------------------------------------------


@route("GET", "/api/{repo}/refs")
def refs(request, kind, name):
    repo = request.require_repo(kind, name)

    def below(prefix):
        found = ((ref, sha) for ref, sha in repo.refs.items() if ref.startswith(prefix))
        return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha} for ref, sha in found]

    answer = {"branches": below("refs/heads/"), "tags": below("refs/tags/"), "converts": []}
    if "include_prs" in request.query:
        answer["pullRequests"] = below("refs/pr/")
    request.reply(answer)


@route("POST", "/api/{repo}/(?P<what>branch|tag)/{revision}")
def make_ref(request, kind, name, what, revision):
    wish = request.json()
    if what == "branch":
        ref, start = f"refs/heads/{revision}", wish.get("startingPoint", "main")
    else:
        ref, start = f"refs/tags/{wish['tag']}", revision
    with request.store.lock:
        repo = request.require_repo(kind, name, write=True)
        if ref in repo.refs:
            raise HubError(409, f"Reference {ref} already exists")
        repo.refs[ref] = repo.resolve(start)
        repo.save()
    request.reply({}, 201)


# --- downloads ------------------------------------------------------------------------------------------------------


@route("GET", "/((?P<kind>datasets)/)?(?P<name>[^/]+(?:/[^/]+)?)/resolve/{revision}/(?P<path>.+)")
def resolve(request, kind, name, revision, path):
    kind, hub = kind or "models", request.hub
    repo = request.require_repo(kind, name)
    sha = repo.resolve(revision)
    entry = repo.commits[sha]["files"].get(path)
    if entry is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": sha})
    headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"'}
    if "lfs" not in entry:
        request.send_file(request.store.blob(entry["key"]), headers)
        return
    digest = entry["lfs"]
    headers |= {"ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(entry["size"])}
    if hub.transport == "xet" and entry.get("xet"):
        headers["X-Xet-Hash"] = entry["xet"]
        headers["Link"] = f'<{hub.url}/api/{kind}/{name}/xet-read-token/{sha}>; rel="xet-auth"'
    headers["Location"] = f"{hub.storage_url}/get/{digest}?signature={hub.sign('get', digest)}"
    request.reply(b"", 302, headers)


@route("GET", "/get/(?P<digest>[0-9a-f]{64})", face="storage")
def get_blob(request, digest):
    request.check_signature("get", digest)
    request.send_file(request.store.blob(digest), {"ETag": f'"{digest}"'})


@route("GET", "/api/{repo}/xet-(?P<verb>read|write)-token/{revision}")
def xet_token(request, kind, name, verb, revision):
    if request.hub.transport != "xet":
        raise HubError(404, "Xet is not enabled on this Hub")
    request.require_repo(kind, name, write=verb == "write", pull_request=True)
    token, expiry, url = f"xet-{secrets.token_hex(8)}", int(time.time()) + 3600, f"{request.hub.url}/xet"
    request.hub.xet_tokens[token] = verb
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expiry)}
    request.reply({"accessToken": token, "exp": expiry, "casUrl": url}, headers=headers)
