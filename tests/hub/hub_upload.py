"""The loopback Hub's calls that write: preupload, Git LFS and the commit."""

import fnmatch
import json
import secrets

import hub_xet
from hub_server import LFS_THRESHOLD, route
from hub_store import HubError, sha256_of


@route("POST", "/api/{repo}/preupload/{revision}")
def preupload(request, kind, name, revision):
    wish = request.json()
    repo = request.require_repo(kind, name, write=True, pull_request="create_pr" in request.query)
    files = repo.files(revision)
    attributes = request.store.read(repo, revision, ".gitattributes").decode()
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
    answer = []
    for file in wish["files"]:
        path, old = file["path"], files.get(file["path"])
        large = file["size"] > LFS_THRESHOLD or any(fnmatch.fnmatch(path.split("/")[-1], p) for p in patterns)
        mode = "lfs" if large and request.hub.transport != "regular" else "regular"
        item = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if old:  # the client drops a file whose oid is unchanged: sha256 for LFS, git's sha1 otherwise
            item["oid"] = old.get("lfs") or old["oid"]
        answer.append(item)
    request.reply({"files": answer})


# --- Git LFS --------------------------------------------------------------------------------------------------------


@route("POST", r"/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
def lfs_batch(request, kind, name):
    kind, hub = kind or "models", request.hub
    repo = request.require_repo(kind, name, write=True, pull_request=True)
    answer = []
    for wanted in request.json()["objects"]:
        item = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in repo.state["lfs"]:
            tail = f"{kind}/{name}/{wanted['oid']}/{wanted['size']}"
            upload = {"href": f"{hub.storage_url}/lfs/put/{tail}?signature={hub.sign('put', tail)}"}
            item["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/lfs/verify/{tail}"}}
        answer.append(item)
    headers = {"Content-Type": "application/vnd.git-lfs+json"}
    request.reply({"transfer": "basic", "objects": answer}, headers=headers)


TAIL = r"(?P<tail>(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})/(?P<size>\d+))"


@route("PUT", f"/lfs/put/{TAIL}", face="storage")
def lfs_put(request, tail, kind, name, oid, size):
    request.check_signature("put", tail)
    scratch = request.store.root / "partial" / f"{oid}.{secrets.token_hex(4)}"
    with open(scratch, "wb") as file:
        for chunk in request.body_chunks():
            file.write(chunk)
    if scratch.stat().st_size != int(size) or sha256_of(scratch) != oid:
        raise HubError(400, "Uploaded content does not match its oid")
    request.store.put_blob(oid, scratch)
    with request.store.lock:
        repo = request.store.find(kind, name)
        repo.state["lfs"][oid] = int(size)
        repo.save()
    request.reply(b"")


@route("POST", f"/lfs/verify/{TAIL}")
def lfs_verify(request, tail, kind, name, oid, size):
    repo, claim = request.require_repo(kind, name, write=True, pull_request=True), request.json()
    if repo.state["lfs"].get(claim["oid"]) != claim["size"]:
        raise HubError(404, "Object does not exist")
    request.reply({})


# --- the commit -----------------------------------------------------------------------------------------------------


@route("POST", "/api/{repo}/commit/{revision}")
def commit(request, kind, name, revision):
    lines = [json.loads(line) for line in request.body().splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    operations = [line for line in lines if line["key"] != "header"]
    pull_request = "create_pr" in request.query
    repo = request.require_repo(kind, name, write=True, pull_request=pull_request)
    if request.hub.transport == "xet":
        for operation in operations:  # before the lock is held: the content is read through this very server
            if operation["key"] == "lfsFile":
                hub_xet.import_file(request.hub, kind, name, operation["value"]["oid"])
    with request.store.lock:
        repo = request.require_repo(kind, name, write=True, pull_request=pull_request)
        tip, parent = repo.resolve(revision), header.get("parentCommit")
        if parent and not pull_request and not tip.startswith(parent):
            raise HubError(412, "The branch was updated since you opened this page. Please refresh and try again.")
        if f"refs/heads/{revision}" not in repo.refs:
            raise HubError(400, f"{revision} is not a branch")
        files = request.store.apply(repo, repo.commits[tip]["files"], operations)
        ref, url, extra = f"refs/heads/{revision}", f"{request.hub.url}/{name}", {}
        if pull_request:
            number = repo.open_pull_request()
            ref, extra = f"refs/pr/{number}", {"pullRequestUrl": f"{url}/discussions/{number}"}
        sha = repo.add_commit(ref, tip, files, header["summary"], request.user.name)
    request.reply({"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": "", **extra})
