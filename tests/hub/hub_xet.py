"""The content store that hf_xet talks to, so that uploads and downloads use its real wire protocol.

Kept: xorbs as they come, and per file the list of (xorb, chunk range) of the uploaded shard. Nothing is decompressed:
hf_xet itself, asked against this very server, gives the plain bytes.
"""

import json
import secrets
import struct

import hf_xet
from hub_server import route
from hub_store import HubError, sha256_of

HASH = "(?P<digest>[0-9a-f]{64})"
_RECORD = 48  # bytes of every record of a shard


def printed(raw):
    """Print a hash as Xet does: four little-endian 64-bit words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def shard_files(shard):
    """Yield the files of a shard: records of 48 bytes, closed by one whose hash is all ones."""
    at = _RECORD
    while shard[at : at + 32] != b"\xff" * 32:
        file = {"hash": printed(shard[at : at + 32]), "terms": [], "sha256": None}
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += _RECORD
        for _ in range(count):
            _, size, start, end = struct.unpack_from("<IIII", shard, at + 32)
            file["terms"].append([printed(shard[at : at + 32]), size, start, end])
            at += _RECORD
        if flags >> 31 & 1:  # a verification record for every term
            at += _RECORD * count
        if flags >> 30 & 1:  # one record of metadata: the file's SHA-256, printed like a Xet hash
            file["sha256"] = printed(shard[at : at + 32])
            at += _RECORD
        yield file


def chunk_offsets(xorb):
    """Byte offset of every chunk of a xorb; 8-byte headers: version, 24-bit packed size, scheme, 24-bit size."""
    data, at, offsets = xorb.read_bytes(), 0, [0]
    while at + 8 <= len(data) and data[at] == 0:
        at += 8 + int.from_bytes(data[at + 1 : at + 4], "little")
        offsets.append(at)
    return offsets


def kept(hub, *names):
    path = hub.store.root.joinpath("xet", *names)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def require_token(request, write=False):
    token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
    if request.hub.xet_tokens.get(token) not in (("write",) if write else ("read", "write")):
        raise HubError(401, "bad xet token")


@route("POST", f"/xet/v1/xorbs/[^/]+/{HASH}")
def put_xorb(request, digest):
    require_token(request, write=True)
    path, data = kept(request.hub, "xorbs", digest), request.body()
    new = not path.exists()
    scratch = path.with_suffix(f".{secrets.token_hex(4)}")
    scratch.write_bytes(data)
    scratch.replace(path)
    request.reply({"was_inserted": new})


@route("POST", "/xet/v1/shards")
def put_shard(request):
    require_token(request, write=True)
    for file in shard_files(request.body()):
        if not all(kept(request.hub, "xorbs", xorb).exists() for xorb, *_ in file["terms"]):
            raise HubError(400, "the shard names an unknown xorb")
        kept(request.hub, "files", file["hash"]).write_text(json.dumps(file))
        if file["sha256"]:
            kept(request.hub, "sha256", file["sha256"]).write_text(file["hash"])
    request.reply({"result": 1})


@route("GET", f"/xet/v1/reconstructions/{HASH}")
def reconstruction(request, digest):
    require_token(request)
    path = kept(request.hub, "files", digest)
    if not path.exists():
        raise HubError(404, "file not found")
    terms = json.loads(path.read_text())["terms"]
    low, high = 0, sum(size for _, size, *_ in terms)
    if wanted := request.headers.get("Range"):
        first, last = wanted.removeprefix("bytes=").split("-")
        low, high = int(first), min(int(last) + 1 if last else high, high)
        if low >= high:
            raise HubError(416, "out of range")
    at, skipped, used, spans = 0, None, [], {}
    for xorb, size, start, end in terms:
        if at + size > low and at < high:
            skipped = low - at if skipped is None else skipped
            used.append({"hash": xorb, "unpacked_length": size, "range": {"start": start, "end": end}})
            spans.setdefault(xorb, []).append((start, end))
        at += size
    fetch = {xorb: fetch_ranges(request.hub, xorb, merged(ranges)) for xorb, ranges in spans.items()}
    request.reply({"offset_into_first_range": skipped or 0, "terms": used, "fetch_info": fetch})


def merged(ranges):
    """Join ranges that touch or overlap: overlapping ones of one xorb make hf_xet panic."""
    joined = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    return joined


def fetch_ranges(hub, xorb, ranges):
    offsets = chunk_offsets(kept(hub, "xorbs", xorb))
    return [
        {
            "range": {"start": start, "end": end},
            "url": f"{hub.storage_url}/xorb/{xorb}",
            "url_range": {"start": offsets[start], "end": offsets[end] - 1},  # the last byte included
        }
        for start, end in ranges
    ]


@route("GET", f"/xorb/{HASH}", face="storage")
def get_xorb(request, digest):
    request.send_file(kept(request.hub, "xorbs", digest), {})


def import_file(hub, kind, name, sha256):
    """Record content that came through Xet and that a commit names, with its plain bytes for clients without Xet."""
    link = kept(hub, "sha256", sha256)
    if not link.exists():
        return
    file_hash = link.read_text()
    if not hub.store.blob(sha256).exists():
        hub.xet_tokens["internal"] = "read"
        size = sum(term[1] for term in json.loads(kept(hub, "files", file_hash).read_text())["terms"])
        scratch = hub.store.root / "partial" / secrets.token_hex(8)
        session = hf_xet.XetSession()
        options = {"endpoint": f"{hub.url}/xet", "token": "internal", "token_expiry_unix_secs": 1 << 40}
        with session.new_file_download_group(**options) as group:
            group.start_download_file(hf_xet.XetFileInfo(file_hash, size), str(scratch))
        if sha256_of(scratch) != sha256:
            raise HubError(400, "xet content does not match its sha256")
        hub.store.put_blob(sha256, scratch)
    with hub.store.lock:
        repo = hub.store.find(kind, name)
        repo.state["lfs"][sha256] = hub.store.blob(sha256).stat().st_size
        repo.state["xet"][sha256] = file_hash
        repo.save()
