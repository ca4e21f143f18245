"""The downloader with a local server that cuts connections, sends wrong bytes or refuses requests."""

import dataclasses
import hashlib
import io
import pickle
import socket
import struct
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from scipy.io import savemat

from helpers.image_trees import write_tiny_imagenet
from ltat_fast._torchvision import torchvision
from ltat_fast.data import download, load_dataset, make_long_tailed, sources
from ltat_fast.data.download import Archive, fetch, unpack
from ltat_fast.errors import UserError


class Server(ThreadingHTTPServer):
    """A server of ``files``. ``cuts``: bytes after which it closes the first connections.

    ``raw``: answers to the first requests, byte by byte as they are sent. ``resets``: whether it resets a connection
    instead of closing it.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cuts, self.ranges, self.supports_range = {}, [], [], True
        self.raw, self.resets = [], False

    def archive(self, name, content):
        self.files["/" + name] = content
        return Archive(f"http://127.0.0.1:{self.server_port}/{name}", hashlib.md5(content).hexdigest())


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path)
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        if self.server.raw:
            self.wfile.write(self.server.raw.pop(0))
            return
        if content is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.supports_range else 0
        if start >= len(content) > 0:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if self.server.cuts:
            self.wfile.write(body[: self.server.cuts.pop(0)])
            if self.server.resets:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


CONTENT = np.random.RandomState(0).bytes(100_000)


def silent(line):
    pass


def test_a_second_call_downloads_nothing(server, tmp_path):
    archive = server.archive("a.zip", CONTENT)
    path = fetch(archive, tmp_path / "new" / "folder", True, silent)
    assert path == tmp_path / "new" / "folder" / "a.zip"
    assert path.read_bytes() == CONTENT
    assert not path.with_name("a.zip.part").exists()
    fetch(archive, path.parent, True, silent)
    assert server.ranges == [None]


def test_a_cut_download_is_resumed(server, tmp_path):
    archive = server.archive("a.zip", CONTENT)
    server.cuts = [30_000, 20_000]
    assert fetch(archive, tmp_path, True, silent).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=30000-", "bytes=50000-"]


def test_a_later_run_resumes_the_download(server, tmp_path):
    archive = server.archive("a.zip", CONTENT)
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:40_000])
    assert fetch(archive, tmp_path, True, silent).read_bytes() == CONTENT
    assert server.ranges == ["bytes=40000-"]
    (tmp_path / "a.zip").rename(tmp_path / "a.zip.part")  # complete, but not yet verified
    assert fetch(archive, tmp_path, True, silent).read_bytes() == CONTENT
    assert server.ranges[1:] == ["bytes=100000-"]


def test_a_server_without_range_support_starts_over(server, tmp_path):
    archive = server.archive("a.zip", CONTENT)
    server.supports_range = False
    server.cuts = [30_000]
    assert fetch(archive, tmp_path, True, silent).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=30000-"]


def test_wrong_bytes_are_refused_and_deleted(server, tmp_path):
    archive = Archive(server.archive("a.zip", CONTENT).url, "0" * 32)
    with pytest.raises(
        UserError, match=rf"has md5 {hashlib.md5(CONTENT).hexdigest()}, expected {'0' * 32}, and was deleted"
    ):
        fetch(archive, tmp_path, True, silent)
    assert not (tmp_path / "a.zip").exists()
    assert not (tmp_path / "a.zip.part").exists()
    (tmp_path / "a.zip.part").write_bytes(b"of another file")  # an old partial file breaks one run, not the next
    archive = server.archive("a.zip", CONTENT)
    with pytest.raises(UserError, match="run again"):
        fetch(archive, tmp_path, True, silent)
    assert fetch(archive, tmp_path, True, silent).read_bytes() == CONTENT


def test_a_damaged_archive_is_reported_and_kept(server, tmp_path):
    archive = server.archive("a.zip", CONTENT)
    (tmp_path / "a.zip").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=rf"a.zip is damaged: md5 \w+, expected {archive.md5}; delete it") as error:
        fetch(archive, tmp_path, True, silent)
    assert archive.url in str(error.value)
    assert (tmp_path / "a.zip").exists()
    assert server.ranges == []


def test_the_error_says_how_to_download_by_hand(server, tmp_path):
    archive = server.archive("a.zip", CONTENT)
    by_hand = rf"download {archive.url} to .*a.zip by hand \(md5 {archive.md5}\)"
    with pytest.raises(UserError, match=rf"a.zip is missing; name its folder with --data-dir, or {by_hand}"):
        fetch(archive, tmp_path, False, silent)
    assert server.ranges == []
    server.files.clear()
    with pytest.raises(UserError, match=rf"404.*{by_hand}"):
        fetch(archive, tmp_path, True, silent)
    assert len(server.ranges) == 1  # a client error is not retried
    unreachable = Archive("http://127.0.0.1:9/a.zip", "0" * 32)
    lines = []
    with pytest.raises(UserError, match=r"cannot download http://127.0.0.1:9/a.zip .*by hand"):
        fetch(unreachable, tmp_path, True, lines.append)
    assert len(lines) == download.ATTEMPTS - 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot read or write .*file/a.zip"):
        fetch(archive, tmp_path / "file", True, silent)


def test_a_server_that_sends_nothing_is_given_up(server, tmp_path):
    archive = server.archive("a.zip", CONTENT)
    server.cuts = [10, 0, 0, 0, 0, 0]
    with pytest.raises(UserError, match=r"the connection ended after 10 of 100,000 bytes"):
        fetch(archive, tmp_path, True, silent)
    assert (tmp_path / "a.zip.part").read_bytes() == CONTENT[:10]


PAGE = b"<html>Please sign in</html>"
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (HEAD + b"Content-Type: text/html; charset=utf-8\r\n\r\n" + PAGE, "sends a web page, perhaps a login page"),
        (HEAD + b"\r\n" + PAGE, "sends another file than before"),
        (HEAD + b"Content-Length: 27\r\n\r\n" + PAGE, "sends 27 bytes, and the file has 100,000"),
        (
            HEAD.replace(b"200", b"206") + b"Content-Range: bytes 7-99/100\r\n\r\n" + PAGE,
            "from another byte than 40,000",
        ),
    ],
)
def test_another_answer_leaves_what_was_received(server, tmp_path, answer, words):
    archive = dataclasses.replace(server.archive("a.zip", CONTENT), size=100_000)
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:40_000])
    server.raw = [answer]
    with pytest.raises(UserError, match=words):
        fetch(archive, tmp_path, True, silent)
    assert (tmp_path / "a.zip.part").read_bytes() == CONTENT[:40_000]
    assert fetch(archive, tmp_path, True, silent).read_bytes() == CONTENT


def test_a_reset_loses_nothing_that_was_received(server, tmp_path):
    archive = server.archive("a.zip", CONTENT)
    server.cuts, server.resets = [30_000], True
    assert fetch(archive, tmp_path, True, silent).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=30000-"]


def test_an_endless_file_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MAX_DOWNLOAD", 50_000)
    server.raw = [HEAD + b"\r\n" + CONTENT]
    with pytest.raises(UserError, match="sends more than the 50,000 bytes of the file"):
        fetch(server.archive("a.zip", CONTENT), tmp_path, True, silent)
    assert (tmp_path / "a.zip.part").stat().st_size <= 50_000


@pytest.mark.parametrize("length", [b"many", b"-3", b"9" * 5000, b"\xff"])
def test_a_content_length_that_is_no_number(server, tmp_path, length):
    server.raw = [HEAD + b"Content-Length: " + length + b"\r\n\r\n" + CONTENT]
    try:
        assert fetch(server.archive("a.zip", CONTENT), tmp_path, True, silent).read_bytes() == CONTENT
    except UserError as error:
        assert "cannot download" in str(error)  # noqa: PT017 - Python's own reader may refuse the headers


def test_too_many_requests_are_repeated_after_the_pause_that_the_server_asks_for(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    server.raw = [b"HTTP/1.1 429 Slow down\r\nRetry-After: " + wait + b"\r\n\r\n" for wait in (b"7", b"99999", b"soon")]
    assert fetch(server.archive("a.zip", CONTENT), tmp_path, True, silent).read_bytes() == CONTENT
    assert pauses == [7, download.LONGEST_PAUSE, 0]


def test_a_status_line_of_garbage_does_not_reach_the_terminal(server, tmp_path):
    server.raw = [b"\x1b[2J\x07garbage" + b"x" * 5000 + b"\r\n\r\n"] * download.ATTEMPTS
    lines = []
    with pytest.raises(UserError) as error:
        fetch(server.archive("a.zip", CONTENT), tmp_path, True, lines.append)
    for text in (*lines, str(error.value)):
        assert text.isprintable()
        assert len(text) < 1000


def test_both_checksums_are_checked(server, tmp_path):
    archive = server.archive("a.zip", CONTENT)
    right = dataclasses.replace(archive, sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT))
    fetch(right, tmp_path / "right", True, silent)
    with pytest.raises(UserError, match=rf"has sha256 {right.sha256}, expected {'0' * 64}, and was deleted"):
        fetch(dataclasses.replace(archive, sha256="0" * 64), tmp_path / "wrong", True, silent)


def zipped(path, members, mode=0o644):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return path


def test_unpack(tmp_path):
    path = zipped(tmp_path / "a.zip", {"top/x/1.txt": "one", "top/2.txt": "two"})
    (tmp_path / ".top.part").mkdir()  # from a run that was killed
    (tmp_path / ".top.part" / "stale").write_text("")
    assert unpack(path, tmp_path, "top", silent) == tmp_path / "top"
    assert (tmp_path / "top" / "x" / "1.txt").read_text() == "one"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.zip", "top", "top.lock"]


@pytest.mark.parametrize(
    "name", ["../evil", "top/../../evil", "/tmp/evil", "other/evil", "top\\..\\..\\evil", "C:/evil", "topevil"]
)
def test_members_outside_are_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    path = zipped(tmp_path / "in" / "a.zip", {"top/a": "", name: "x"})
    with pytest.raises(UserError, match=r"a.zip is refused: its member .*evil' is not in top/"):
        unpack(path, tmp_path / "in", "top", silent)
    assert {entry.name for entry in (tmp_path / "in").iterdir()} == {"a.zip", "top.lock"}
    assert not (tmp_path / "evil").exists()


def test_links_bombs_and_damage_are_refused(tmp_path, monkeypatch):
    link = zipped(tmp_path / "link.zip", {"top/link": "/etc/passwd"}, mode=0o120777)
    with pytest.raises(UserError, match=r"'top/link' is a link"):
        unpack(link, tmp_path, "top", silent)
    monkeypatch.setattr(download, "MAX_UNPACKED", 999)
    with pytest.raises(UserError, match=r"claims to unpack to 1,000 bytes"):
        unpack(zipped(tmp_path / "bomb.zip", {"top/zeros": bytes(1000)}), tmp_path, "top", silent)
    monkeypatch.undo()
    understated = zipped(tmp_path / "understated.zip", {"top/zeros": bytes(50_000_000)})
    real, claimed = ((size).to_bytes(4, "little") for size in (50_000_000, 10))
    understated.write_bytes(understated.read_bytes().replace(real, claimed))
    with pytest.raises(UserError, match=r"not a valid zip file: Bad CRC-32"):
        unpack(understated, tmp_path, "top", silent)
    assert not (tmp_path / ".top.part").exists()  # what was refused leaves nothing behind
    for members in ({"top": "a file"}, {"top/a": "", "top/a/b": ""}, {"top/" + "a" * 300: ""}, {}):
        with pytest.raises(UserError, match=r"odd.zip"):
            unpack(zipped(tmp_path / "odd.zip", members), tmp_path, "top", silent)
        assert not (tmp_path / "top").exists()
    valid = zipped(tmp_path / "valid.zip", {"top/a": bytes(range(200))}).read_bytes()
    rng = np.random.RandomState(0)
    refused = 0
    for trial in range(300):
        data = bytearray(valid)
        data[rng.randint(len(data))] ^= 1 << rng.randint(8)
        (tmp_path / "flipped.zip").write_bytes(data[: rng.randint(len(data))] if trial % 3 == 0 else data)
        (tmp_path / "to").mkdir(exist_ok=True)
        try:
            unpack(tmp_path / "flipped.zip", tmp_path / "to", "top", silent)
        except UserError:
            refused += 1
            assert not (tmp_path / "to" / "top").exists()
        else:
            (tmp_path / "to" / "top").rename(tmp_path / "to" / f"fine{trial}")
    assert refused > 100


def test_tiny_imagenet_from_download_to_arrays(server, tmp_path, monkeypatch):
    """The download is interrupted twice and resumed; the next start needs no network."""
    tree = write_tiny_imagenet(tmp_path / "made" / "tiny-imagenet-200", train_images=2)
    members = {f"tiny-imagenet-200/{p.relative_to(tree)}": p.read_bytes() for p in tree.rglob("*") if p.is_file()}
    content = zipped(tmp_path / "made" / "tiny.zip", members).read_bytes()
    monkeypatch.setattr(sources, "TINY_IMAGENET", server.archive("tiny-imagenet-200.zip", content))
    server.cuts = [len(content) // 3, len(content) // 3]
    data_dir = tmp_path / "data"
    with pytest.raises(UserError, match=r"tiny-imagenet-200.zip is missing; .* download .* by hand"):
        load_dataset("tinyimagenet-lt", data_dir, download=False, report=silent)
    first = load_dataset("tinyimagenet-lt", data_dir, report=silent)
    assert np.array_equal(first.train.images[:, 0, 0, 0], first.train.labels)
    assert np.array_equal(first.test.images[:, 1, 7, 7], first.test.labels)
    assert len(server.ranges) == 3
    second = load_dataset("tinyimagenet-lt", data_dir, download=False, report=silent)
    assert np.array_equal(first.train.images, second.train.images)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tiny-imagenet-200.zip").write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"tiny-imagenet-200.zip is damaged"):
        load_dataset("tinyimagenet-lt", tmp_path / "other", report=silent)


def cifar_tar(folder, batches, meta):
    """Return a tar.gz in CIFAR's layout: pickled dictionaries with rows of 3072 bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, entry in {**batches, **meta}.items():
            data = pickle.dumps(entry)
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def md5_of(entry):
    return hashlib.md5(pickle.dumps(entry)).hexdigest()


def test_cifar10(server, tmp_path, monkeypatch):
    rng = np.random.RandomState(0)
    batches = {}
    for name, count in (("data_batch_1", 40), ("data_batch_2", 20), ("test_batch", 20)):
        labels = rng.permutation(np.arange(count) % 10).tolist()
        batches[name] = {"data": rng.randint(0, 256, (count, 3072)).astype(np.uint8), "labels": labels}
    meta = {"batches.meta": {"label_names": list("abcdefghij")}}
    archive = server.archive("cifar-10-python.tar.gz", cifar_tar("cifar-10-batches-py", batches, meta))
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "url", archive.url)
    monkeypatch.setattr(cifar, "tgz_md5", archive.md5)
    monkeypatch.setattr(
        cifar, "train_list", [[name, md5_of(batches[name])] for name in ("data_batch_1", "data_batch_2")]
    )
    monkeypatch.setattr(cifar, "test_list", [["test_batch", md5_of(batches["test_batch"])]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5_of(meta["batches.meta"])})
    server.cuts = [1000]

    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz is missing; .* download http.*md5"):
        load_dataset("cifar10-lt", tmp_path, download=False, report=silent)
    for download_allowed in (True, False):
        dataset = load_dataset("cifar10-lt", tmp_path, download=download_allowed, report=silent)
        assert server.ranges == [None, "bytes=1000-"]
        expected = np.concatenate([batches["data_batch_1"]["data"], batches["data_batch_2"]["data"]])
        assert np.array_equal(dataset.train.images, expected.reshape(-1, 3, 32, 32))
        assert dataset.train.labels.tolist() == batches["data_batch_1"]["labels"] + batches["data_batch_2"]["labels"]
        assert np.array_equal(dataset.test.images, batches["test_batch"]["data"].reshape(-1, 3, 32, 32))
        assert dataset.train.class_names == tuple("abcdefghij")
        assert (dataset.n_max, dataset.pad, dataset.flip) == (5000, 4, True)
    with pytest.raises(UserError, match="32x32"):
        load_dataset("cifar10-lt", tmp_path, image_size=64)
    (tmp_path / "cifar-10-python.tar.gz").rename(tmp_path / "away")
    folder = tmp_path / "cifar-10-batches-py"  # unpacked by another program
    folder.mkdir()
    for name, entry in (batches | meta).items():
        (folder / name).write_bytes(pickle.dumps(entry))
    unpacked = load_dataset("cifar10-lt", tmp_path, download=False, report=silent)
    assert np.array_equal(unpacked.train.images, dataset.train.images)
    (folder / "test_batch").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz is missing"):
        load_dataset("cifar10-lt", tmp_path, download=False, report=silent)
    (tmp_path / "away").rename(tmp_path / "cifar-10-python.tar.gz")
    assert np.array_equal(load_dataset("cifar10-lt", tmp_path, report=silent).test.images, dataset.test.images)


def test_cifar100(server, tmp_path, monkeypatch):
    rng = np.random.RandomState(0)
    batches = {
        name: {"data": rng.randint(0, 256, (200, 3072)).astype(np.uint8), "fine_labels": rng.permutation(200) % 100}
        for name in ("train", "test")
    }
    batches = {name: {**batch, "fine_labels": batch["fine_labels"].tolist()} for name, batch in batches.items()}
    meta = {"meta": {"fine_label_names": [f"c{i}" for i in range(100)]}}
    archive = server.archive("cifar-100-python.tar.gz", cifar_tar("cifar-100-python", batches, meta))
    cifar = torchvision.datasets.CIFAR100
    monkeypatch.setattr(cifar, "url", archive.url)
    monkeypatch.setattr(cifar, "tgz_md5", archive.md5)
    monkeypatch.setattr(cifar, "train_list", [["train", md5_of(batches["train"])]])
    monkeypatch.setattr(cifar, "test_list", [["test", md5_of(batches["test"])]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5_of(meta["meta"])})
    dataset = load_dataset("cifar100-lt", tmp_path, report=silent)
    assert dataset.train.labels.tolist() == batches["train"]["fine_labels"]
    assert len(dataset.train.class_names) == 100
    assert dataset.n_max == 500
    assert make_long_tailed(dataset, None).counts == [2] * 100


def test_svhn(server, tmp_path, monkeypatch):
    rng = np.random.RandomState(0)
    splits, arrays = {}, {}
    for split, count in (("train", 30), ("test", 20)):
        pixels = rng.randint(0, 256, (32, 32, 3, count)).astype(np.uint8)
        labels = rng.permutation(np.arange(count) % 10 + 1)  # in the files the label of the digit 0 is 10
        buffer = io.BytesIO()
        savemat(buffer, {"X": pixels, "y": labels[:, None]})
        archive = server.archive(f"{split}_32x32.mat", buffer.getvalue())
        splits[split] = [archive.url, archive.filename, archive.md5]
        arrays[split] = pixels, labels % 10
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", splits)
    with pytest.raises(UserError, match=r"train_32x32.mat is missing"):
        load_dataset("svhn-lt", tmp_path, download=False, report=silent)
    dataset = load_dataset("svhn-lt", tmp_path, report=silent)
    for part, split in ((dataset.train, "train"), (dataset.test, "test")):
        pixels, labels = arrays[split]
        assert np.array_equal(part.images, pixels.transpose(3, 2, 0, 1))
        assert np.array_equal(part.labels, labels)
    assert (dataset.n_max, dataset.pad, dataset.flip) == (None, 4, False)


def test_official_addresses():
    """The addresses and checksums that the authors published; the tests above replace them with a local server."""
    tiny = sources.TINY_IMAGENET
    assert (tiny.url, tiny.md5) == (
        "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "90528d7ca1a48142e341f4ef8d21d0de",
    )
    published = [(torchvision.datasets.SVHN.split_list[split][2]) for split in ("train", "test")]
    published += [torchvision.datasets.CIFAR10.tgz_md5, torchvision.datasets.CIFAR100.tgz_md5, tiny.md5]
    assert sorted(published) == sorted(sources.SHA256_AND_SIZE)
    assert all(len(sha256) == 64 and size > 10**7 for sha256, size in sources.SHA256_AND_SIZE.values())
    assert torchvision.datasets.CIFAR10.tgz_md5 == "c58f30108f718f92721af3b95e74349a"
    assert torchvision.datasets.CIFAR100.tgz_md5 == "eb9058c3a382ffc7106e4002c42a8d85"
