"""What the loopback Hub keeps: repositories as lists of snapshots, and blobs as files named by their hash.

A commit is a JSON record with the full table of paths; there is no git.
"""

import base64
import datetime
import hashlib
import json
import re
import secrets
import threading
from pathlib import Path

import yaml

LFS_SUFFIXES = ("safetensors", "bin", "pt", "onnx", "parquet", "arrow", "npz", "gz", "zip")
LICENSES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "other", "unknown"}
_BASE_MODEL = r"[\w.-]+(/[\w.-]+)?"


class HubError(Exception):
    """Becomes an answer: status, X-Error-Code, X-Error-Message and a JSON body."""

    def __init__(self, status, message, code=None, headers=None, **body):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = headers or {}
        self.body = {"error": message, **body}


def git_blob_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_pointer(sha256, size):
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (sha256.encode(), size)


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now():
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Repo:
    """One repository: its settings, refs, commits and pull requests, saved as one JSON file."""

    def __init__(self, path, state):
        self.path, self.state = path, state
        self.id, self.refs, self.commits = state["id"], state["refs"], state["commits"]

    def save(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".partial")
        scratch.write_text(json.dumps(self.state))
        scratch.replace(self.path)

    def resolve(self, revision):
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            found = [sha for sha in self.commits if sha.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision):
        return self.commits[self.resolve(revision)]["files"]

    def add_commit(self, ref, parent, files, title, user):
        record = {"parent": parent, "files": files, "title": title, "user": user, "date": now()}
        sha = hashlib.sha1(json.dumps([record, secrets.token_hex(4)]).encode()).hexdigest()
        self.commits[sha] = record
        self.refs[ref] = sha
        self.save()
        return sha

    def open_pull_request(self):
        self.state["pull_requests"] += 1
        return self.state["pull_requests"]


class Store:
    """Repositories and blobs below a folder."""

    def __init__(self, root):
        self.root = Path(root)
        self.lock = threading.RLock()
        for folder in ("blobs", "partial", "repos"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)

    def blob(self, digest):
        return self.root / "blobs" / digest[:2] / digest

    def put_blob(self, digest, source):
        target = self.blob(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            scratch = self.root / "partial" / secrets.token_hex(8)
            scratch.write_bytes(source)
            source = scratch
        source.replace(target)

    def read(self, repo, revision, path):
        entry = repo.files(revision).get(path)
        return self.blob(entry["key"]).read_bytes() if entry else b""

    def _repo_file(self, kind, name):
        return self.root / "repos" / kind / f"{name.lower()}.json"  # the Hub ignores case

    def find(self, kind, name):
        path = self._repo_file(kind, name)
        return Repo(path, json.loads(path.read_text())) if path.is_file() else None

    def create(self, kind, name, private, user):
        state = {"id": name, "kind": kind, "private": private, "created": now(), "pull_requests": 0}
        state |= {"refs": {}, "commits": {}, "lfs": {}, "xet": {}}
        repo = Repo(self._repo_file(kind, name), state)
        attributes = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        first = {".gitattributes": self.regular_entry(attributes.encode())}
        repo.add_commit("refs/heads/main", None, first, "initial commit", user)

    def regular_entry(self, data):
        oid = git_blob_oid(data)
        self.put_blob(oid, data)
        return {"oid": oid, "size": len(data), "key": oid}

    def lfs_entry(self, repo, sha256, path):
        if sha256 not in repo.state["lfs"]:
            raise HubError(400, f"an LFS pointer points to a file that does not exist. Offending file: {path}")
        size = repo.state["lfs"][sha256]
        oid = git_blob_oid(lfs_pointer(sha256, size))
        return {"oid": oid, "size": size, "key": sha256, "lfs": sha256, "xet": repo.state["xet"].get(sha256)}

    def apply(self, repo, files, operations):
        """Return the table of paths after the operations of a commit."""
        files = dict(files)
        for operation in operations:
            value, kind = operation["value"], operation["key"]
            path = value["path"]
            if not path or path.startswith("/") or ".." in path.split("/"):
                raise HubError(422, f"Invalid path: {path}")
            if kind == "file":
                data = base64.b64decode(value["content"])
                errors = card_errors(data.decode("utf-8", "replace")) if path == "README.md" else []
                if errors:
                    raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
                files[path] = self.regular_entry(data)
            elif kind == "lfsFile":
                files[path] = self.lfs_entry(repo, value["oid"], path)
            elif kind == "deletedFile" and path in files:
                del files[path]
            else:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        return files


def card_metadata(text):
    """Read the metadata of a README.md; raises ValueError for what is not a mapping."""
    match = re.match(r"^---[ \t]*\n(.*?)\n?---[ \t]*(\n|$)", text, re.S)
    metadata = yaml.safe_load(match[1]) if match else {}
    if not isinstance(metadata or {}, dict):
        raise ValueError("metadata must be a mapping")
    return metadata or {}


def card_errors(text):
    """List what the Hub would refuse in a card's metadata (a part of its rules)."""
    try:
        metadata = card_metadata(text)
    except (ValueError, yaml.YAMLError) as error:
        return [f"Invalid YAML: {error}"]
    errors = []
    if metadata.get("license") not in {None, *LICENSES}:
        errors.append(f'"license" must be one of {sorted(LICENSES)}')
    for key in ("tags", "datasets", "metrics"):
        if not all(isinstance(value, str) for value in metadata.get(key, [])):
            errors.append(f'"{key}" must be an array of strings')
    base_model = metadata.get("base_model", "none")
    if not isinstance(base_model, str) or not re.fullmatch(_BASE_MODEL, base_model):
        errors.append(f'"base_model" with value {base_model!r} is not valid')
    for entry in metadata.get("model-index", []):
        for result in entry.get("results", []):
            complete = {"type"} <= set(result["task"]) and {"name", "type"} <= set(result["dataset"])
            if "name" not in entry or not complete:
                errors.append('"model-index" needs a name, a task and a data set')
            errors += [f"{metric} needs type and value" for metric in result["metrics"] if "value" not in metric]
    return errors
