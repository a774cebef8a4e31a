"""S3, on a local server: copies of checkpoints, a store that goes away, resuming in an empty directory; texts."""

import gzip
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

pytest.importorskip("s3fs", reason="needs the extra: pip install -e '.[s3]'")
pytest.importorskip("moto.server", reason="needs moto: pip install 'moto[server]'")

from moto.server import ThreadedMotoServer

from longctx.checkpoint.copies import CheckpointCopies
from longctx.errors import UserError
from tests.data.cases import prepared, texts, write_parquet, write_tree
from tests.train.runs import checkpoints, losses, metrics, mistake, train, write_workplace

CONSTANT = "schedule.kind=constant"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def url(endpoint) -> Iterator[str]:
    """A folder in a new bucket."""
    bucket = uuid.uuid4().hex
    with _account(endpoint):
        CheckpointCopies(f"s3://{bucket}/none")._files.mkdir(bucket)
        yield f"s3://{bucket}/runs/mine"


@contextmanager
def _account(endpoint: str) -> Iterator[None]:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    with patch.dict(os.environ, {**keys, "AWS_ENDPOINT_URL": endpoint}):
        yield


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return write_workplace(tmp_path_factory.mktemp("workplace"))


def on_s3(function, endpoint: str, *arguments):
    """On a rank: the same with the server's address, which the pool's processes do not have."""
    with _account(endpoint):
        return function(*arguments)


def test_a_run_goes_on_in_an_empty_directory_from_its_copies(ranks, workplace, endpoint, url, tmp_path):
    four, six = ([f"checkpoint.copy_to={url}", f"train.steps={n}", CONSTANT] for n in (4, 6))
    ranks.run(on_s3, train, endpoint, workplace, tmp_path / "first", four, size=2)
    assert CheckpointCopies(url).steps() == [2, 4]
    ranks.run(on_s3, train, endpoint, workplace, tmp_path / "second", six, size=2)
    assert CheckpointCopies(url).steps() == [2, 4, 6]
    assert checkpoints(tmp_path / "second") == ["step-00000004", "step-00000006"]
    ranks.run(train, workplace, tmp_path / "whole", six[1:], size=2)
    assert [step.loss for step in metrics(tmp_path / "second").steps] == losses(tmp_path / "whole")[4:]


def test_a_bucket_that_is_not_there_is_an_error_at_the_start(ranks, workplace, endpoint, url, tmp_path):
    overrides = [f"checkpoint.copy_to={url.replace('s3://', 's3://not-')}", "train.steps=2"]
    (told, _) = ranks.run(on_s3, mistake, endpoint, workplace, tmp_path / "run", overrides, size=2)
    assert told.startswith("s3://not-")
    assert "bucket does not exist" in told
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_texts_in_a_bucket_are_prepared_as_those_of_a_folder(endpoint, url, tmp_path):
    parquet = write_parquet(tmp_path / "c.parquet", ["three", "four"]).read_bytes()
    files = {"a.txt": b"one", "b/b.jsonl.gz": gzip.compress(b'{"text": "two"}\n'), "b/c.parquet": parquet}
    folder = write_tree(tmp_path / "in", files)
    with _account(endpoint):
        store = CheckpointCopies(url)._files
        for name, data in files.items():
            store.pipe_file(f"{url}/in/{name}", data)
        prepared([f"{url}/in"], tmp_path / "stored")
        prepared([f"{url}/in/b/*.parquet"], tmp_path / "some")
        with pytest.raises(UserError, match=rf"^input {url}/none: has no file to prepare"):
            prepared([f"{url}/none"], tmp_path / "none")
        with pytest.raises(UserError, match=r"^input s3://no-such-bucket/x: "):
            prepared(["s3://no-such-bucket/x"], tmp_path / "none")
    prepared([folder], tmp_path / "local")
    assert texts(tmp_path / "stored") == texts(tmp_path / "local")
    assert texts(tmp_path / "some") == {"c.parquet:1": "three", "c.parquet:2": "four"}
